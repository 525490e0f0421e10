"""What a call becomes, gathered where it happens, told to the observers (metrics, log, spans) at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hsrpc.prompt import Prompt, told
from hsrpc.request import Delta, Finish
from hsrpc.server.engine_protocol import Generation
from hsrpc.server.errors import StalledClientError
from hsrpc.server.failure import Failure, Outcome

METHODS = (
    *("Generate", "Abort", "GetModel", "Tokenize", "Detokenize", "GetServerInfo", "WatchLoad"),
    *("HealthCheck", "GetModelInfo", "GetLoads", "GetTokenizer"),
)
"""What may be asked of the server; every front end calls it so."""
Listener = Callable[["ObservedCall"], None]
CountCall = Callable[[str, Outcome], object]
"""Is told the method and the outcome of each call that has ended."""


class CutReason(StrEnum):
    """Why the server has cut a connection."""

    RESETS = "resets"
    """Its calls are reset before they are answered."""
    REFUSALS = "refusals"
    """Its calls bring no known token."""
    STALLS = "stalls"
    """What it asks for is left unread."""


CountCut = Callable[[CutReason], object]
"""Is told of each connection that was cut."""

_log = logging.getLogger(__name__)
_TRANSIT_SECONDS = 0.1
"""A client's deadline may pass so much before the server's, which began with the arrival; then the client cancels."""
_current: ContextVar[ObservedCall | None] = ContextVar("call", default=None)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call as its front end knows it when it comes."""

    method: str
    """One of METHODS."""
    client: str
    """Its authenticated name, else its host, as `canonical_host` has it."""
    time_remaining: Callable[[], float | None] = lambda: None
    """Seconds until its deadline; None: it has none."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context: `traceparent` and `tracestate`, where the caller gave them."""
    protocol: Callable[[Outcome], Mapping[str, str | int]] = lambda _: {}
    """Attributes of its span that name its protocol, and how that says the outcome."""


class ObservedCall:
    """One call; fields that are not known yet, or never become known, are empty."""

    def __init__(self, arrival: Arrival, observers: Sequence[CallObserver]) -> None:
        self.arrival = arrival
        self.started = time.monotonic()
        self.request_id = ""
        self.model = ""
        self.prompt = ""
        """The prompt's text, or its messages as JSON; empty where it was token ids."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token_seconds: float | None = None
        self.inter_token_seconds: list[float] = []
        """Mean time between tokens, for each portion after the first."""
        self.finish: Finish | None = None
        self.outcome = Outcome.OK
        self.error_id: str | None = None
        self.client_stalled = False
        self.seconds = 0.0
        """The whole call, once it has ended."""
        self._last_output = 0.0
        self._observers: Sequence[CallObserver] = observers

    def output(self, delta: Delta) -> None:
        """Tokens came."""
        now, count = time.monotonic(), len(delta.token_ids)
        if count and self.first_token_seconds is None:
            self.first_token_seconds = now - self.started
        elif count:
            self.inter_token_seconds.append((now - self._last_output) / count)
        if count:
            self._last_output = now
        self.completion_tokens += count
        self.finish = delta.finish

    def fail(self, failure: Failure, error: Exception) -> None:
        """The call ends with a failure, however long it takes until the client has it."""
        self.outcome = failure.kind
        self.error_id = failure.error_id
        self.client_stalled = isinstance(error, StalledClientError)
        self.end()

    def start(self) -> None:
        """Tell the observers."""
        _tell([observer.started for observer in self._observers], self)

    def end(self) -> None:
        """Tell the observers, once."""
        observers, self._observers = self._observers, ()
        self.seconds = time.monotonic() - self.started
        _tell([observer.ended for observer in observers], self)


class CallObserver(Protocol):
    """Is told of calls, on the event loop: must not wait."""

    def started(self, call: ObservedCall) -> None: ...
    def ended(self, call: ObservedCall) -> None: ...


class CallCounter:
    """An observer that passes on how calls ended, and no more."""

    def __init__(self, count: CountCall) -> None:
        self._count = count

    def started(self, call: ObservedCall) -> None:
        """Counted at its end."""

    def ended(self, call: ObservedCall) -> None:
        self._count(call.arrival.method, call.outcome)


class FailureCounter:
    """An observer that passes on how calls ended that did not end well."""

    def __init__(self, count: CountCall) -> None:
        self._count = count

    def started(self, call: ObservedCall) -> None:
        """Counted at its end."""

    def ended(self, call: ObservedCall) -> None:
        if call.outcome is not Outcome.OK:
            self._count(call.arrival.method, call.outcome)


@contextmanager
def observed(arrival: Arrival, observers: Sequence[CallObserver]) -> Iterator[ObservedCall]:
    """The call in the block is told to the observers."""
    call = ObservedCall(arrival, observers)
    token = _current.set(call)
    call.start()
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        remaining = arrival.time_remaining()
        is_late = remaining is not None and remaining <= _TRANSIT_SECONDS
        call.outcome = Outcome.DEADLINE_EXCEEDED if is_late else Outcome.CANCELLED
        raise
    finally:
        _current.reset(token)
        call.end()


def note_generation(generation: Generation, model: str, prompt: Prompt) -> None:
    """The current call has become a request of the engine."""
    call = _current.get()
    if call is not None:
        call.request_id, call.model = generation.request_id, model
        call.prompt = told(prompt)
        call.prompt_tokens = len(generation.prompt_token_ids)


def note_output(delta: Delta) -> None:
    """The current call has output."""
    call = _current.get()
    if call is not None:
        call.output(delta)


def _tell(listeners: Sequence[Listener], call: ObservedCall) -> None:
    for listener in listeners:
        try:
            listener(call)
        except Exception:  # a boundary: what watches a call must not end it
            _log.exception("an observer of calls failed")
