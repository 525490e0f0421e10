"""What a call becomes, gathered where it happens, told to the observers (metrics, log, spans) at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import grpc

from hsrpc.request import Delta, Finish
from hsrpc.server.auth import client_name
from hsrpc.server.contract import Generation
from hsrpc.server.status import Failure, StalledClientError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    Context = grpc.aio.ServicerContext[bytes, Message]

Listener = Callable[["ObservedCall"], None]
CountCall = Callable[[str, grpc.StatusCode], object]
"""Is told the method and the status of each call that has ended."""

_log = logging.getLogger(__name__)
_TRANSIT_SECONDS = 0.1
"""A client's deadline may pass so much before the server's, which began with the arrival; then the client cancels."""
_TRACE_KEYS = ("traceparent", "tracestate")
_current: ContextVar[ObservedCall | None] = ContextVar("call", default=None)


class ObservedCall:
    """One call; fields that are not known yet, or never become known, are empty."""

    def __init__(self, method: str, client: str, metadata: dict[str, str], observers: Sequence[CallObserver]) -> None:
        self.method = method
        """Without its service: Generate, GetModel and so on."""
        self.client = client
        """Its authenticated name, else the host of the peer."""
        self.metadata = metadata
        """What the call's metadata says of its trace."""
        self.started = time.monotonic()
        self.request_id = ""
        self.model = ""
        self.prompt = ""
        """Where it was given as text."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token_seconds: float | None = None
        self.inter_token_seconds: list[float] = []
        """For each portion after the first, the mean time of its tokens."""
        self.finish: Finish | None = None
        self.status = grpc.StatusCode.OK
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
        """The call ends with a status that is not OK, however long it takes until the client has it."""
        self.status = failure.code
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
        self._count(call.method, call.status)


@contextmanager
def observed(observers: Sequence[CallObserver], method: str, context: Context) -> Iterator[ObservedCall | None]:
    """The call in the block is told to the observers; None where there are none."""
    if not observers:
        yield None
        return
    client = client_name.get() or peer_host(context.peer())
    call = ObservedCall(method, client, _trace_metadata(context), observers)
    token = _current.set(call)
    call.start()
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        remaining = context.time_remaining()
        is_late = remaining is not None and remaining <= _TRANSIT_SECONDS
        call.status = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        raise
    finally:
        _current.reset(token)
        call.end()


def note_generation(generation: Generation, model: str, prompt: str) -> None:
    """The current call has become a request of the engine."""
    call = _current.get()
    if call is not None:
        call.request_id, call.model, call.prompt = generation.request_id, model, prompt
        call.prompt_tokens = len(generation.prompt_token_ids)


def note_output(delta: Delta) -> None:
    """The current call has output."""
    call = _current.get()
    if call is not None:
        call.output(delta)


def peer_host(peer: str) -> str:
    """The host in gRPC's name of a peer: ipv4:127.0.0.1:5 is 127.0.0.1."""
    kind, _, address = peer.partition(":")
    host = address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else peer
    return host.replace("%5B", "").replace("%5D", "").strip("[]")


def _trace_metadata(context: Context) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if key in _TRACE_KEYS and isinstance(value, str)}


def _tell(listeners: Sequence[Listener], call: ObservedCall) -> None:
    for listener in listeners:
        try:
            listener(call)
        except Exception:  # a boundary: what watches a call must not end it
            _log.exception("an observer of calls failed")
