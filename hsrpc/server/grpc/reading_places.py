"""Places in which requests are read: they bound what messages that come in part may hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import islice

from hsrpc.server.errors import CrowdedError

MAX_READ = 64
"""Requests that are read at once."""
MAX_READ_OF_CONNECTION = 8
"""Those of one connection."""
MAX_WAITING = 8192
"""Requests that are read or wait for it; a connection may have as many as it leaves to others."""
PATIENCE, PATIENCE_OF_CONNECTION = 1.0, 5.0
"""Seconds that a request may be read while others wait for its place: those of all connections, or of its own."""


@dataclass(eq=False, slots=True)
class _Reading:
    """A request that is read."""

    since: float
    give_way: Callable[[], object]


class _Room:
    """So many places. Who finds none waits, in order; meanwhile whoever has been in it too long gives way."""

    def __init__(self, num_places: int, patience: float) -> None:
        self.users = 0
        """Requests that are in it or want to be."""
        self._places = asyncio.Semaphore(num_places)
        self._patience = patience
        self._waiting = 0
        self._readings: dict[_Reading, None] = {}
        """In the order in which they began."""
        self._timer: asyncio.Handle | None = None
        """Set while somebody waits."""

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """There is a place in the block."""
        if self._places.locked() and self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._push_out)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def used_by(self, reading: _Reading) -> Iterator[None]:
        """The place in the block has its use, whose time is counted."""
        self._readings[reading] = None
        try:
            yield
        finally:
            self._readings.pop(reading, None)

    def _push_out(self) -> None:
        self._timer, loop = None, asyncio.get_running_loop()
        for reading in list(islice(self._readings, self._waiting)):
            if reading.since + self._patience > loop.time():
                break
            del self._readings[reading]
            reading.give_way()
        if self._waiting:
            self._timer = loop.call_later(self._patience / 4, self._push_out)


class ReadingPlaces:
    """A request that is read has a place of its connection's, and then one of all.

    Those that wait for one hold little: grpc takes no more of a message than it reads ahead, until somebody reads it.
    """

    def __init__(self) -> None:
        self._all = _Room(MAX_READ, PATIENCE)
        self._connections: dict[str, _Room] = {}
        self._users = 0

    @asynccontextmanager
    async def place(self, connection: str, give_way: Callable[[], object]) -> AsyncIterator[None]:
        """The request is read in the block, which `give_way` must end soon: others need the place.

        Raises:
            CrowdedError: too many wait, and many of them are of this connection.
        """
        with self._room_of(connection) as room:
            async with room.place(), self._all.place():
                reading = _Reading(asyncio.get_running_loop().time(), give_way)
                with room.used_by(reading), self._all.used_by(reading):
                    yield

    @contextmanager
    def _room_of(self, connection: str) -> Iterator[_Room]:
        room = self._connections.setdefault(connection, _Room(MAX_READ_OF_CONNECTION, PATIENCE_OF_CONNECTION))
        if room.users > MAX_WAITING - self._users:
            raise CrowdedError
        room.users += 1
        self._users += 1
        try:
            yield room
        finally:
            self._users -= 1
            room.users -= 1
            if not room.users:
                del self._connections[connection]
