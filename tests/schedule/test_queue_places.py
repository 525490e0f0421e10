"""Who gives way in a full queue: checked against a plain model, and what it costs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.request import SamplingParams
from hsrpc.schedule.fair_queue import aged
from hsrpc.schedule.queue_places import QueuePlaces
from hsrpc.schedule.request_state import Request
from tests.schedule.support import Counting

LINES = [(client, user) for client in "abc" for user in "xy"]


def request(number: int, client: str, user: str = "", tokens: int = 1, priority: int = 0) -> Request:
    params = SamplingParams(priority=priority)
    return Request(str(number), [1] * tokens, params, number, float(number), client=client, user=user)


def giving_way(held: list[Request], measure: str, client: str, user: str, amount: int) -> list[Request]:
    """The lines of which the last may give way; empty where none does."""
    size = (lambda r: 1) if measure == "requests" else (lambda r: r.num_prompt_tokens)
    clients, lines = Counter(), Counter()
    for waiter in held:
        clients[waiter.client] += size(waiter)
        lines[waiter.client, waiter.user] += size(waiter)
    longest = max(clients.values(), default=0)
    if longest > clients[client] + amount:
        chosen = {name for name, length in clients.items() if length == longest}
        longest_of = {name: max(lines[line] for line in lines if line[0] == name) for name in chosen}
        found = [line for line in lines if line[0] in chosen and lines[line] == longest_of[line[0]]]
    else:
        own = {line: length for line, length in lines.items() if line[0] == client}
        longest = max(own.values(), default=0)
        found = [line for line, length in own.items() if length == longest > lines[client, user] + amount]
    return [
        max((r for r in held if (r.client, r.user) == line), key=lambda r: (aged(r.params, r.arrival_time), r.arrival))
        for line in found
    ]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.sampled_from(LINES), st.integers(1, 9), st.integers(-1, 1)),
        st.tuples(st.just("release"), st.integers(0, 99)),
        st.tuples(st.sampled_from(("requests", "tokens")), st.sampled_from(LINES), st.integers(1, 9)),
    ),
    max_size=120,
)


@given(operations=OPERATIONS)
@settings(max_examples=150)
def test_the_longest_line_gives_way(operations: list[tuple]):
    """Whatever was held and released: the last of the longest client's longest line, or of its own client's."""
    places, held = QueuePlaces(), []
    for number, (name, *values) in enumerate(operations):
        if name == "hold":
            held.append(request(number, *values[0], *values[1:]))
            places.hold(held[-1])
        elif name == "release" and held:
            gone = held.pop(values[0] % len(held))
            places.release(gone)
            places.release(gone)
        elif name != "release":
            (client, user), amount = values
            amount = 1 if name == "requests" else amount
            chosen = places.giving_way(getattr(places, name), client, user, amount)
            expected = giving_way(held, name, client, user, amount)
            assert chosen in expected if expected else chosen is None
        assert (places.requests.total, places.tokens.total) == (len(held), sum(r.num_prompt_tokens for r in held))


def test_what_was_released_does_not_pile_up():
    """Ten thousand that come and go beside one that stays leave nothing behind."""
    places = QueuePlaces()
    places.hold(request(0, "a", "x"))
    for number in range(1, 10_000):
        waiter = request(number, "a", "x" if number % 2 else str(number))
        places.hold(waiter)
        places.release(waiter)
    line = places._lines["a", "x"]
    assert (len(line.held), len(places._lines)) == (1, 1)
    heaps = [line._heap, places.requests._clients._heap, places.requests._users["a"]._heap]
    assert all(len(heap) < 100 for heap in heaps)
    assert len(places.requests._users) == 1


@pytest.mark.parametrize("num_clients", [1, 100, 5_000])
def test_giving_way_costs_the_same_however_many_wait(num_clients: int):
    """With 10,000 places of any number of clients, one gives way without a look at the others."""
    places = QueuePlaces()
    for i in range(10_000):
        places.hold(Counting(str(i), [1], SamplingParams(), i, 0.0, client=str(i % num_clients)))
    Counting.reads = 0
    for _ in range(100):
        waiter = places.giving_way(places.requests, "new", "", 0)
        assert waiter is not None
        places.release(waiter)
    assert Counting.reads < 100 * 20
