"""Who is admitted next: by priority, then the client that was served least, and nobody waits for ever.

Each client has a line of its own, and only the first of each line competes. Among these the smallest priority goes
first, then the client with the fewest tokens served. One that has been first in its line for longer than its patience
goes before all that are not overdue, whatever its priority and whatever its client has had: hence none starves. Since a
line's clock restarts with each admitted request, many requests of one client gain nothing from having waited together.

A client's line is itself such a queue, of its users: its turn goes to one of them by the same rules, so that more users
have no more turns. In a user's line a step of priority is worth `AGING` seconds of waiting.

Every operation costs O(log n) amortised: what is outdated in a heap is dropped when it comes to the top, or all at once
when most of the heap is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter

from hsrpc.request import SamplingParams
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


def aged(params: SamplingParams, arrival_time: float) -> float:
    """Arrival in seconds, moved by what the priority is worth: the smallest of a user's line is its first."""
    return arrival_time + AGING * _steps(params.priority)


def _steps(priority: int) -> int:
    return max(-_MAX_STEPS, min(_MAX_STEPS, priority))


class _UserLine:
    """One user's requests that wait."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Request]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_ahead(self) -> int:
        """How many are admitted before a new one."""
        return self._num_waiting

    def add(self, request: Request, now: float) -> None:
        heappush(self._heap, (aged(request.params, now), request.params.priority, request.arrival, request))
        self._num_waiting += 1

    def preferred(self) -> Request | None:
        """The first that waits; those that ended before their turn are dropped."""
        if len(self._heap) > 2 * self._num_waiting + _SPARE_ENTRIES:
            self._heap = [item for item in self._heap if item[-1].finish_reason is None]
            heapify(self._heap)
        while self._heap and self._heap[0][-1].finish_reason is not None:
            heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def first(self, now: float) -> Request | None:
        """As `preferred`: whoever is overdue here is the first already."""
        return self.preferred()

    def admit(self, request: Request, now: float) -> None:
        heappop(self._heap)
        self._num_waiting -= 1

    def end(self, request: Request) -> None:
        if request.scheduled_time is None:
            self._num_waiting -= 1


class _Account:
    """One client's line (or one user's) as it competes. Entries of the queue's heaps with another number are stale."""

    __slots__ = ("entry", "first", "first_since", "line", "name", "num_live", "served")

    def __init__(self, name: str, line: FairQueue | _UserLine, served: float) -> None:
        self.name = name
        self.line = line
        self.served = served
        """Tokens charged, on the queue's common scale."""
        self.first: Request | None = None
        """The line's preferred one."""
        self.first_since = 0.0
        self.num_live = 0
        """Requests that wait, or were admitted and have not ended."""
        self.entry = 0


class FairQueue:
    """Requests that have never been admitted. Times are monotonic seconds, given by the caller."""

    def __init__(self, levels: Sequence[str] = ("client", "user")) -> None:
        """`levels`: attributes of a request by whose values lines compete, the outermost first."""
        self._name_of: Callable[[Request], str] = attrgetter(levels[0])
        self._inner_levels = levels[1:]
        self._lines: dict[str, _Account] = {}
        self._remembered: dict[str, float] = {}
        self._by_share: list[tuple[int, float, int, int, _Account]] = []
        self._by_due: list[tuple[float, int, int, _Account]] = []
        self._levels = dict.fromkeys(range(-_MAX_STEPS, _MAX_STEPS + 1), 0.0)
        """Tokens of the client admitted last, by priority: a newcomer starts there; absence earns nothing."""
        self._num_waiting = 0
        self._num_lines_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_ahead(self, name: str, *inner_names: str) -> int:
        """About how many are admitted before a new request of these names, one for each level.

        Those before it in its own line, and as many of each other line.
        """
        account = self._lines.get(name)
        own = account.line.num_ahead(*inner_names) if account else 0
        others = self._num_lines_waiting - bool(account and len(account.line))
        return min(self._num_waiting, own + (own + 1) * others)

    def add(self, request: Request, now: float) -> None:
        """Put `request` into its line."""
        name = self._name_of(request)
        account = self._lines.get(name)
        if account is None:
            level = self._levels[_steps(request.params.priority)]
            served = max(level, self._remembered.pop(name, 0.0))
            line: FairQueue | _UserLine = FairQueue(self._inner_levels) if self._inner_levels else _UserLine()
            account = self._lines[name] = _Account(name, line, served)
        account.num_live += 1
        account.line.add(request, now)
        self._count(account, 1)
        self._update(account, now)

    def preferred(self) -> Request | None:
        """Who is next where nobody is overdue."""
        self._drop_stale()
        return self._by_share[0][-1].first if self._by_share else None

    def first(self, now: float) -> Request | None:
        """Who is next, without admitting it."""
        self._drop_stale()
        if self._by_due and self._by_due[0][0] <= now:
            return self._by_due[0][-1].line.first(now)
        return self._by_share[0][-1].line.first(now) if self._by_share else None

    def admit(self, request: Request, now: float) -> None:
        """`request`, which is `first(now)`, waits no longer; it is charged the prompt."""
        account = self._lines[self._name_of(request)]
        if self._by_share[0][-1] is account:  # by its share, not for its waiting: then it need not be the least served
            step = _steps(self._by_share[0][0])
            self._levels[step] = max(self._levels[step], account.served)
        account.line.admit(request, now)
        self._count(account, -1)
        account.served += request.num_prompt_tokens
        account.first = None
        self._update(account, now)

    def end(self, request: Request) -> None:
        """`request`, admitted or not, has ended; it is charged the output."""
        account = self._lines[self._name_of(request)]
        account.num_live -= 1
        account.served += request.num_output_tokens
        account.line.end(request)
        if request.scheduled_time is None:
            self._count(account, -1)
        self._update(account, account.first_since)
        if not account.num_live:
            self._leave(account)

    def _count(self, account: _Account, change: int) -> None:
        """`account`'s line has become longer by `change`, which is 1 or -1."""
        self._num_waiting += change
        if len(account.line) == max(0, change):
            self._num_lines_waiting += change

    def _update(self, account: _Account, now: float) -> None:
        """Let the line compete with its present first request and served tokens."""
        first = account.line.preferred()
        if account.first is None or account.first.finish_reason is not None:
            account.first_since = now
        account.first = first
        account.entry += 1
        if first is not None:
            heappush(self._by_share, (first.params.priority, account.served, first.arrival, account.entry, account))
            due = account.first_since + patience(first.params.priority)
            heappush(self._by_due, (due, first.arrival, account.entry, account))
        self._drop_stale()

    def _leave(self, account: _Account) -> None:
        """Forget the line, but, while there is room, not how much it was served."""
        del self._lines[account.name]
        self._remembered[account.name] = account.served
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
