"""How many messages a stream is cut into."""

from __future__ import annotations

import asyncio
import heapq

import numpy as np
import pytest

from hsrpc.server import pacing
from hsrpc.server.pacing import Timetable, Turns
from hsrpc.v1 import generation_pb2 as v1
from tests.server.conftest import until


def test_streams_take_times_one_after_the_other():
    """Those that ask together are apart by their share of the bound, a lone one hardly waits, and none waits long."""
    now = 100.0
    for streams, apart in ((1, 0.001), (20, 0.001), (64, 0.05 / 64), (1000, 0.00005)):
        table = Timetable(lambda: now)
        delays = [table.delay(streams) for _ in range(streams)]
        assert delays == pytest.approx([apart * (place + 1) for place in range(streams)])
    assert [table.delay(1) for _ in range(100)] == pytest.approx([0.05] * 100)
    now += 1.0
    assert table.delay(1) == pytest.approx(0.001)


@pytest.mark.parametrize("streams", [16, 64, 256])
def test_messages_never_come_in_bunches(streams):
    """Streams that began together, on a loop whose timers are late by up to 2 ms, send evenly over time."""
    rng = np.random.default_rng(0)
    clock = 0.0
    table = Timetable(lambda: clock)
    due, sent = [(0.0, number) for number in range(streams)], []
    while clock < 2.0:
        at, number = heapq.heappop(due)
        clock = max(clock, at) + 0.00005  # what a message takes
        sent.append(clock)
        heapq.heappush(due, (clock + table.delay(streams) + 0.002 * rng.random(), number))
    counts, _ = np.histogram(sent, bins=np.arange(0.2, 2.0, 0.005))
    assert counts.max() <= 2 * counts.mean()
    assert counts.min() >= counts.mean() / 3


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output may wait for a minute."""
    monkeypatch.setattr(pacing, "_MAX_DELAY", 60.0)


async def test_tokens_of_few_streams_go_at_once(stub, engine, patient):
    """Each as it comes, though they could wait."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    for word in ("a", "b", "c"):
        engine.say("r", word)
        assert (await asyncio.wait_for(call.read(), 5)).delta.text == word
        await asyncio.sleep(0.2)
    engine.end("r")
    assert (await asyncio.wait_for(call.read(), 5)).HasField("finish")


async def test_a_busy_server_merges_without_being_asked(stub, engine, patient, monkeypatch):
    """Without a delay of the client's, tokens gather for a while; the first is sent at once, the finish ends it."""
    monkeypatch.setattr(pacing, "_MAX_MESSAGES_PER_SECOND", 0.01)
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    engine.say("r", "a")
    assert (await asyncio.wait_for(call.read(), 5)).delta.text == "a"
    for word in ("b", "c", "d"):
        engine.say("r", word)
        await asyncio.sleep(0.01)
    engine.end("r")
    last = await asyncio.wait_for(call.read(), 5)
    assert (last.delta.text, last.HasField("finish")) == ("bcd", True)


@pytest.mark.parametrize("asked", [None, 1_000_000])
async def test_a_message_is_never_too_large_for_a_client(asked, stub, engine):
    """What has gathered for a slow reader comes in messages of bounded size, whatever the client asked for; start has
    the bound in effect."""
    engine.held = True
    output = v1.Output(return_token_ids=True, max_tokens_per_message=asked)
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi", output=output))
    await until(lambda: engine.live)
    engine.say("r", *["x"] * 5000)
    engine.end("r")
    responses = [response async for response in call]
    sizes = [len(response.delta.token_ids) for response in responses]
    assert (sum(sizes), max(sizes)) == (5000, 1024)
    assert responses[0].start.output.max_tokens_per_message == 1024


async def test_writes_of_a_step_are_spread_over_iterations():
    """Where many are ready at once, so many pass in each iteration of the event loop, and in order."""
    turns, passed, seen = Turns(max_passes=3), [], []

    async def wait(number: int) -> None:
        await turns.wait()
        passed.append(number)

    waiting = [asyncio.create_task(wait(number)) for number in range(10)]
    while len(passed) < 10:
        before = len(passed)
        await asyncio.sleep(0)
        seen.append(len(passed) - before)
    assert passed == list(range(10))
    assert max(seen) <= 3
    await asyncio.gather(*waiting)
