"""Hostile connections, for what a server does about them: floods of resets, messages that never end, streams unread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from hsrpc.server.readers import MAX_STALLS
from hsrpc.testing.raw_http2 import RawConnection, connected, message
from hsrpc.v1 import generation_pb2

HOST = "127.0.0.2"
"""Address of the hostile connections: not that of honest clients on the loopback, so they have a share of their own."""
FLOOD = 4096
"""Calls, unless the connection is cut before: as many as one may have at once."""
HALVES = 32
"""Calls of a connection that each send half of a message."""
STREAMS = 100
"""Unread, of one connection."""
_HALF = message(bytes(2048))[:1024]
_START_SECONDS = 120.0
"""For the first unread streams to begin, beside a flood."""
_WINDOW = 1
"""Bytes that each unread stream may be sent."""
_METHOD = "/hsrpc.v1.GenerationService/Generate"
_UNREAD = generation_pb2.GenerateRequest(text="Once upon a time")
_UNREAD.stopping.max_tokens = 32
_UNREAD.stopping.ignore_eos = True
_UNREAD.output.logprobs = 20

IsOver = Callable[[], bool]
"""Whether the server has put an end to it."""


class Attack(StrEnum):
    """What a hostile connection does."""

    FLOOD = "resets"
    """HEADERS, DATA, RST_STREAM, again and again; from a new connection once it is cut."""
    HALF = "half messages"
    """Calls whose message never comes whole."""
    STALL = "unread streams"
    """A hundred streams, of which nothing is read."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds after which a server must have put an end to each attack."""

    write_timeout: float
    request_timeout: float
    slack: float = 10.0
    """For a server that is busy; and for a flood, which has no time of its own."""

    def of(self, attack: Attack) -> float:
        """For one attack, once it is under way."""
        own = {Attack.FLOOD: 0.0, Attack.HALF: self.request_timeout, Attack.STALL: self.write_timeout}
        return own[attack] + self.slack


@dataclass(slots=True)
class Siege:
    """All attacks at once on a port of the loopback, each begun again when the server has put an end to it."""

    port: int
    bounds: Bounds
    seconds: dict[Attack, list[float | None]] = field(default_factory=lambda: {attack: [] for attack in Attack})
    """How long each lasted, once under way; None: longer than its bound."""

    def withstood(self, attack: Attack) -> bool:
        """Whether the server has put an end to each in time, and there was one."""
        return bool(self.seconds[attack]) and None not in self.seconds[attack]

    async def run(self, seconds: float) -> None:
        """Attack for that time, and to the end of what was begun in it; each attack once at least."""
        async with asyncio.TaskGroup() as group:
            for attack in Attack:
                group.create_task(self.repeat(attack, seconds))

    async def repeat(self, attack: Attack, seconds: float) -> None:
        """One kind alone, in the same way."""
        until = time.perf_counter() + seconds
        while True:
            async with connected(self.port, _WINDOW, HOST) as connection:
                is_over = await _BEGIN[attack](connection)
                self.seconds[attack].append(await _seconds(connection, is_over, self.bounds.of(attack)))
            if time.perf_counter() >= until:
                return


async def _seconds(connection: RawConnection, is_over: IsOver, patience: float) -> float | None:
    """Until it is over; None: there is no more patience."""
    started = time.perf_counter()
    with suppress(TimeoutError):
        await connection.until(is_over, patience)
        return time.perf_counter() - started
    return None


async def _flood(connection: RawConnection) -> IsOver:
    await connection.flood(_METHOD, FLOOD)
    return lambda: connection.is_cut


async def _send_halves(connection: RawConnection) -> IsOver:
    streams = {connection.call(_METHOD, _HALF) for _ in range(HALVES)}
    return lambda: connection.is_cut or connection.ended >= streams


async def _stall(connection: RawConnection) -> IsOver:
    """Under way once as many are unread as cost a connection."""
    for _ in range(STREAMS):
        connection.ask(_METHOD, _UNREAD)
    await connection.until(
        lambda: connection.is_cut or len(connection.answered - connection.ended) >= MAX_STALLS, _START_SECONDS
    )
    return lambda: connection.is_cut


_BEGIN: dict[Attack, Callable[[RawConnection], Awaitable[IsOver]]] = {
    Attack.FLOOD: _flood,
    Attack.HALF: _send_halves,
    Attack.STALL: _stall,
}
