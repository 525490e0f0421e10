"""Who is admitted next: by priority, then the client that was served least, and nobody waits for ever.

Each client has a line of its own, in which a step of priority is worth `AGING` seconds of waiting, and only the first
of each line competes. Among these the smallest priority goes first, then the client with the fewest tokens served. One
that has been first in its line for longer than its patience goes before all that are not overdue, whatever its priority
and whatever its client has had: hence none starves. Since a line's clock restarts with each admitted request, many
requests of one client gain nothing from having waited together.

Every operation costs O(log n) amortised: what is outdated in a heap is dropped when it comes to the top, or all at once
when most of the heap is.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from hsrpc.schedule.request_state import Request

AGING = 10.0
"""Seconds of waiting that make up for one step of priority."""
_MAX_STEPS = 8
"""A priority beyond this, either way, ages like this one."""
_SPARE_ENTRIES = 64
_MAX_REMEMBERED = 1024


def patience(priority: int) -> float:
    """Seconds first in its line after which a request is overdue: 10 for the most urgent, 90 for 0, at most 170."""
    return AGING * (1 + _MAX_STEPS + _steps(priority))


def _steps(priority: int) -> int:
    return max(-_MAX_STEPS, min(_MAX_STEPS, priority))


class _Line:
    """One client's requests. Entries of the queue's heaps that have another number than `entry` are stale."""

    __slots__ = ("client", "entry", "first", "first_since", "heap", "num_live", "num_waiting", "served")

    def __init__(self, client: str, served: float) -> None:
        self.client = client
        self.served = served
        """Tokens charged, on the queue's common scale."""
        self.heap: list[tuple[float, int, int, Request]] = []
        self.first: Request | None = None
        self.first_since = 0.0
        self.num_waiting = 0
        self.num_live = 0
        """Requests that wait, or were admitted and have not ended."""
        self.entry = 0

    def find_first(self) -> Request | None:
        """The first that waits; those that ended before their turn are dropped."""
        if len(self.heap) > 2 * self.num_waiting + _SPARE_ENTRIES:
            self.heap = [item for item in self.heap if item[-1].finish_reason is None]
            heapify(self.heap)
        while self.heap and self.heap[0][-1].finish_reason is not None:
            heappop(self.heap)
        return self.heap[0][-1] if self.heap else None


class FairQueue:
    """Requests that have never been admitted. Times are monotonic seconds, given by the caller."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._remembered: dict[str, float] = {}
        self._by_share: list[tuple[int, float, int, int, _Line]] = []
        self._by_due: list[tuple[float, int, int, _Line]] = []
        self._levels = dict.fromkeys(range(-_MAX_STEPS, _MAX_STEPS + 1), 0.0)
        """Tokens of the client admitted last, by priority: a newcomer starts there; absence earns nothing."""
        self._num_waiting = 0
        self._num_lines_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_ahead(self, client: str) -> int:
        """About how many are admitted before a new request of `client`: its own, and as many of each other client."""
        line = self._lines.get(client)
        own = line.num_waiting if line else 0
        return min(self._num_waiting, own + (own + 1) * (self._num_lines_waiting - bool(own)))

    def add(self, request: Request, now: float) -> None:
        """Put `request` into its client's line."""
        line = self._lines.get(request.client)
        if line is None:
            level = self._levels[_steps(request.params.priority)]
            served = max(level, self._remembered.pop(request.client, 0.0))
            line = self._lines[request.client] = _Line(request.client, served)
        priority = request.params.priority
        heappush(line.heap, (now + AGING * _steps(priority), priority, request.arrival, request))
        line.num_live += 1
        self._count(line, 1)
        self._update(line, now)

    def first(self, now: float) -> Request | None:
        """Who is next, without admitting it."""
        self._drop_stale()
        if self._by_due and self._by_due[0][0] <= now:
            return self._by_due[0][-1].first
        return self._by_share[0][-1].first if self._by_share else None

    def admit(self, request: Request, now: float) -> None:
        """`request`, which is `first(now)`, waits no longer; its client is charged the prompt."""
        line = self._lines[request.client]
        if self._by_share[0][-1] is line:  # by its share, not for its waiting: then it need not be the least served
            step = _steps(request.params.priority)
            self._levels[step] = max(self._levels[step], line.served)
        heappop(line.heap)
        self._count(line, -1)
        line.served += request.num_prompt_tokens
        line.first = None
        self._update(line, now)

    def end(self, request: Request) -> None:
        """`request`, admitted or not, has ended; its client is charged the output."""
        line = self._lines[request.client]
        line.num_live -= 1
        line.served += request.num_output_tokens
        if request.scheduled_time is None:
            self._count(line, -1)
        self._update(line, line.first_since)
        if not line.num_live:
            self._leave(line)

    def _count(self, line: _Line, change: int) -> None:
        before = line.num_waiting
        line.num_waiting += change
        self._num_waiting += change
        self._num_lines_waiting += bool(line.num_waiting) - bool(before)

    def _update(self, line: _Line, now: float) -> None:
        """Let the line compete with its present first request and served tokens."""
        first = line.find_first()
        if line.first is None or line.first.finish_reason is not None:
            line.first_since = now
        line.first = first
        line.entry += 1
        if first is not None:
            heappush(self._by_share, (first.params.priority, line.served, first.arrival, line.entry, line))
            due = line.first_since + patience(first.params.priority)
            heappush(self._by_due, (due, first.arrival, line.entry, line))
        self._drop_stale()

    def _leave(self, line: _Line) -> None:
        """Forget the client, but, while there is room, not how much it was served."""
        del self._lines[line.client]
        self._remembered[line.client] = line.served
        if len(self._remembered) > _MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _drop_stale(self) -> None:
        max_entries = 2 * self._num_lines_waiting + _SPARE_ENTRIES
        if len(self._by_share) > max_entries:
            self._by_share = [item for item in self._by_share if item[-2] == item[-1].entry]
            heapify(self._by_share)
        if len(self._by_due) > max_entries:
            self._by_due = [item for item in self._by_due if item[-2] == item[-1].entry]
            heapify(self._by_due)
        while self._by_share and self._by_share[0][-2] != self._by_share[0][-1].entry:
            heappop(self._by_share)
        while self._by_due and self._by_due[0][-2] != self._by_due[0][-1].entry:
            heappop(self._by_due)
