"""How far the host launches ahead of the device."""

from __future__ import annotations

from collections import deque

from hsrpc.device.device import Device, Event
from hsrpc.plan.plan import PENDING_QUERIES

_RUN_AHEAD = 8
"""Mini-batches of a layer that are launched and not computed yet, at most."""


class Pace:
    """Holds the host back when it is far enough ahead to keep the device busy, or as far as there is memory for.

    A full launch queue blocks with the interpreter held; rows that go to the host are kept until they are there.
    """

    def __init__(self, device: Device, max_queries: int) -> None:
        """`max_queries`: query rows of a group of mini-batches, which the workspace is planned for."""
        self._device = device
        self._max_queries = max_queries
        self._place: tuple[int, int] | None = None
        self._num_queries = 0
        self._under_way: deque[tuple[Event, int]] = deque()
        """Ends of the mini-batches of a layer that were launched last, and the new tokens of each."""

    def turn(self, place: tuple[int, int], num_queries: int) -> None:
        """Wait until a layer of a mini-batch, its `place`, may be launched; the one before it is launched whole."""
        if place == self._place:
            return
        if self._place is not None:
            self._under_way.append((self._device.record(self._device.compute), self._num_queries))
        self._place, self._num_queries = place, num_queries
        room = PENDING_QUERIES * self._max_queries - num_queries
        while self._under_way and (
            len(self._under_way) > _RUN_AHEAD or sum(count for _, count in self._under_way) > room
        ):
            self._device.synchronize(self._under_way.popleft()[0])
