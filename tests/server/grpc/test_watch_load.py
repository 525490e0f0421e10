"""WatchLoad: at once, then at every interval, until the server drains."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from hsrpc.client import AsyncClient
from hsrpc.request import SamplingParams
from hsrpc.v1 import server_pb2
from tests.server.conftest import until


@pytest.fixture
async def client(server):
    async with AsyncClient(server.address) as client:
        yield client


async def test_reports_come_at_once_and_at_every_interval(client, engine):
    """The first does not wait; the later ones show what has changed."""
    started, reports = time.monotonic(), client.watch_load(0.2)
    first = await anext(reports)
    assert time.monotonic() - started < 0.2 + 1
    engine.held = True
    await engine.submit("Hi", SamplingParams(), request_id="r")
    second = await anext(reports)
    assert (first.load.running_requests, second.load.running_requests) == (0, 1)
    assert second.uptime.ToNanoseconds() - first.uptime.ToNanoseconds() >= 190_000_000
    assert second.measured.generated_tokens == 20
    assert len(second.load.blocks) == 4
    await reports.aclose()


async def test_the_stream_ends_with_the_drain(client, server):
    """Watchers hear of the drain at once, keep nobody from ending, and are UNAVAILABLE afterwards."""
    reports = client.watch_load(60)
    await anext(reports)
    draining = asyncio.create_task(server.drain())
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(reports), 5)
    await asyncio.wait_for(draining, 5)


@pytest.mark.parametrize("interval", [0, 0.05, -1, 4000])
async def test_an_interval_out_of_range_is_refused(server, channel, interval):
    """Less than 100 ms would cost more than it tells."""
    message = server_pb2.WatchLoadRequest()
    message.interval.FromMilliseconds(round(interval * 1000))
    call = channel.unary_stream("/hsrpc.v1.ServerService/WatchLoad")(message.SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError, match="interval") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_default_is_a_second(server, channel):
    """An absent interval is one second, not zero."""
    call = channel.unary_stream("/hsrpc.v1.ServerService/WatchLoad")(b"")
    first = server_pb2.WatchLoadResponse.FromString(await call.read())
    second = server_pb2.WatchLoadResponse.FromString(await call.read())
    assert second.uptime.ToNanoseconds() - first.uptime.ToNanoseconds() > 900_000_000
    call.cancel()


async def test_a_watcher_that_leaves_leaves_nothing(client, server):
    """Closing the iterator ends the server's side too."""
    before = len(asyncio.all_tasks())
    reports = client.watch_load(0.1)
    await anext(reports)
    await reports.aclose()
    await until(lambda: len(asyncio.all_tasks()) <= before)
