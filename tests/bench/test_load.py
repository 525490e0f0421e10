"""Open-loop load: what is sent when, and what is noted of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from hsrpc.bench.load import CANCELLED, OK, Arrival, Mix, make_arrivals, run_load
from hsrpc.bench.workload import Lengths
from hsrpc.client import NO_RETRIES, AsyncClient
from hsrpc.errors import QueueFullError
from hsrpc.server import Server, ServerConfig
from hsrpc.testing.fake_engine import WORDS, FakeEngine
from tests.server.conftest import until


def mix(**changes) -> Mix:
    settings = {"rate": 50.0, "duration": 40.0, "lengths": Lengths.SHAREGPT_LIKE, "prompt": 16, "output": 8}
    return Mix(**(settings | changes))


def arrival(**changes) -> Arrival:
    return Arrival(**({"at": 0.0, "prompt": [5, 6], "output_tokens": 4} | changes))


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[AsyncClient]:
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address, options=NO_RETRIES) as client:
        yield client
    await server.stop()


def test_arrivals_are_a_poisson_process():
    """The number is that of the rate, gaps vary as their mean does, and all are within the duration."""
    times = [arrival.at for arrival in make_arrivals(mix(), 1000, 64)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 1800 < len(times) < 2200
    assert 0.85 < deviation / mean < 1.15
    assert times == sorted(times)
    assert times[-1] < 40


def test_the_same_seed_gives_the_same_load():
    """Another seed gives another."""
    assert make_arrivals(mix(), 1000, 64, 3) == make_arrivals(mix(), 1000, 64, 3)
    assert make_arrivals(mix(), 1000, 64, 3) != make_arrivals(mix(), 1000, 64, 4)


def test_shares_and_lengths_are_kept():
    """So many cancel within their output, so many have a deadline, none is longer than the model takes."""
    made = make_arrivals(mix(cancel_share=0.3, deadline_share=0.1, deadline=0.5), 1000, 24)
    cancels = [item for item in made if item.cancel_after is not None]
    late = [item for item in made if item.timeout is not None]
    assert 0.25 < len(cancels) / len(made) < 0.35
    assert 0.07 < len(late) / len(made) < 0.13
    assert {item.timeout for item in late} == {0.5}
    assert all(item.cancel_after < item.output_tokens for item in cancels)
    assert max(len(item.prompt) + item.output_tokens for item in made) <= 24
    assert min(item.output_tokens for item in made) >= 1


async def test_every_end_has_its_status(client, engine):
    """A whole output, a cancelled one, a passed deadline and a refusal are told apart."""
    [whole] = await run_load(lambda: client, [arrival()])
    assert (whole.status, whole.tokens) == (OK, len(WORDS))
    [cancelled] = await run_load(lambda: client, [arrival(cancel_after=0)])
    assert cancelled.status == CANCELLED
    engine.refusal = QueueFullError("full")
    [refused] = await run_load(lambda: client, [arrival()])
    assert (refused.status, refused.first_token, refused.retry_after) == ("RESOURCE_EXHAUSTED", None, 1.0)
    engine.refusal, engine.held = None, True
    [late] = await run_load(lambda: client, [arrival(timeout=0.1)])
    assert late.status == "DEADLINE_EXCEEDED"


async def test_requests_do_not_wait_for_each_other(client, engine):
    """The second leaves while the first has no answer yet: the load is open."""
    engine.held = True
    ended = []
    load = asyncio.create_task(run_load(lambda: client, [arrival(), arrival(at=0.05)], ended.append))
    await until(lambda: len(engine.live) == 2)
    assert ended == []
    for request_id in list(engine.live):
        engine.end(request_id)
    assert [outcome.status for outcome in await load] == [OK, OK]
    assert len(ended) == 2


async def test_a_late_start_is_part_of_the_latency(client):
    """Times count from when a request was due: a sender that is held up does not flatter the server."""

    def slow() -> AsyncClient:
        time.sleep(0.2)
        return client

    first, second = await run_load(slow, [arrival(), arrival()])
    assert (first.scheduled, second.scheduled) == (0.0, 0.0)
    assert second.first_token - second.scheduled >= 0.4
