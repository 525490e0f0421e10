"""Who is let in next: checked against a plain model on random traces, and each promise by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.fair_queue import AGING, FairQueue, patience
from hsrpc.schedule.queue_rate import QueueRate
from hsrpc.schedule.request_state import Request
from tests.schedule.support import Counting


class Trace:
    """A queue and a clock; requests are numbered as they arrive."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.now = 0.0
        self.requests: list[Request] = []
        self.first_since: dict[str, float] = {}
        """By client, since when its line has had a first request."""

    def add(self, client: str, tokens: int = 10, priority: int = 0, user: str = "") -> Request:
        arrival = len(self.requests)
        params = SamplingParams(priority=priority)
        request = Request(str(arrival), [1] * tokens, params, arrival, self.now, client=client, user=user)
        if not self.line(client):
            self.first_since[client] = self.now
        self.requests.append(request)
        self.queue.add(request, self.now)
        return request

    def admit(self) -> Request | None:
        """Let the next in, and check what the queue promises."""
        request = self.queue.first(self.now)
        assert self.queue.first(self.now) is request
        if request is None:
            assert not self.waiting
            return None
        if not any(r.user for r in self.waiting):
            self._check(request)
        self.queue.admit(request, self.now)
        request.scheduled_time = self.now
        self.first_since[request.client] = self.now
        return request

    def end(self, request: Request, num_outputs: int = 0) -> None:
        request.finish_reason = FinishReason.ABORTED
        request.token_ids += [2] * num_outputs
        self.queue.end(request)

    @property
    def waiting(self) -> list[Request]:
        return [r for r in self.requests if r.scheduled_time is None and r.finish_reason is None]

    def line(self, client: str) -> list[Request]:
        """A client's waiting requests, as aging orders them."""
        return sorted((r for r in self.waiting if r.client == client), key=aged)

    def _check(self, request: Request) -> None:
        firsts = [self.line(client)[0] for client in {r.client for r in self.waiting}]
        assert request in firsts
        dues = {r: self.first_since[r.client] + patience(r.params.priority) for r in firsts}
        overdue = [r for r in firsts if dues[r] <= self.now]
        if overdue:
            assert (dues[request], request.arrival) == min((dues[r], r.arrival) for r in overdue)
        else:
            served = {r: (r.params.priority, self.queue._lines[r.client].served, r.arrival) for r in firsts}
            assert served[request] == min(served.values())


def aged(request: Request) -> tuple[float, int, int]:
    priority = request.params.priority
    return request.arrival_time + AGING * max(-8, min(8, priority)), priority, request.arrival


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcd"), st.integers(1, 50), st.integers(-2, 10)),
        st.tuples(st.just("let in")),
        st.tuples(st.just("end"), st.integers(0, 99), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.sampled_from((0.5, 5.0, 40.0, 200.0))),
    ),
    max_size=80,
)


@given(operations=OPERATIONS)
@settings(max_examples=150)
def test_any_trace_keeps_the_promises(operations: list[tuple]):
    """Overdue ones first, then priority, then the client served least; nothing is lost, counted twice or left."""
    trace = Trace()
    for name, *values in operations:
        if name == "add":
            trace.add(*values)
        elif name == "let in":
            trace.admit()
        elif name == "pass":
            trace.now += values[0]
        elif alive := [r for r in trace.requests if r.finish_reason is None]:
            chosen = alive[values[0] % len(alive)]
            trace.end(chosen, 0 if chosen.scheduled_time is None else values[1])
        assert len(trace.queue) == len(trace.waiting)
        assert trace.queue.num_ahead("a", "") <= len(trace.queue)
    while trace.admit():
        pass
    for request in trace.requests:
        if request.finish_reason is None:
            trace.end(request)
    assert (len(trace.queue), trace.queue._lines, trace.queue._num_lines_waiting) == (0, {}, 0)


def test_a_greedy_client_does_not_delay_a_light_one():
    """Behind a thousand requests of one client, another one's only request is let in second."""
    trace = Trace()
    for _ in range(1000):
        trace.add("greedy")
    trace.admit()
    trace.now = 30.0
    assert trace.queue.num_ahead("light", "") == 1
    assert trace.queue.num_ahead("greedy", "") == 999
    light = trace.add("light")
    assert light in [trace.admit(), trace.admit()]


def test_users_of_a_client_take_turns_within_its_share():
    """One of two that are let in is of the client that names a new user each time, and its old user has his turns."""
    trace = Trace()
    for number in range(40):
        trace.add("plain")
        trace.add("gateway", user="old")
        trace.add("gateway", user=str(number))
    assert trace.queue.num_ahead("gateway", "late") < trace.queue.num_ahead("gateway", "old") == 120
    let_in = [trace.admit() for _ in range(40)]
    assert sum(request.client == "plain" for request in let_in) in (19, 20, 21)
    assert sum(request.user == "old" for request in let_in) >= 1
    later = [trace.add("gateway", user="old"), trace.add("gateway", user="late")]
    order = [trace.admit() for _ in range(82)]
    assert trace.admit() is None
    assert order.index(later[1]) < order.index(later[0])


def test_a_user_does_not_starve_behind_new_ones():
    """Under a ceaseless flow of new users of its client, a user's second request is let in once it is overdue."""
    trace = Trace()
    trace.add("gateway", user="old", priority=2)
    waiting = trace.add("gateway", user="old", priority=2)
    for number in range(60):
        trace.add("gateway", user=str(number))
        trace.now += 10.0
        if waiting in [trace.admit()]:
            return
    pytest.fail("it was never let in")


def test_of_equals_the_first_to_come_is_let_in_first():
    """Clients whose priority and tokens are the same, whatever their names; also where all are overdue together."""
    for wait in (0.0, 2 * patience(0)):
        trace = Trace()
        added = [trace.add(client) for client in "cabd"]
        trace.now = wait
        assert [trace.admit() for _ in added] == added


def test_of_one_client_the_first_to_come_is_let_in_first():
    """At the same time and priority."""
    trace = Trace()
    added = [trace.add("a") for _ in range(5)]
    assert [trace.admit() for _ in added] == added


def test_clients_share_tokens_and_not_requests():
    """A client whose prompts are ten times as long has a tenth of the requests let in."""
    trace = Trace()
    for _ in range(200):
        trace.add("long", tokens=100)
        trace.add("short", tokens=10)
    clients = [trace.admit().client for _ in range(110)]
    assert 8 <= clients.count("long") <= 12


def test_output_is_charged_too():
    """The client whose request gave a long output waits until the other one has had as much."""
    trace = Trace()
    trace.add("a")
    first = trace.admit()
    for _ in range(30):
        trace.add("a")
        trace.add("b")
    trace.end(first, num_outputs=100)
    clients = [trace.admit().client for _ in range(10)]
    assert clients.count("b") >= 9


def test_absence_earns_nothing_and_does_not_clear_a_debt():
    """A client that was away starts level with the others; one that comes back at once is still ahead of them."""
    trace = Trace()
    for _ in range(50):
        trace.add("steady")
    for _ in range(20):
        trace.admit()
    for _ in range(5):
        trace.add("new")
        trace.add("new")
    clients = [trace.admit().client for _ in range(8)]
    assert clients.count("steady") >= 3
    again = Trace()
    greedy = again.add("greedy")
    assert again.admit() is greedy
    again.end(greedy, num_outputs=500)
    again.add("greedy")
    again.add("other")
    assert again.admit().client == "other"


def test_an_urgent_clients_lead_is_no_newcomers_debt():
    """A client that has had much by its priority does not make a new client wait until a steady one has had as much."""
    trace = Trace()
    for _ in range(100):
        trace.add("urgent", priority=-1)
        trace.add("steady")
    for _ in range(105):
        trace.admit()
    light = trace.add("light")
    assert light in [trace.admit(), trace.admit()]


def test_none_starves_whatever_its_priority():
    """Under a ceaseless flow of urgent requests, one of the lowest priority is let in once its patience has passed."""
    trace = Trace()
    low = trace.add("low", priority=2**31 - 1)
    while low.scheduled_time is None:
        for name in "xyz":
            trace.add(name, priority=-(2**31))
        trace.now += 1.0
        trace.admit()
        assert trace.now < 400
    assert trace.now >= patience(2**31 - 1)


def test_within_a_line_waiting_makes_up_for_priority():
    """A client's later request passes its earlier one by priority, but not after `AGING` seconds for each step."""
    trace = Trace()
    early = trace.add("a", priority=1)
    trace.now = AGING / 2
    urgent = trace.add("a")
    trace.now = AGING * 2
    late = trace.add("a")
    assert [trace.admit() for _ in range(3)] == [urgent, early, late]


@pytest.mark.parametrize("num_clients", [1, 100, 10_000])
def test_letting_in_costs_the_same_however_many_wait(num_clients: int):
    """With 10,000 waiting requests of any number of clients, one is let in without looking at the others."""
    queue = FairQueue()
    for i in range(10_000):
        queue.add(Counting(str(i), [1], SamplingParams(), i, 0.0, client=str(i % num_clients)), 0.0)
    Counting.reads = 0
    for _ in range(100):
        queue.admit(queue.first(0.0), 0.0)
    assert Counting.reads < 100 * 20


def test_what_ended_does_not_pile_up():
    """Ten thousand clients that come and go leave nothing behind while one waits."""
    trace = Trace()
    trace.add("first")
    for i in range(10_000):
        request = Request(str(i), [1], SamplingParams(), i + 1, 0.0, client=str(i))
        trace.queue.add(request, 0.0)
        trace.end(request, num_outputs=1)
    queue = trace.queue
    assert len(queue._lines) == len(queue) == 1
    assert len(queue._by_share) + len(queue._by_due) < 200
    assert len(queue._remembered) <= 1024


def drain(seconds: int, per_second: int) -> QueueRate:
    """After `seconds` in which somebody always waited and `per_second` requests of 10 tokens were let in."""
    rate = QueueRate()
    rate.note(100.0, is_waiting=True)
    for second in range(1, seconds + 1):
        for _ in range(per_second):
            rate.admit(10)
        rate.note(100.0 + second, is_waiting=True)
    return rate


def test_a_steady_queue_is_predicted():
    """At 20 tokens a second, 100 tokens take 5 s."""
    assert drain(60, 2).seconds_for(100) == pytest.approx(5.0, rel=0.02)


def test_too_little_seen_predicts_nothing():
    """Before some requests were let in while others waited, nobody knows."""
    assert drain(60, 0).seconds_for(100) == drain(3, 2).seconds_for(100) == QueueRate().seconds_for(100) == 0.0


def test_idle_time_does_not_count():
    """A pause in which nobody waited does not make the queue look slow."""
    rate = drain(60, 2)
    rate.note(200.0, is_waiting=False)
    before = rate.seconds_for(100)
    rate.note(1200.0, is_waiting=False)
    assert rate.seconds_for(100) == before
