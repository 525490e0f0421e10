"""Calls a source: the outputs of a call's requests, tried again where they fail by chance, and its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from hashlib import sha256
from itertools import count
from typing import TypeVar

from hsrpc.batch.answer import Answer, Echo, Output
from hsrpc.batch.call import Call
from hsrpc.batch.refusal import FAILED, Refusal
from hsrpc.batch.retry import MAX_ATTEMPTS, ChanceError, Retries, failure_of
from hsrpc.errors import HsrpcError
from hsrpc.prompt import Chat, Prompt, Text, told
from hsrpc.request import Delta, FinishReason
from hsrpc.source import Source

T = TypeVar("T")

_WAITING = 4
"""One request waits for each so many that run, so that a place which becomes free has one at once."""
_MIN_WAITING = 8


def default_concurrency(max_batch: int) -> int:
    """Requests to have at a time where `max_batch` run at once."""
    return max_batch + max(_MIN_WAITING, max_batch // _WAITING)


def seed_for(seed: int | None, name: str) -> int | None:
    """The seed of what is called `name`, whatever runs before it; None: it is drawn."""
    if seed is None:
        return None
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])


class Caller:
    """Sends requests to `source`; gives up on one that has been gone for `retry_seconds`."""

    def __init__(self, source: Source, retry_seconds: float) -> None:
        self._source = source
        self._retries = Retries(retry_seconds)
        self._served: dict[str, bool] = {}
        self._texts: dict[int, str] = {}

    async def check_model(self, call: Call) -> Refusal | None:
        """The refusal of a call that names another model; None: it names the one that is served."""
        model = call.model
        if model not in self._served:
            found = await self._tried(call, lambda _: self._source.serves(model))
            if isinstance(found, Refusal):
                return found
            self._served[model] = found
        if self._served[model]:
            return None
        name, _ = await self._source.model()
        return Refusal.of_model(model, name)

    async def output(self, call: Call, index: int, seed: int | None, request_id: str) -> Output | Refusal:
        """Output of request number `index`; a `seed` is for a call that brings none.

        Raises:
            HsrpcError: one that all requests would end with.
        """
        return await self._tried(
            call, lambda attempt: self._generate(call, index, seed, f"{request_id}-{index}-{attempt}")
        )

    async def answer(self, call: Call, outputs: Sequence[Output], request_id: str) -> Answer | Refusal:
        """The answer to a call of whose requests these are the outputs."""
        named = {token_id for output in outputs for token_id in output.named_ids()}
        for token_id in named - self._texts.keys():
            text = await self._tried(call, lambda _, token_id=token_id: self._text(token_id))  # type: ignore[misc]
            if isinstance(text, Refusal):
                return text
            self._texts[token_id] = text
        return Answer(request_id, call, outputs, self._texts)

    async def _tried(self, call: Call, attempt: Callable[[int], Awaitable[T]]) -> T | Refusal:
        """What an attempt gives, each told its number; again where it fails by chance."""
        for number in count(1):
            try:
                return await attempt(number)
            except HsrpcError as error:
                failure = failure_of(error, call)
            if isinstance(failure, ChanceError) and number >= MAX_ATTEMPTS:
                failure = Refusal(500, str(failure), FAILED)
            if isinstance(failure, Refusal):
                return failure
            await self._retries.wait(failure, number)
        raise AssertionError("attempts have no end")

    async def _generate(self, call: Call, index: int, seed: int | None, request_id: str) -> Output | Refusal:
        prompt, settings = call.request(index, seed)
        deltas: list[Delta] = []
        async with aclosing(self._source.generate(prompt, settings, request_id)) as stream:
            async for delta in stream:
                self._retries.note_alive()
                deltas.append(delta)
        finish = deltas[-1].finish if deltas else None
        if finish is None:
            raise ChanceError("the stream ended before its last response")
        if finish.reason is FinishReason.ABORTED:
            return Refusal(500, "the request was aborted", FAILED, code="aborted")
        return Output(
            "".join(delta.text for delta in deltas),
            [token_id for delta in deltas for token_id in delta.token_ids],
            [logprob for delta in deltas for logprob in delta.logprobs],
            finish,
            [logprob for delta in deltas for logprob in delta.prompt_logprobs],
            await self._echo(prompt) if call.echo else None,
        )

    async def _echo(self, prompt: Prompt) -> Echo:
        if isinstance(prompt, str | Text | Chat):
            text, (first, *_) = told(prompt), await self._source.tokenize(prompt)
        else:
            text, first = await self._source.text_of(prompt), prompt[0]
        return Echo(text, first)

    async def _text(self, token_id: int) -> str:
        """Text of a token within others: where a text begins, some tokenizers leave its space out."""
        once, twice = await self._source.text_of([token_id]), await self._source.text_of([token_id, token_id])
        return twice[len(once) :]
