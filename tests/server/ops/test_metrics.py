"""The metrics: what docs/metrics.md says is what a scrape gives, and the numbers are those of the calls."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from hsrpc.errors import ConfigError
from hsrpc.plan.roofline import StepRecord
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import PoolId
from hsrpc.server import Server, ServerConfig
from hsrpc.server.observation import METHODS
from hsrpc.server.ops.exposition import exposed
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2 as v1
from tests.server.conftest import until

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
STEP = StepRecord(
    seconds=0.25,
    num_requests=1,
    decode_tokens=1,
    prefill_tokens=0,
    context_tokens=10,
    weight_bytes=10**9,
    cache_bytes=0,
    regenerated_tokens=0,
)


@pytest.fixture
async def telemetry() -> AsyncIterator[Telemetry]:
    async with Telemetry(ServerConfig(port=0, metrics_port=0)) as telemetry:
        yield telemetry


@pytest.fixture
async def loading_server(telemetry: Telemetry) -> AsyncIterator[Server]:
    config = ServerConfig(port=0, drain_timeout=5, write_timeout=0.5)
    server = Server(config, observers=telemetry.observers, count_call=telemetry.count_call)
    await server.start()
    yield server
    await server.stop()


async def get(port: int | None, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, str]:
    """Head and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head, body


async def scrape(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Value by name and label values of every sample."""
    _, body = await get(telemetry.port)
    samples = [sample for family in text_string_to_metric_families(body) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


async def test_the_engine_is_read_at_each_scrape(telemetry, engine):
    """Gauges and counters are those of the engine's stats and plan; blocks by kind and tier; the aliases agree."""
    telemetry.attach(engine)
    values = await scrape(telemetry)
    assert values["hsrpc_requests_queued",] == values["vllm:num_requests_waiting",] == 1
    assert values["hsrpc_requests_running", "0"] == values["vllm:num_requests_running",] == 0
    assert values["hsrpc_cache_blocks_used", "0", "kv", "host"] == 3
    assert values["hsrpc_cache_blocks_used", "0", "activation", "device"] == 0
    total = sum(value for key, value in values.items() if key[0] == "hsrpc_cache_blocks")
    assert total == sum(engine.plan.num_blocks.values()) > 0
    assert values["vllm:kv_cache_usage_perc",] == 3 / total
    assert values["hsrpc_bus_bytes_total", "0", "weights"] == 1000
    assert values["hsrpc_bus_bytes_total", "0", "cache"] == 500
    assert values["hsrpc_generated_tokens_total",] == 20
    assert values["hsrpc_activation_share_ratio",] == 0.5
    assert values["hsrpc_device_memory_bytes", "0"] == sum(engine.plan.device_bytes.values())


async def test_what_is_one_gpus_has_its_number(telemetry):
    """All else is of all together, as with one GPU: what pickers and autoscalers read has no such label."""
    engine = FakeEngine(held=True, num_gpus=2)
    for number in range(3):
        await engine.submit("Hi", SamplingParams(), request_id=str(number))
    telemetry.attach(engine)
    values, blocks = await scrape(telemetry), engine.plan.num_blocks
    for gpu, running in (("0", 2), ("1", 1)):
        assert values["hsrpc_requests_running", gpu] == running
        assert values["hsrpc_cache_blocks_used", gpu, "kv", "host"] == 3
        assert values["hsrpc_cache_blocks", gpu, "kv", "host"] == blocks[PoolId.HOST_KV]
        assert values["hsrpc_bus_bytes_total", gpu, "weights"] == 1000
        assert values["hsrpc_bus_measured_bytes_per_second", gpu] == 5e10
        assert values["hsrpc_gpu_busy_seconds_total", gpu] == 1.5
        assert values["hsrpc_host_memory_bytes", gpu] == sum(engine.plan.host_bytes.values())
        assert values["hsrpc_gpu_info", gpu, "none", ""] == 1
    assert values["vllm:num_requests_running",] == 3
    assert values["vllm:kv_cache_usage_perc",] == 6 / (2 * sum(blocks.values()))


async def test_calls_are_counted_as_they_end(telemetry, stub, engine):
    """Finishes by reason, calls by status, latencies of each finished request."""
    assert [_ async for _ in stub.Generate(v1.GenerateRequest(text="Hi"))]
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(v1.GenerateRequest()).read()
    values = await scrape(telemetry)
    assert values["hsrpc_calls_total", "Generate", "OK"] == 1
    assert values["hsrpc_calls_total", "Generate", "INVALID_ARGUMENT"] == 1
    assert values["hsrpc_calls_total", "Generate", "INTERNAL"] == 0
    assert values["hsrpc_requests_finished_total", "EOS"] == 1
    assert values["hsrpc_time_to_first_token_seconds_count",] == 1
    assert values["hsrpc_request_duration_seconds_count",] == 1
    assert values["hsrpc_request_queue_time_seconds_sum",] == 0.5


async def test_every_method_is_counted_by_its_status(telemetry, server, channel):
    """Each method of each service, well and not; health and reflection are not counted."""
    names = {"Generation": ("Generate", "Abort"), "Model": ("GetModel", "Tokenize", "Detokenize")}
    names |= {"Server": ("GetServerInfo", "WatchLoad")}
    for service, methods in names.items():
        for method in methods:
            call = channel.unary_unary(f"/hsrpc.v1.{service}Service/{method}")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"\xff")
    model = channel.unary_unary("/hsrpc.v1.ModelService/GetModel")
    assert await model(b"")
    watch = channel.unary_stream("/hsrpc.v1.ServerService/WatchLoad")(b"")
    assert await watch.read()
    watch.cancel()
    await until(lambda: calls_that_ended(telemetry, "CANCELLED", "WatchLoad"))
    counted = {key[1:]: value for key, value in (await scrape(telemetry)).items() if key[0] == "hsrpc_calls_total"}
    expected = {(method, "INVALID_ARGUMENT"): 1 for methods in names.values() for method in methods}
    expected |= {("GetModel", "OK"): 1, ("WatchLoad", "CANCELLED"): 1}
    assert {key: value for key, value in counted.items() if value} == expected
    assert len(counted) == (len(METHODS) + 1) * len(grpc.StatusCode)


async def test_refusals_for_want_of_a_token_are_counted(telemetry, tmp_path):
    """By method; one that does not exist goes under `other`, whatever its name is."""
    tokens = tmp_path / "tokens"
    tokens.write_text("alice 0123456789abcdef\n")
    tokens.chmod(0o600)
    server = Server(ServerConfig(port=0, security=SecurityConfig(auth_tokens=tokens)), count_call=telemetry.count_call)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        for name in ("hsrpc.v1.ModelService/GetModel", "strange.Service/Method"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{name}")(b"")
    await server.stop()
    counted = {key[1:]: value for key, value in (await scrape(telemetry)).items() if key[0] == "hsrpc_calls_total"}
    refused = {("GetModel", "UNAUTHENTICATED"): 1, ("other", "UNAUTHENTICATED"): 1}
    assert {key: value for key, value in counted.items() if value} == refused


async def test_metrics_are_on_the_loopback_unless_told_otherwise(monkeypatch):
    """They are in plain text: an address for the service is none for them."""
    bound, start = [], asyncio.start_server

    async def start_server(handle, host, port, **settings):
        bound.append(host)
        return await start(handle, "127.0.0.1", port, **settings)

    monkeypatch.setattr(asyncio, "start_server", start_server)
    public = ServerConfig(host="0.0.0.0", port=0, metrics_port=0, security=SecurityConfig(insecure=True))
    for config in (public, replace(public, metrics_host="10.0.0.7")):
        async with Telemetry(config):
            pass
    assert bound == ["127.0.0.1", "10.0.0.7"]


async def test_time_between_tokens(telemetry, stub, engine):
    """Each portion after the first counts once, with the mean of its tokens."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    for words in (["One"], ["two", "three"], ["four"]):
        engine.say("r", *words)
        assert (await call.read()).delta.text
    engine.end("r", FinishReason.MAX_TOKENS)
    assert (await call.read()).finish.reason == v1.FINISH_REASON_MAX_TOKENS
    assert await call.code() is grpc.StatusCode.OK
    values = await scrape(telemetry)
    assert values["hsrpc_inter_token_seconds_count",] == 2


async def test_cancels_and_deadlines_are_told_apart(telemetry, server, stub, engine):
    """A cancelled call is CANCELLED, one whose deadline passed DEADLINE_EXCEEDED."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    call.cancel()
    await until(lambda: not engine.live)
    await until(lambda: calls_that_ended(telemetry, "CANCELLED") == 1)
    for _ in range(5):  # a cancel that was long under way looks like one before the deadline
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(v1.GenerateRequest(text="Hi"), timeout=0.2).read()
        await until(lambda: not server.state.live)
        if calls_that_ended(telemetry, "DEADLINE_EXCEEDED"):
            break
    else:
        pytest.fail("no passed deadline was counted as one")


async def test_a_reload_that_fails_is_counted(telemetry, tmp_path):
    """Changed files that cannot be used are seen without the log."""
    tokens = tmp_path / "tokens"
    tokens.write_text("alice alice-alice-alice-1\n")
    tokens.chmod(0o600)
    config = ServerConfig(port=0, security=SecurityConfig(auth_tokens=tokens))
    server = Server(config, count_failed_reload=telemetry.count_failed_reload)
    assert (await scrape(telemetry))["hsrpc_failed_reloads_total",] == 0
    tokens.write_text("")
    server.reload()
    assert (await scrape(telemetry))["hsrpc_failed_reloads_total",] == 1


def calls_that_ended(telemetry: Telemetry, code: str, method: str = "Generate") -> float | None:
    return telemetry.registry.get_sample_value("hsrpc_calls_total", {"method": method, "status": code})


async def test_slow_readers_are_counted(telemetry, stub, engine):
    """A stream that its client leaves unread ends, and is counted."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    ends = time.monotonic() + 10
    while engine.live and time.monotonic() < ends:
        engine.say("r", "x" * 1_000_000)
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    values = await scrape(telemetry)
    assert values["hsrpc_slow_readers_total",] == values["hsrpc_calls_total", "Generate", "RESOURCE_EXHAUSTED"] == 1
    call.cancel()


async def test_steps_are_compared_with_their_limit(telemetry, engine):
    """A step's time stands over what the measured rates allow for what it moved: 1 GB at 50 GB/s is 20 ms."""
    telemetry.attach(engine)
    telemetry.observe_step(STEP)
    values = await scrape(telemetry)
    assert values["hsrpc_step_duration_seconds_sum",] == 0.25
    assert values["hsrpc_bus_bytes_per_second",] == 4e9
    assert values["hsrpc_step_time_over_predicted_ratio_sum",] == pytest.approx(12.5)


async def test_the_limit_of_several_gpus_is_that_of_their_buses(telemetry, engine):
    """Each moves its part of the 1 GB."""
    telemetry.attach(engine)
    telemetry.observe_step(replace(STEP, num_gpus=2))
    values = await scrape(telemetry)
    assert values["hsrpc_bus_bytes_per_second",] == 4e9
    assert values["hsrpc_step_time_over_predicted_ratio_sum",] == pytest.approx(25)


async def test_loop_lag_is_sampled(telemetry):
    """A callback that blocks the loop shows as lag."""
    await asyncio.sleep(0.12)
    time.sleep(0.2)  # noqa: ASYNC251  # the lag to be seen
    await asyncio.sleep(0.12)
    values = await scrape(telemetry)
    assert values["hsrpc_event_loop_lag_seconds_count",] >= 3
    assert values["hsrpc_event_loop_lag_seconds_sum",] > 0.1


async def test_a_scrape_is_made_off_the_loop(telemetry, engine, monkeypatch):
    """The event loop does not wait for hundreds of series to be written."""
    telemetry.attach(engine)
    threads, stats = [], engine.stats
    monkeypatch.setattr(engine, "stats", lambda: threads.append(threading.current_thread()) or stats())
    await scrape(telemetry)
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", "404"),
        ("POST /metrics HTTP/1.1", "405"),
        ("nonsense", "404"),
        ("GET /metrics HTTP/1.0", "200"),
    ],
)
async def test_other_requests_are_refused(telemetry, request_line, status):
    """Only GET /metrics is answered."""
    head, _ = await get(telemetry.port, f"{request_line}\r\n\r\n")
    assert head.split()[1] == status


async def test_sockets_that_say_nothing_give_way(telemetry):
    """A scrape beside fifty of them is answered; the oldest of them are closed."""
    silent = [await asyncio.open_connection("127.0.0.1", telemetry.port) for _ in range(50)]
    async with asyncio.timeout(2):
        assert ("hsrpc_calls_total", "Generate", "OK") in await scrape(telemetry)
        assert await silent[0][0].read() == b""
    for _, writer in silent:
        writer.close()


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch):
    """In the time of a request the connection is gone, whatever of its answer is left to send."""
    monkeypatch.setattr("hsrpc.server.ops.exposition._SECONDS", 1.0)  # a busy machine takes a part of it to encode
    registry = CollectorRegistry()
    Gauge("made_up", "x" * 16 * 2**20, registry=registry)
    async with exposed(registry, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1.2)
        received = 0
        with suppress(ConnectionResetError):
            while data := await reader.read(2**20):
                received += len(data)
        assert received < 16 * 2**20
        writer.close()


async def test_a_taken_port_is_named():
    """A metrics port in use is a ConfigError before anything is loaded."""
    async with Telemetry(ServerConfig(port=0, metrics_port=0)) as first:
        with pytest.raises(ConfigError, match=r"^metrics_port="):
            await Telemetry(ServerConfig(port=0, metrics_port=first.port)).__aenter__()


async def test_without_an_engine_there_is_a_scrape(telemetry):
    """While the model loads, calls are counted already and the engine's series are absent."""
    values = await scrape(telemetry)
    assert ("hsrpc_calls_total", "Generate", "UNAVAILABLE") in values
    assert ("hsrpc_requests_queued",) not in values


async def test_the_document_lists_what_is_exposed(telemetry, engine):
    """docs/metrics.md has every metric with its type and labels, and no other."""
    telemetry.attach(engine)
    _, body = await get(telemetry.port)
    exposed = {}
    for family in text_string_to_metric_families(body):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        if not name.endswith("_created"):
            exposed[name] = (family.type, labels)
    rows = [line.split("|")[1:4] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {name.strip(" `"): (kind.strip(), set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == exposed
