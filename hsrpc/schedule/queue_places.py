"""Who holds which part of a bounded queue, and who gives way where it is full: the longest line to a shorter one.

Lines are those of clients; within a client's, those of its users: more users hold no more places. Lines are measured by
their requests, and by their prompt tokens. Every operation costs O(log n) amortised: what is outdated in a heap is
dropped when it comes to the top, or all at once when most of the heap is.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

from hsrpc.request import SamplingParams
from hsrpc.schedule.fair_queue import aged

_SPARE_ENTRIES = 64


class Waiter(Protocol):
    """What holds a place: a request that waits and was never admitted, or one that is being prepared."""

    @property
    def client(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def arrival_time(self) -> float: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class _Sizes:
    """A size for each name; 0 where it has none."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def __getitem__(self, name: str) -> int:
        return self._sizes.get(name, 0)

    def add(self, name: str, change: int) -> None:
        """Let the size of `name` grow by `change`."""
        size = self[name] + change
        if size:
            self._sizes[name] = size
            heappush(self._heap, (-size, name))
        else:
            self._sizes.pop(name, None)
        if len(self._heap) > 2 * len(self._sizes) + _SPARE_ENTRIES:
            self._heap = [(-size, name) for name, size in self._sizes.items()]
            heapify(self._heap)

    def largest(self, more_than: int) -> str | None:
        """The name with the largest size; None where that is not more than `more_than`."""
        while self._heap and self[self._heap[0][1]] != -self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][1] if self._heap and -self._heap[0][0] > more_than else None


class Shares:
    """How much each client, and each of its users, holds of one thing."""

    def __init__(self) -> None:
        self.total = 0
        self._clients = _Sizes()
        self._users: dict[str, _Sizes] = {}

    def add(self, client: str, user: str, change: int) -> None:
        """Let what they hold grow by `change`."""
        self.total += change
        self._clients.add(client, change)
        users = self._users.setdefault(client, _Sizes())
        users.add(user, change)
        if not users:
            del self._users[client]

    def giving_way(self, client: str, user: str, amount: int) -> tuple[str, str] | None:
        """Client and user whose line gives way to `amount` more of these: the longest, if theirs stays shorter.

        None where there is none: then theirs is, or would become, as long as any.
        """
        longest = self._clients.largest(self._clients[client] + amount)
        if longest is not None:
            found = self._users[longest].largest(0)
        elif client in self._users:
            longest, users = client, self._users[client]
            found = users.largest(users[user] + amount)
        else:
            found = None
        return None if longest is None or found is None else (longest, found)


class _Line:
    """A user's waiters."""

    def __init__(self) -> None:
        self.held: dict[Waiter, tuple[float, int, int]] = {}
        """Negated places in the order in which they are let in."""
        self._heap: list[tuple[tuple[float, int, int], Waiter]] = []

    def hold(self, waiter: Waiter, number: int) -> None:
        place = self.held[waiter] = (-aged(waiter.params, waiter.arrival_time), -waiter.params.priority, -number)
        heappush(self._heap, (place, waiter))
        if len(self._heap) > 2 * len(self.held) + _SPARE_ENTRIES:
            self._heap = [(place, waiter) for waiter, place in self.held.items()]
            heapify(self._heap)

    def last(self) -> Waiter:
        """The one that would be let in last."""
        while self.held.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][1]


class QueuePlaces:
    """The places of a queue that are held; how many there are is the caller's business."""

    def __init__(self) -> None:
        self.requests = Shares()
        self.tokens = Shares()
        self._lines: dict[tuple[str, str], _Line] = {}
        self._numbers = count()

    def hold(self, waiter: Waiter) -> None:
        """`waiter`, which holds no place, gets one: the last of its line, but for its priority."""
        self._lines.setdefault((waiter.client, waiter.user), _Line()).hold(waiter, next(self._numbers))
        self._count(waiter, 1)

    def release(self, waiter: Waiter) -> None:
        """`waiter` holds no place from now on; nothing happens where it has none."""
        name = (waiter.client, waiter.user)
        line = self._lines.get(name)
        if line is None or line.held.pop(waiter, None) is None:
            return
        if not line.held:
            del self._lines[name]
        self._count(waiter, -1)

    def giving_way(self, shares: Shares, client: str, user: str, amount: int) -> Waiter | None:
        """Who gives way to `amount` more of `shares` for these: the last of the longest line, or nobody."""
        name = shares.giving_way(client, user, amount)
        return None if name is None else self._lines[name].last()

    def _count(self, waiter: Waiter, sign: int) -> None:
        self.requests.add(waiter.client, waiter.user, sign)
        self.tokens.add(waiter.client, waiter.user, sign * waiter.num_prompt_tokens)
