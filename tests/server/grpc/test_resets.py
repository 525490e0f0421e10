"""Calls that are reset before they are answered, in floods and as honest clients have them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import ExitStack, suppress

import grpc
import pytest
from prometheus_client import CollectorRegistry

from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc import resets
from hsrpc.server.grpc.connections import ConnectionCuts
from hsrpc.server.grpc.resets import MAX_REFUSALS, MAX_RESETS, MAX_RESETS_PER_ANSWER, RESET_WINDOW, ResetLimit
from hsrpc.server.observation import CutReason
from hsrpc.server.ops.metrics import ProcessMetrics
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.raw_http2 import connected
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tests.server.conftest import until
from tests.server.secured import plain, serving

GET_MODEL, GENERATE = "/hsrpc.v1.ModelService/GetModel", "/hsrpc.v1.GenerationService/Generate"
TOKEN = "0123456789abcdef"
FLOOD = 4000
"""Calls, which gRPC lets one connection have at once; it would cancel all beyond 3000 that wait."""


@pytest.mark.parametrize("method", [GET_MODEL, GENERATE, "/hsrpc.v1.ModelService/None"])
async def test_honest_calls_beside_a_flood_are_answered(tmp_path, engine, caplog, method):
    """A stranger's connection that resets all its calls is cut, counted and told; others wait, and are answered."""
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"alice {TOKEN}\n")
    registry = CollectorRegistry()
    config = ServerConfig(port=0, security=SecurityConfig(auth_tokens=tokens))
    server = Server(config, count_cut=ProcessMetrics(registry).count_cut)
    await server.start()
    await server.attach(engine)
    async with plain(server) as channel, connected(server.port) as stranger:
        await channel.channel_ready()
        await stranger.flood(method, FLOOD)
        call, metadata = model_pb2_grpc.ModelServiceStub(channel).GetModel, [("authorization", f"Bearer {TOKEN}")]
        calls = [call(model_pb2.GetModelRequest(), metadata=metadata) for _ in range(40)]
        assert Counter([await call.code() for call in calls]) == {grpc.StatusCode.OK: 40}
        await stranger.until_cut()
    assert registry.get_sample_value("hsrpc_connections_cut_total", {"reason": "resets"}) == 1
    [line] = [record for record in caplog.records if record.name.endswith("connections")]
    assert (line.levelno, line.getMessage()) == (
        logging.WARNING,
        f"connections cut: 1; the last is of 127.0.0.1, for {MAX_RESETS + 1} resets",
    )
    await server.stop()


async def test_calls_that_are_cancelled_amid_their_output_are_no_flood(engine):
    """A client that takes the first of each stream, and cancels, keeps its connection, as do its neighbours on it."""
    engine.held = True
    async with serving(engine) as server, plain(server) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stays = stub.Generate(v1.GenerateRequest(text="Hi", request_id="stays"))
        await until(lambda: "stays" in engine.live)
        for number in range(MAX_RESETS + 10):
            request_id = f"goes-{number}"
            call = stub.Generate(v1.GenerateRequest(text="Hi", request_id=request_id))
            await until(lambda name=request_id: name in engine.live)
            engine.say(request_id, "one")
            await call.read()
            call.cancel()
        engine.end("stays")
        assert [response.HasField("finish") async for response in stays] == [True]


class FakeContext:
    def __init__(self, peer: str = "ipv4:10.0.0.7:5") -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    async def write(self, message: object) -> None:
        """Takes it."""


class Cuts(ConnectionCuts):
    def __init__(self) -> None:
        self.made: list[tuple[str, CutReason, int]] = []

    def cut(self, peer: str, reason: CutReason, events: int) -> None:
        self.made.append((peer, reason, events))


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, in its only element."""
    time = [1000.0]
    monkeypatch.setattr(resets.time, "monotonic", lambda: time[0])
    return time


def reset(limit: ResetLimit, times: int = 1, context: FakeContext | None = None) -> None:
    for _ in range(times):
        with pytest.raises(asyncio.CancelledError), limit.watched(context or FakeContext()):
            raise asyncio.CancelledError


def test_a_connection_is_cut_once_it_has_more_resets_than_allowed(now):
    """Not before; each connection counts for itself."""
    limit = ResetLimit(cuts := Cuts())
    reset(limit, MAX_RESETS)
    reset(limit, MAX_RESETS, FakeContext("ipv4:10.0.0.7:6"))
    assert not cuts.made
    reset(limit)
    assert cuts.made == [("ipv4:10.0.0.7:5", CutReason.RESETS, MAX_RESETS + 1)]


def test_answers_make_up_for_resets(now):
    """A client that hedges, or a gateway some of whose users go, has calls that are answered."""
    limit = ResetLimit(cuts := Cuts())
    for _ in range(MAX_RESETS):
        with limit.watched(FakeContext()):
            """Answered."""
        reset(limit, MAX_RESETS_PER_ANSWER)
    assert not cuts.made
    reset(limit)
    assert cuts.made


def test_refusals_do_not_make_up_for_resets(now):
    """Whoever has no token cannot buy resets with calls that are refused."""
    limit = ResetLimit(cuts := Cuts())
    for _ in range(MAX_RESETS + 1):
        with pytest.raises(grpc.aio.AbortError), limit.watched(FakeContext()):
            raise grpc.aio.AbortError
        reset(limit)
    assert len(cuts.made) == 1


async def test_a_flood_of_calls_without_a_token_costs_the_connection(tmp_path, engine):
    """None of them is reset; its own reason is counted, and another's connection stays."""
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"alice {TOKEN}\n")
    counted: Counter[CutReason] = Counter()
    config = ServerConfig(port=0, security=SecurityConfig(auth_tokens=tokens))
    server = Server(config, count_cut=lambda reason: counted.update([reason]))
    await server.start()
    await server.attach(engine)
    async with connected(server.port) as honest, connected(server.port) as stranger:
        await honest.end_of(honest.call(GENERATE))
        for _ in range(MAX_REFUSALS + 1):
            stranger.call(GENERATE)
        await stranger.until_cut()
        await honest.end_of(honest.call(GENERATE))
    assert counted == {CutReason.REFUSALS: 1}
    await server.stop()


def test_answers_make_up_for_refusals(now):
    """A gateway some of whose users have no token any more keeps its connection."""
    limit = ResetLimit(cuts := Cuts())
    for _ in range(MAX_REFUSALS // MAX_RESETS_PER_ANSWER + 1):
        limit.answered("ipv4:10.0.0.7:5")
    for _ in range(MAX_REFUSALS):
        limit.refused("ipv4:10.0.0.7:5")
        limit.refused("ipv4:10.0.0.7:6")
    limit.refused("ipv4:10.0.0.7:5")
    assert not cuts.made
    limit.refused("ipv4:10.0.0.7:6")
    assert cuts.made == [("ipv4:10.0.0.7:6", CutReason.REFUSALS, MAX_REFUSALS + 1)]


async def test_output_is_an_answer(now):
    """A stream that has sent something may be cancelled."""
    limit = ResetLimit(cuts := Cuts())
    for _ in range(2 * MAX_RESETS):
        with suppress(asyncio.CancelledError), limit.watched(FakeContext()) as context:
            await context.write("token")
            raise asyncio.CancelledError
    assert not cuts.made


def test_who_has_waited_long_may_give_up(now):
    """Users who lose patience in a long queue are no flood."""
    limit = ResetLimit(cuts := Cuts())
    with suppress(asyncio.CancelledError), ExitStack() as calls:
        for _ in range(2 * MAX_RESETS):
            calls.enter_context(limit.watched(FakeContext()))
        now[0] += 1.0
        raise asyncio.CancelledError
    assert not cuts.made


def test_resets_are_forgotten(now):
    """Those of the window before count no more, and no connection's name stays."""
    limit = ResetLimit(cuts := Cuts())
    for _ in range(3):
        reset(limit, MAX_RESETS)
        now[0] += RESET_WINDOW
    assert not cuts.made


def test_lines_about_cuts_are_few(monkeypatch, caplog):
    """A thousand cuts in ten seconds are one line and a number in the next; all are counted."""
    monkeypatch.setattr("hsrpc.server.grpc.connections.cut", lambda peer: peer != "gone")
    counted: Counter[CutReason] = Counter()
    cuts = ConnectionCuts(lambda reason: counted.update([reason]))
    for peer in ["gone", *["ipv4:10.0.0.7:5"] * 1000]:
        cuts.cut(peer, CutReason.RESETS, 201)
    assert counted == {CutReason.RESETS: 1000}
    assert [record.getMessage() for record in caplog.records] == [
        "connections cut: 1; the last is of 10.0.0.7, for 201 resets"
    ]
