"""What clients may ask of the server, whatever carries their calls: a front end reads, calls this, and writes."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from hsrpc.errors import InvalidRequestError, ModelNotFoundError
from hsrpc.prompt import Chat, Prompt, Text
from hsrpc.request import SamplingParams
from hsrpc.server.caller import Caller
from hsrpc.server.config import ServerConfig
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.observation import note_generation
from hsrpc.server.owners import Owners
from hsrpc.server.pacing import Pace, Pacer
from hsrpc.server.state import ServerState
from hsrpc.server.stream import Stream

MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a continuation."""

    prompt: Prompt
    params: SamplingParams
    pace: Pace
    request_id: str | None = None
    """None: one is made."""
    cache_salt: str = ""
    """Requests of equal salt share blocks, if their callers may."""


class Tokenized(NamedTuple):
    """What a prompt becomes."""

    token_ids: Sequence[int]
    text: str | None
    """Text of a conversation; None: the prompt was text."""


class Service:
    """The use case over one engine. All on one event loop; each call in a task of its own.

    Its errors become what the client is told by `failure_of`.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.state = ServerState()
        self._owners = Owners()
        self._pacer = Pacer()
        self._started = time.monotonic()

    @property
    def uptime(self) -> float:
        """Seconds since the service was made."""
        return time.monotonic() - self._started

    @contextmanager
    def admit(self, model: str | None) -> Iterator[Admitted]:
        """Take in a call that starts work, before its request is read; draining waits for the block's end.

        Raises:
            NotServingError: new work is not taken.
            ModelNotFoundError: another model than the loaded one is asked for.
        """
        with self.state.admit() as engine:
            self._check_model(engine, model)
            name = self.model_names(engine)[0]
            yield Admitted(engine, name, self._owners, self._pacer, self.state, max_priority=self.config.max_priority)

    def engine(self, model: str | None = None) -> Engine:
        """The engine, for calls that start no work; `model` None is the loaded one.

        Raises:
            NotServingError: it is loading or has failed.
            ModelNotFoundError: another model than the loaded one is asked for.
        """
        engine = self.state.engine
        self._check_model(engine, model)
        return engine

    def model_names(self, engine: Engine) -> Sequence[str]:
        """Names that a request may give the model of `engine`; the first is what answers call it."""
        return self.config.served_model_names or (engine.spec.name,)

    def _check_model(self, engine: Engine, model: str | None) -> None:
        if model is not None and model not in self.model_names(engine):
            raise ModelNotFoundError("another model is loaded")

    def abort(self, request_id: str, name: str | None) -> bool:
        """End a live request of the client called `name`; False where there is none of that id.

        Raises:
            InvalidRequestError: it is no request id.
            NotOwnerError: the request belongs to another client.
            NotServingError: the engine is loading or has failed.
        """
        _check_request_id(request_id)
        self._owners.check(request_id, name)
        return self.state.engine.abort(request_id)

    async def tokenize(self, model: str | None, prompt: Text | Chat, caller: Caller) -> Tokenized:
        """Token ids of `prompt`, and the text that a conversation becomes.

        Raises:
            As `admit`.
            InvalidRequestError: it is longer than any prompt, not valid Unicode, or refused by the chat template.
            QueueFullError, EngineUnavailableError: try again later.
        """
        with self.admit(model) as admitted:
            engine = admitted.engine
            text = await engine.render(prompt, client=caller.client) if isinstance(prompt, Chat) else None
            return Tokenized(await engine.tokenize(prompt, client=caller.client), text)

    async def detokenize(
        self, model: str | None, token_ids: Sequence[int], caller: Caller, *, skip_special_tokens: bool = True
    ) -> str:
        """Text of `token_ids`, special tokens left out or shown.

        Raises:
            As `tokenize`, and InvalidRequestError for too many ids, or one outside the vocabulary.
        """
        with self.admit(model) as admitted:
            return await admitted.engine.detokenize(
                token_ids, client=caller.client, skip_special_tokens=skip_special_tokens
            )


class Admitted:
    """A call that may start work on the engine."""

    def __init__(
        self, engine: Engine, model: str, owners: Owners, pacer: Pacer, state: ServerState, *, max_priority: int
    ) -> None:
        self.engine = engine
        self.model = model
        """What answers call the model."""
        self._owners = owners
        self._pacer = pacer
        self._state = state
        self._max_priority = max_priority

    @asynccontextmanager
    async def submit(self, submission: Submission, caller: Caller) -> AsyncIterator[Stream]:
        """The output of a request, owned by the caller; however the block ends, the engine's work ends too.

        It is no more urgent than the caller's may be.

        Raises:
            InvalidRequestError: the request id is none, or the engine refuses a field; fields are the engine's.
            RequestExistsError: a live request has that id.
            QueueFullError, WaitTooLongError, EngineUnavailableError: try again later.
        """
        if submission.request_id is not None:
            _check_request_id(submission.request_id)
        generation = await self.engine.submit(
            submission.prompt,
            self._bounded(submission.params, caller),
            request_id=submission.request_id,
            client=caller.client,
            user=caller.user,
            cache_salt=_salt(submission, caller),
            max_wait=caller.time_remaining,
        )
        note_generation(generation, self.model, submission.prompt)
        try:
            with self._owners.holding(generation.request_id, caller.name):
                yield Stream(generation, submission.pace, self._pacer, self._state)
        finally:
            generation.close()

    def _bounded(self, params: SamplingParams, caller: Caller) -> SamplingParams:
        most_urgent = self._max_priority if caller.max_priority is None else caller.max_priority
        return params if params.priority >= most_urgent else replace(params, priority=most_urgent)


def _salt(submission: Submission, caller: Caller) -> str:
    """What keeps the blocks of clients apart that are known, whatever they ask for."""
    return submission.cache_salt if caller.name is None else f"{len(caller.name)} {caller.name}{submission.cache_salt}"


def _check_request_id(request_id: str) -> None:
    """Let pass an id that may stand in logs as it is."""
    if not _REQUEST_ID.fullmatch(request_id):
        found = f"{len(request_id)} characters" if len(request_id) > MAX_REQUEST_ID_LENGTH else ascii(request_id)
        remedy = f"give 1 to {MAX_REQUEST_ID_LENGTH} of A-Z a-z 0-9 . _ : -"
        raise InvalidRequestError("request_id", f"{found} is no request id; {remedy}")
