"""How many calls of a connection may be reset before they are answered, or have no token; more cost it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from hsrpc.server.grpc.connections import ConnectionCuts
from hsrpc.server.observation import CutReason

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_RESETS = 200
"""Early resets of a connection in `RESET_WINDOW`."""
MAX_REFUSALS = 1000
"""Calls of a connection without a known token in `RESET_WINDOW`."""
RESET_WINDOW = 10.0
"""Seconds."""
MAX_RESETS_PER_ANSWER = 4
"""Or refusals. Who hedges sends a call up to five times, and resets all but the one that is answered first."""
_EARLY = 1.0
"""Seconds from a call's start: who has waited longer for an answer may well give up."""
_MOMENT = 0.05
"""Seconds in which grpc tells that a call has been reset already."""


class ResetLimit:
    """Counts the calls of each connection that are reset early, or refused, and cuts it for too many and little else.

    An early reset comes within a second, before anything was answered. Whoever cancels amid the output, or a gateway
    some of whose users lose patience, has calls that were answered too.
    """

    def __init__(self, cuts: ConnectionCuts) -> None:
        self._cuts = cuts
        self._until = 0.0
        self._resets: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()

    def watched(self, context: Context) -> WatchedCall:
        """The call in the block counts for its connection."""
        return WatchedCall(self, context)

    def reset(self, peer: str) -> None:
        """A call of the connection has been reset early."""
        self._turn()
        self._judge(peer, self._resets, MAX_RESETS, CutReason.RESETS)

    def refused(self, peer: str) -> None:
        """A call of the connection has no known token."""
        self._turn()
        self._judge(peer, self._refusals, MAX_REFUSALS, CutReason.REFUSALS)

    def _judge(self, peer: str, counts: Counter[str], most: int, reason: CutReason) -> None:
        """One more of the connection's calls came to nothing."""
        counts[peer] += 1
        count = counts[peer]
        if count > most and count > MAX_RESETS_PER_ANSWER * self._answers[peer]:
            del counts[peer]
            self._cuts.cut(peer, reason, count)

    def answered(self, peer: str) -> None:
        """A call of the connection has had an answer."""
        self._turn()
        self._answers[peer] += 1

    def _turn(self) -> None:
        """Forget what was before the present window, gone connections too."""
        now = time.monotonic()
        if now >= self._until:
            self._until = now + RESET_WINDOW
            self._resets.clear()
            self._refusals.clear()
            self._answers.clear()


class WatchedCall:
    """A call's context that notes whether anything is answered; made by `ResetLimit.watched`."""

    def __init__(self, limit: ResetLimit, context: Context) -> None:
        self._limit = limit
        self._context = context
        self._came = self._answered = False

    async def read(self) -> Any:
        message = await self._context.read()
        if message is grpc.aio.EOF and not self._came:
            await asyncio.sleep(_MOMENT)  # so ends the reading of a call that was reset, too
        self._came = True
        return message

    def write(self, message: Any) -> Any:
        self._answered = True
        return self._context.write(message)

    async def abort(self, *status: Any) -> NoReturn:
        """Reset a call whose request was not read, a moment later: grpc takes an answer to a reset call for sent."""
        if not self._came:
            await asyncio.sleep(self._started + _MOMENT - time.monotonic())
        if status[0] is grpc.StatusCode.UNAUTHENTICATED:
            self._limit.refused(self._context.peer())
        await self._context.abort(*status)
        raise AssertionError("grpc raises when it aborts")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __enter__(self) -> Any:
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_reset = isinstance(error, asyncio.CancelledError | grpc.aio.InternalError)
        if error is None or (is_reset and self._answered):
            self._limit.answered(self._context.peer())
        elif is_reset and time.monotonic() - self._started < _EARLY:
            self._limit.reset(self._context.peer())
