"""Bounds, in bytes, for what has been handed to a transport and not been taken by clients."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_PATIENCE = 1.0
"""Seconds that a write may be under way before it has to give way to others: readers that read take less."""


class _Account:
    """Bytes up to a limit. Who finds no room waits, in order; what exceeds the limit by itself has it alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waits(self) -> bool:
        """Whether anybody waits for room."""
        return any(not turn.done() for _, turn in self._waiting)

    def take(self, num_bytes: int) -> bool:
        """Take room, if there is some and nobody waits for it."""
        has_room = not self._waiting and self._fits(num_bytes)
        self.held += num_bytes if has_room else 0
        return has_room

    async def wait(self, num_bytes: int) -> None:
        """Take room once there is some."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            self.credit(0 if turn.cancelled() else num_bytes)
            raise

    def credit(self, num_bytes: int) -> None:
        """Give room back, to those that wait."""
        self.held -= num_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(wanted):
                    return
                self.held += wanted
                turn.set_result(None)
            self._waiting.popleft()

    def _fits(self, num_bytes: int) -> bool:
        return not self.held or self.held + num_bytes <= self._limit


@dataclass(eq=False, slots=True)
class Sending:
    """A message under way, for as long as its bytes are counted."""

    connection: str
    num_bytes: int
    since: float


class SendBudget:
    """What all writes together may hold, and those of one connection.

    A write beyond its connection's bound waits for others of that connection. Where all together hold too much, the one
    that has waited longest gives way, unless it has begun just now.
    """

    def __init__(self, max_bytes: int, max_connection_bytes: int) -> None:
        self._max_connection_bytes = max_connection_bytes
        self._all = _Account(max_bytes)
        self._connections: dict[str, _Account] = {}
        self._under_way: dict[Sending, Callable[[], object]] = {}
        """What makes each give way, in the order in which they began."""
        self._timer: asyncio.Handle | None = None
        """Set while a write waits for room among all."""

    @property
    def held(self) -> int:
        """Bytes of all writes under way."""
        return self._all.held

    def held_by(self, connection: str) -> int:
        """Bytes of a connection's writes, under way or soon."""
        return self._connections[connection].held if connection in self._connections else 0

    async def take(self, connection: str, num_bytes: int, give_way: Callable[[], object]) -> Sending:
        """Wait for room for a message; `give_way` ends its sending when others need the room more."""
        account = self._connections.setdefault(connection, _Account(self._max_connection_bytes))
        try:
            if not account.take(num_bytes):
                await account.wait(num_bytes)
            try:
                await self._charge_all(num_bytes)
            except asyncio.CancelledError:
                account.credit(num_bytes)
                raise
        except asyncio.CancelledError:
            self._forget(connection, account)
            raise
        sending = Sending(connection, num_bytes, asyncio.get_running_loop().time())
        self._under_way[sending] = give_way
        return sending

    def release(self, sending: Sending) -> None:
        """The message has been taken, or never will be; may be said twice."""
        if sending not in self._under_way:
            return
        del self._under_way[sending]
        self._all.credit(sending.num_bytes)
        account = self._connections[sending.connection]
        account.credit(sending.num_bytes)
        self._forget(sending.connection, account)

    async def _charge_all(self, num_bytes: int) -> None:
        if not self._all.take(num_bytes):
            self._timer = self._timer or asyncio.get_running_loop().call_soon(self._push_out)
            await self._all.wait(num_bytes)

    def _push_out(self) -> None:
        """While writes wait for room among all, end the oldest that has had its time."""
        self._timer, loop = None, asyncio.get_running_loop()
        while self._all.waits and self._under_way:
            oldest, give_way = next(iter(self._under_way.items()))
            if oldest.since + _PATIENCE > loop.time():
                break
            self.release(oldest)
            give_way()
        if self._all.waits:
            self._timer = loop.call_later(_PATIENCE / 4, self._push_out)

    def _forget(self, connection: str, account: _Account) -> None:
        if not account.held and not account.waits:
            self._connections.pop(connection, None)
