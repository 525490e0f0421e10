"""GET /metrics of a server with a real engine after real requests: nothing that operators need is missing or idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import torch

from hsrpc.client import AsyncClient, CallError
from hsrpc.engine.engine import Engine
from hsrpc.engine.stats import EngineStats
from hsrpc.plan.plan import Plan
from hsrpc.server import Server, ServerConfig
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.v1 import generation_pb2_grpc
from tests.engine.support import until
from tests.server.grpc.test_vanishing import NARROW
from tests.server.ops.test_metrics import scrape
from tests.server.test_leaving import Gate, message
from tests.server.test_real_engine import CONFIG

TIGHT = replace(CONFIG, host_memory="20MiB", expected_context=64)
"""Weights and caches stream, half of the tokens are activations, and blocks run out."""
KINDS = [(kind, tier) for kind in ("kv", "activation") for tier in ("device", "host")]


@asynccontextmanager
async def observed_server() -> AsyncIterator[tuple[Server, Engine, Telemetry]]:
    torch.set_num_threads(1)
    config = ServerConfig(port=0, metrics_port=0, write_timeout=0.3)
    async with Telemetry(config) as telemetry, Engine(TIGHT, observe=telemetry.observe_step) as engine:
        server = Server(config, observers=telemetry.observers, count_call=telemetry.count_call)
        await server.start()
        telemetry.attach(engine)
        await server.attach(engine)
        try:
            yield server, engine, telemetry
        finally:
            await server.stop()


async def stall(server: Server, telemetry: Telemetry) -> None:
    """A stream that nobody reads, until the server has given it up."""
    async with grpc.aio.insecure_channel(server.address, options=NARROW) as channel:
        unread = message([5, 6, 7], 240)
        unread.output.max_tokens_per_message = 1
        unread.output.logprobs = 20
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(unread)
        await until(lambda: telemetry.registry.get_sample_value("hsrpc_slow_readers_total"))
        call.cancel()


async def test_every_metric_tells_of_real_requests():
    """While requests run and wait: load and blocks. After them: what was moved, rebuilt and preempted, and the ends."""
    async with observed_server() as (server, engine, telemetry), AsyncClient(server.address) as client:
        gate = Gate(engine)
        gate.close_when(lambda: engine.stats().running >= 4)
        calls = [client.complete([5 + number] * 40, max_tokens=200, ignore_eos=True) for number in range(6)]
        running = [asyncio.create_task(call) for call in calls]
        await gate.closed.wait()
        await until(lambda: engine.stats().running + engine.stats().queued == 6)
        check_load(await scrape(telemetry), engine.stats(), engine.plan)
        gate.open()
        await asyncio.gather(*running)
        with pytest.raises(CallError, match="INVALID_ARGUMENT"):
            await client.complete("Hi", top_p=7.0)
        await stall(server, telemetry)
        check_work(await scrape(telemetry))


def check_load(values: dict[tuple[str, ...], float], stats: EngineStats, plan: Plan) -> None:
    assert values["hsrpc_requests_running", "0"] == values["vllm:num_requests_running",] == stats.running > 0
    assert values["hsrpc_requests_queued",] == values["vllm:num_requests_waiting",] == stats.queued > 0
    used = {names: values["hsrpc_cache_blocks_used", "0", *names] for names in KINDS}
    total = {names: values["hsrpc_cache_blocks", "0", *names] for names in KINDS}
    assert min(used["kv", "host"], used["activation", "host"]) > 0
    assert sum(total.values()) == sum(plan.num_blocks.values())
    assert values["vllm:kv_cache_usage_perc",] == pytest.approx(sum(used.values()) / sum(total.values()))
    assert values["hsrpc_activation_share_ratio",] == 0.5
    assert 0 < values["hsrpc_device_memory_bytes", "0"] <= 18 * 2**20
    assert 0 < values["hsrpc_host_memory_bytes", "0"] <= 20 * 2**20
    assert values["hsrpc_device_memory_peak_bytes", "0"] == 0  # the CPU has no allocator that counts


def check_work(values: dict[tuple[str, ...], float]) -> None:
    grown = [("hsrpc_bus_bytes_total", "0", what) for what in ("weights", "cache")]
    grown += [(f"hsrpc_{name}",) for name in ("bus_bytes_per_second", "regenerated_tokens_total", "preemptions_total")]
    grown.append(("hsrpc_gpu_busy_seconds_total", "0"))
    grown += [(f"hsrpc_event_loop_lag_seconds_{part}",) for part in ("count", "sum")]
    grown += [(f"hsrpc_{name}_sum",) for name in ("step_duration_seconds", "step_time_over_predicted_ratio")]
    grown += [(f"hsrpc_{name}_seconds_sum",) for name in ("request_queue_time", "inter_token")]
    assert [name for name in grown if not values[name] > 0] == []
    assert values["hsrpc_prompt_tokens_total",] == 6 * 40 + 3
    assert values["hsrpc_generated_tokens_total",] > 6 * 200
    assert values["hsrpc_time_to_first_token_seconds_count",] == 7
    assert values["hsrpc_request_duration_seconds_count",] == 6
    assert values["hsrpc_requests_finished_total", "MAX_TOKENS"] == values["hsrpc_calls_total", "Generate", "OK"] == 6
    assert values["hsrpc_calls_total", "Generate", "INVALID_ARGUMENT"] == 1
    assert values["hsrpc_slow_readers_total",] == values["hsrpc_calls_total", "Generate", "RESOURCE_EXHAUSTED"] == 1
