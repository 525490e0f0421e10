"""ServerService: version, plan, what was measured, and the load."""

from __future__ import annotations

from hsrpc import __version__
from hsrpc.errors import InvalidRequestError
from hsrpc.plan.plan import Plan
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.server.engine_protocol import Engine, Stats
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
            load=_load_message(engine, stats),
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
            load=_load_message(engine, stats),
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
        host_memory_bytes=plan.budgets.host,
        resident_share=plan.resident_share,
        activation_share=plan.activation_share,
        max_batch=plan.num_gpus * plan.max_batch,
        expected_context=plan.prediction.context,
        predicted_step_time=duration(plan.prediction.step),
        predicted_tokens_per_second=plan.prediction.tokens_per_second,
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
    )
    if stats.steps and stats.step_seconds > 0:
        message.step_time.CopyFrom(duration(stats.step_seconds / stats.steps))
        message.tokens_per_second = stats.generated_tokens / stats.step_seconds
    return message


def _load_message(engine: Engine, stats: Stats) -> v1.Load:
    blocks = [
        v1.BlockUse(
            kind=_KINDS[pool.kind],
            tier=_TIERS[pool.tier],
            used=stats.used_blocks.get(pool, 0),
            total=engine.plan.num_blocks.get(pool, 0),
            peak=stats.peak_blocks.get(pool, 0),
        )
        for pool in PoolId
    ]
    return v1.Load(queued_requests=stats.queued, running_requests=stats.running, blocks=blocks)
