"""ServerService: version, plan, what was measured, and the load."""

from __future__ import annotations

from collections.abc import Mapping

from hsrpc import __version__
from hsrpc.errors import InvalidRequestError
from hsrpc.plan.plan import Plan
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.server.engine_protocol import Engine, GpuStats, Stats
from hsrpc.server.grpc.handlers import Write
from hsrpc.server.grpc.messages import duration, read_seconds
from hsrpc.server.service import Service
from hsrpc.v1 import server_pb2 as v1

_DEFAULT_INTERVAL = 1.0
_MIN_INTERVAL = 0.1
_MAX_INTERVAL = 3600.0
"""Seconds between reports of the load."""
_KINDS = {BlockKind.KV: v1.BLOCK_KIND_KV, BlockKind.ACTIVATION: v1.BLOCK_KIND_ACTIVATION}
_TIERS = {Tier.DEVICE: v1.BLOCK_TIER_DEVICE, Tier.HOST: v1.BLOCK_TIER_HOST}


class ServerService:
    """Methods of hsrpc.v1.ServerService."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get_server_info(self, _: v1.GetServerInfoRequest) -> v1.GetServerInfoResponse:
        engine = self._service.engine()
        stats = engine.stats()
        return v1.GetServerInfoResponse(
            version=__version__,
            model=self._service.model_names(engine)[0],
            device=engine.device,
            uptime=duration(self._service.uptime),
            plan=_plan_message(engine.plan),
            measured=_measured_message(stats),
            load=_load_message(engine.plan, stats),
            gpus=_gpu_messages(engine),
        )

    async def watch_load(self, request: v1.WatchLoadRequest, write: Write[v1.WatchLoadResponse]) -> None:
        """Report at once and at every interval until the server goes down."""
        interval = _interval(request)
        while True:
            engine = self._service.engine()
            await write(self._report(engine))
            if await self._service.state.leaving(interval):
                return

    def _report(self, engine: Engine) -> v1.WatchLoadResponse:
        stats = engine.stats()
        return v1.WatchLoadResponse(
            load=_load_message(engine.plan, stats),
            measured=_measured_message(stats),
            uptime=duration(self._service.uptime),
        )


def _interval(request: v1.WatchLoadRequest) -> float:
    """Seconds between reports."""
    if not request.HasField("interval"):
        return _DEFAULT_INTERVAL
    seconds = read_seconds(request.interval, "interval")
    if not _MIN_INTERVAL <= seconds <= _MAX_INTERVAL:
        raise InvalidRequestError("interval", f"{seconds} s is outside [{_MIN_INTERVAL}, {_MAX_INTERVAL}]")
    return seconds


def _plan_message(plan: Plan) -> v1.Plan:
    return v1.Plan(
        device_memory_bytes=plan.budgets.device,
        host_memory_bytes=plan.num_gpus * plan.budgets.host,
        resident_share=plan.resident_share,
        activation_share=plan.activation_share,
        max_batch=plan.num_gpus * plan.max_batch,
        expected_context=plan.prediction.context,
        predicted_step_time=duration(plan.prediction.step),
        predicted_tokens_per_second=plan.num_gpus * plan.prediction.tokens_per_second,
        cache_policy=plan.policy,
        cache_decision=plan.reason,
    )


def _measured_message(stats: Stats) -> v1.Measured:
    message = v1.Measured(
        generated_tokens=stats.generated_tokens,
        prompt_tokens=stats.prompt_tokens,
        weights_streamed_bytes=stats.weights_streamed_bytes,
        cache_loaded_bytes=stats.cache_loaded_bytes,
        regenerated_tokens=stats.regenerated_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        cached_tokens=stats.cached_tokens,
        drafted_tokens=stats.drafted_tokens,
        accepted_tokens=stats.accepted_tokens,
        preemptions=stats.preemptions,
        peak_device_bytes=stats.peak_device_bytes,
        gpus=[
            v1.GpuMeasured(
                gpu=number,
                weights_streamed_bytes=gpu.weights_streamed_bytes,
                cache_loaded_bytes=gpu.cache_loaded_bytes,
                regenerated_tokens=gpu.regenerated_tokens,
                peak_device_bytes=gpu.peak_device_bytes,
                busy_time=duration(gpu.busy_seconds),
            )
            for number, gpu in enumerate(stats.gpus)
        ],
    )
    if stats.steps and stats.step_seconds > 0:
        message.step_time.CopyFrom(duration(stats.step_seconds / stats.steps))
        message.tokens_per_second = stats.generated_tokens / stats.step_seconds
    return message


def _load_message(plan: Plan, stats: Stats) -> v1.Load:
    return v1.Load(
        queued_requests=stats.queued,
        running_requests=stats.running,
        blocks=_block_messages(stats, {pool: plan.num_gpus * count for pool, count in plan.num_blocks.items()}),
        gpus=[
            v1.GpuLoad(
                gpu=number,
                running_requests=gpu.running,
                blocks=_block_messages(gpu, plan.num_blocks),
                device_bytes=gpu.device_bytes,
            )
            for number, gpu in enumerate(stats.gpus)
        ],
    )


def _block_messages(stats: Stats | GpuStats, totals: Mapping[PoolId, int]) -> list[v1.BlockUse]:
    return [
        v1.BlockUse(
            kind=_KINDS[pool.kind],
            tier=_TIERS[pool.tier],
            used=stats.used_blocks[pool],
            total=totals.get(pool, 0),
            peak=stats.peak_blocks[pool],
            kept=stats.kept_blocks[pool],
        )
        for pool in PoolId
    ]


def _gpu_messages(engine: Engine) -> list[v1.Gpu]:
    budgets = engine.plan.budgets
    return [
        v1.Gpu(
            gpu=number,
            name=gpu.machine.name,
            uuid=gpu.uuid,
            device_memory_bytes=budgets.device,
            host_memory_bytes=budgets.host,
            load_bytes_per_second=gpu.machine.hardware.load_bandwidth,
            store_bytes_per_second=gpu.machine.hardware.store_bandwidth,
            memory_bytes_per_second=gpu.machine.hardware.memory_bandwidth,
            flops_per_second=gpu.machine.hardware.gemm_rate,
        )
        for number, gpu in enumerate(engine.gpus)
    ]
