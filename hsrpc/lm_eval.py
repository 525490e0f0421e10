"""The model of EleutherAI's evaluation harness that asks hsrpc, an engine or a server (extra `hsrpc[eval]`).

    python -m hsrpc.lm_eval run --model hsrpc --model_args model=./opt-13b,gpu_memory=20GiB --tasks lambada_openai
    python -m hsrpc.lm_eval run --model hsrpc --model_args target=10.0.0.7:50051 --tasks lambada_openai

In Python, importing this module makes the model known: `lm_eval.simple_evaluate(model="hsrpc", model_args=...)`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from hsrpc.batch.answer import Output
from hsrpc.batch.call import Call
from hsrpc.batch.caller import Caller, default_concurrency
from hsrpc.batch.line import Endpoint
from hsrpc.batch.refusal import Refusal
from hsrpc.client import AsyncClient
from hsrpc.config import DeviceKind, EngineConfig
from hsrpc.errors import ConfigError, InvalidRequestError, RequestFailedError
from hsrpc.loop_thread import LoopThread
from hsrpc.prompt import Chat, Text
from hsrpc.request import SamplingParams
from hsrpc.source import Embedded, Remote, Source

R = TypeVar("R")
Window: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of a request, where it has them, then the tokens that come before and those that are scored."""

_log = logging.getLogger(__name__)
_CONNECTION = ("token", "token_file", "tls_ca", "tls_cert", "tls_key")
_GENERATION = frozenset(field.name for field in fields(SamplingParams)) - {"logprobs", "prompt_logprobs"}


class HsrpcLM(TemplateLM):  # type: ignore[misc]  # lm-eval brings no types
    """Scores and generates with an engine in this process, or with a server.

    Requests are all handed over at once: what runs together is the planner's to decide, and `batch_size` says nothing.

    Raises:
        ConfigError: a setting is wrong, or belongs to the other of the two.
        HsrpcError: the engine cannot be started, or the server not be reached.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        model: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        concurrency: int | None = None,
        retry_seconds: float = 300.0,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Any,
    ) -> None:
        """`target`: HOST:PORT of a server, with `token_file`, `tls_ca`, `tls_cert` and `tls_key` as it needs them.

        Without a target `model` and further settings are those of `EngineConfig`. `max_length`: most tokens that are
        seen before one that is scored. `prefix_token_id` comes before what has no context; by default the token that
        begins the model's texts, else the one that ends them. `retry_seconds`: how long a server may be gone.
        `device` is for an engine here, "cpu" or the GPU; lm-eval's command says "cuda:0" where nobody says anything.
        """
        super().__init__()
        self.max_gen_toks = max_gen_toks
        self._loop = LoopThread("hsrpc-lm-eval", asyncio.new_event_loop)
        self._opened = AsyncExitStack()
        self._prefix = prefix_token_id
        try:
            self._source = self._loop.run(self._open(target, model, _device(device), settings))
            self._name, _ = self._loop.run(self._source.model())
            if target is not None and model is not None and not self._loop.run(self._source.serves(model)):
                raise ConfigError("model", model, f"the server at {target} has another", f"give {self._name}, or none")
            self._bounds = self._loop.run(self._source.bounds())
            self._concurrency = concurrency or default_concurrency(self._loop.run(self._source.max_batch()))
        except BaseException:
            self.close()
            raise
        self._caller = Caller(self._source, retry_seconds)
        self.max_length = min(max_length or self._bounds.max_model_len, self._bounds.max_model_len - 1)

    def close(self) -> None:
        """End the engine or the connection; the end of the process does so too."""
        self._loop.run(self._opened.aclose())
        self._loop.close()

    async def _open(
        self, target: str | None, model: str | None, device: DeviceKind, settings: Mapping[str, Any]
    ) -> Source:
        given = {name: value for name, value in settings.items() if value is not None}
        if target is not None:
            return Remote(await self._opened.enter_async_context(_client(target, given)), None)
        for name in _CONNECTION:
            if name in given:
                raise ConfigError(name, given[name], "has no meaning without a server", "give target=HOST:PORT too")
        unknown = sorted(set(given) - {field.name for field in fields(EngineConfig)})
        if unknown:
            problem = "no setting of EngineConfig or of this model"
            raise ConfigError(unknown[0], given[unknown[0]], problem, "leave it out")
        from hsrpc.engine.engine import Engine

        if model is not None:
            given["model"] = model
        config = EngineConfig(device=device, **given)
        return Embedded(await self._opened.enter_async_context(Engine(config)))

    @property
    def eot_token_id(self) -> int:
        return self._bounds.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that is scored from its beginning."""
        bos = self._bounds.bos_token_id
        return next(token_id for token_id in (self._prefix, bos, self.eot_token_id) if token_id is not None)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text; with the tokenizer's own in front, unless it begins with them or they are not wanted."""
        text = Text(string, add_special_tokens=add_special_tokens is not False)
        return self._loop.run(self._source.tokenize(text))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; where the model's template refuses system messages, that of the others."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except InvalidRequestError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _log.warning("the chat template refuses the conversation (%s); left out: system messages", error)
            return self._render(others, add_generation_prompt)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        return self._loop.run(self._source.render(Chat(messages, continue_final_message=not add_generation_prompt)))

    def _loglikelihood_tokens(
        self, requests: Sequence[Window], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """The sum of the log-probabilities of each one's scored tokens, and whether all were the most probable."""
        found = self._all(
            [self._score(context + continuation) for _, context, continuation in requests],
            [partial(_summed, len(continuation)) for _, _, continuation in requests],
            "Scoring",
            disable_tqdm=disable_tqdm,
        )
        for request, answer in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that fit the context, of which each token is scored once."""
        windows = [self._windows(text) for (text,) in (request.args for request in requests)]
        every = [(None, *window) for each in windows for window in each]
        scores = iter(self._loglikelihood_tokens(every, disable_tqdm))
        found = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        token_ids = self.tok_encode(text)
        rolling = get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, context_len=1)
        return list(map(make_disjoint_window, rolling))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The output of each context, up to the first of its stop strings."""
        found = self._all(
            [self._generation(*request.args) for request in requests],
            [_text] * len(requests),
            "Generating",
            disable_tqdm=disable_tqdm,
        )
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _score(self, token_ids: list[int]) -> Call:
        """As much of the end of `token_ids` as fits is scored."""
        return self._call(token_ids[-self.max_length - 1 :], {"max_tokens": 0, "prompt_logprobs": 0})

    def _generation(self, context: str, asked: Mapping[str, Any]) -> Call:
        kwargs = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        max_tokens, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
        kwargs.setdefault("temperature", 1.0 if kwargs["do_sample"] else 0.0)
        del kwargs["do_sample"]
        unknown = sorted(set(kwargs) - _GENERATION)
        if unknown:
            raise InvalidRequestError(unknown[0], "no setting of a generation here; leave it out of gen_kwargs")
        room = self._bounds.max_model_len - max_tokens
        if room < 1:
            remedy = f"give less than max_model_len, which is {self._bounds.max_model_len}"
            raise InvalidRequestError("max_gen_toks", f"{max_tokens} leave no room for a prompt; {remedy}")
        stop = [text for text in until if text]
        return self._call(self.tok_encode(context)[-room:], {"max_tokens": max_tokens, "stop": stop, **kwargs})

    def _call(self, token_ids: list[int], settings: dict[str, Any]) -> Call:
        return Call(Endpoint.COMPLETIONS, self._name, [token_ids], 1, settings, {})

    def _all(
        self, calls: Sequence[Call], readers: Sequence[Callable[[Output], R]], doing: str, *, disable_tqdm: bool
    ) -> list[R]:
        """What each one's reader finds in its output."""

        async def answers() -> list[R]:
            slots = asyncio.Semaphore(self._concurrency)

            async def one(call: Call, read: Callable[[Output], R]) -> R:
                async with slots:
                    output = await self._caller.output(call, 0, None, uuid4().hex)
                bar.update()
                if isinstance(output, Refusal):
                    raise RequestFailedError(output.message)
                return read(output)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*each)) for each in zip(calls, readers, strict=True)]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [task.result() for task in tasks]

        with tqdm(total=len(calls), desc=doing, disable=disable_tqdm) as bar:
            return self._loop.run(answers())


def _device(name: str | None) -> DeviceKind:
    if name == "cpu":
        return DeviceKind.CPU
    if name not in (None, "auto", "cuda", "cuda:0"):
        remedy = 'give "cpu" or "cuda"; CUDA_VISIBLE_DEVICES says which GPU'
        raise ConfigError("device", name, "no device of an engine", remedy)
    return DeviceKind.AUTO


def _client(target: str, given: Mapping[str, Any]) -> AsyncClient:
    for name, value in given.items():
        if name not in _CONNECTION:
            problem, remedy = f"has no meaning with target={target}", "give it to the server, or leave it out"
            raise ConfigError(name, value, problem, remedy)
    options = dict(given)
    if (file := options.pop("token_file", None)) is not None:
        options["token"] = Path(file).read_text(encoding="ascii").strip()
    return AsyncClient(target, **options)


def _summed(count: int, output: Output) -> tuple[float, bool]:
    scored = output.prompt_logprobs[len(output.prompt_logprobs) - count :]
    if len(scored) < count:
        raise InvalidRequestError("continuation", f"{count} tokens; only {len(scored)} can be scored (max_length)")
    return sum(each.logprob for each in scored), all(each.rank == 1 for each in scored)


def _text(output: Output) -> str:
    return output.text


register_model("hsrpc")(HsrpcLM)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
