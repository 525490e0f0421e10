"""Prometheus metrics: of the engine at each scrape, of steps and requests as they end; docs/metrics.md lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hsrpc.errors import EngineUnavailableError
from hsrpc.plan.plan import Plan
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.request import FinishReason
from hsrpc.schedule.blocks import PoolId
from hsrpc.server.engine_protocol import Engine, Stats
from hsrpc.server.failure import Outcome
from hsrpc.server.observation import METHODS, CutReason, ObservedCall

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_RATIO = (0.5, 0.8, 0.9, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
_GPU = "gpu"
"""Label of what is one GPU's: its number."""
_BUS = ("weights", "cache")
_BUS_SECONDS = 10.0
"""Step time after which a step has about a third of its weight in the bus's rate."""
_OTHER = "other"


class CallMetrics:
    """Finishes and times of Generate; an observer of its calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        reasons = Counter("hsrpc_requests_finished", "Requests that ended, by reason", ["reason"], registry=registry)
        # All series are there from the start: a rate needs the 0 before the first 1.
        self._reasons = {reason: reasons.labels(reason.value) for reason in FinishReason}
        self._stalled = Counter(
            "hsrpc_slow_readers", "Streams reset because the client left them unread", registry=registry
        )
        self._first_token = _seconds("hsrpc_time_to_first_token", "From the call's start to its first token", registry)
        self._inter_token = _seconds("hsrpc_inter_token", "Between tokens, mean of each portion sent", registry)
        self._end_to_end = _seconds("hsrpc_request_duration", "From a call's start to its end with a finish", registry)
        self._queue = _seconds("hsrpc_request_queue_time", "From arrival to first scheduled", registry)

    def started(self, call: ObservedCall) -> None:
        """Counted at its end."""

    def ended(self, call: ObservedCall) -> None:
        if call.client_stalled:
            self._stalled.inc()
        if call.first_token_seconds is not None:
            self._first_token.observe(call.first_token_seconds)
        for seconds in call.inter_token_seconds:
            self._inter_token.observe(seconds)
        if call.finish is not None:
            self._reasons[call.finish.reason].inc()
            self._queue.observe(call.finish.timings.queue)
            self._end_to_end.observe(call.seconds)


class MethodMetrics:
    """Counts the calls of all methods."""

    def __init__(self, registry: CollectorRegistry) -> None:
        text = "Calls that ended, by method and gRPC status"
        counter = Counter("hsrpc_calls", text, ["method", "status"], registry=registry)
        self._series = {pair: counter.labels(*pair) for pair in product((*METHODS, _OTHER), Outcome)}

    def count(self, method: str, outcome: Outcome) -> None:
        """A call has ended. What is no method of ours goes under one name: a client chooses no label."""
        self._series[method if method in METHODS else _OTHER, outcome].inc()


class EngineMetrics(Collector):
    """The engine's own counters, read at each scrape; a step's time as it ends."""

    def __init__(self, registry: CollectorRegistry, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine
        self._step = _seconds("hsrpc_step_duration", "Time of a step", registry)
        text = "Bytes copied to the device per second of step time, lately"
        self._bus = Gauge("hsrpc_bus_bytes_per_second", text, registry=registry)
        self._bus_bytes = self._bus_seconds = 0.0
        self._ratio = Histogram(
            "hsrpc_step_time_over_predicted_ratio",
            "Time of a step over the least that the machine's measured rates allow for what it moved and computed",
            buckets=_RATIO,
            registry=registry,
        )
        registry.register(self)

    def observe_step(self, record: StepRecord) -> None:
        """A step has ended."""
        self._step.observe(record.seconds)
        self._observe_bus(record)
        engine = self._engine()
        if engine is not None:
            plan = engine.plan
            limit = roofline(
                record, engine.spec.sizes, plan.hardware, absorbs=plan.absorbs, gathered_bytes=plan.gathered_bytes
            )
            self._ratio.observe(record.seconds / limit.seconds)

    def _observe_bus(self, record: StepRecord) -> None:
        """One step says little: the prefetcher works ahead of it. Older ones count less and less."""
        kept = math.exp(-record.seconds / _BUS_SECONDS)
        self._bus_bytes = self._bus_bytes * kept + record.weight_bytes + record.cache_bytes
        self._bus_seconds = self._bus_seconds * kept + record.seconds
        self._bus.set(self._bus_bytes / self._bus_seconds)

    def collect(self) -> Iterable[Metric]:
        engine = self._engine()
        if engine is None:
            return
        try:
            stats = engine.stats()
        except EngineUnavailableError:
            return  # left meanwhile
        yield from _requests(stats)
        yield from _blocks(engine.plan, stats)
        yield from _memory(engine.plan, stats)
        yield from _gpus(engine, stats)
        yield from _work(stats)


class LoopMetrics:
    """How late the event loop runs what is due."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "hsrpc_event_loop_lag_seconds", "Lateness of the event loop, sampled", buckets=_LAG, registry=registry
        )

    def observe_lag(self, seconds: float) -> None:
        """A sample."""
        self._lag.observe(seconds)


class ProcessMetrics:
    """What an operator has lost or got wrong."""

    def __init__(self, registry: CollectorRegistry) -> None:
        dropped = "Lines of the log that could not be written in time"
        self.dropped_log_lines = Counter("hsrpc_log_lines_dropped", dropped, registry=registry)
        failed = "Changes of certificates and tokens that could not be used"
        self.failed_reloads = Counter("hsrpc_failed_reloads", failed, registry=registry)
        cut = Counter("hsrpc_connections_cut", "Connections that the server cut", ["reason"], registry=registry)
        self._cut = {reason: cut.labels(reason.value) for reason in CutReason}

    def count_cut(self, reason: CutReason) -> None:
        """A connection was cut."""
        self._cut[reason].inc()


def _seconds(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"{name}_seconds", f"{text}, seconds", buckets=_LATENCY, registry=registry)


def _requests(stats: Stats) -> Iterator[Metric]:
    yield _gauge("hsrpc_requests_queued", "Requests that wait to run", stats.queued)
    yield _gauges("hsrpc_requests_running", "Requests that run", [gpu.running for gpu in stats.gpus])
    yield _gauge("vllm:num_requests_waiting", "Alias of hsrpc_requests_queued", stats.queued)
    yield _gauge("vllm:num_requests_running", "Sum of hsrpc_requests_running", stats.running)


def _blocks(plan: Plan, stats: Stats) -> Iterator[Metric]:
    labels = ["kind", "tier", _GPU]
    used = GaugeMetricFamily("hsrpc_cache_blocks_used", "Cache blocks in use", labels=labels)
    kept = GaugeMetricFamily("hsrpc_cache_blocks_kept", "Cache blocks kept for what they hold", labels=labels)
    total = GaugeMetricFamily("hsrpc_cache_blocks", "Cache blocks there are", labels=labels)
    for number, gpu in enumerate(stats.gpus):
        for pool in PoolId:
            names = [pool.kind.value, pool.tier.value, str(number)]
            used.add_metric(names, gpu.used_blocks[pool])
            kept.add_metric(names, gpu.kept_blocks[pool])
            total.add_metric(names, plan.num_blocks.get(pool, 0))
    yield from (used, kept, total)
    blocks = plan.num_gpus * sum(plan.num_blocks.values())
    usage = sum(stats.used_blocks.values()) / blocks if blocks else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Share of all cache blocks in use, 0 to 1", usage)


def _memory(plan: Plan, stats: Stats) -> Iterator[Metric]:
    device, host = (sum(parts.values()) for parts in (plan.device_bytes, plan.host_bytes))
    yield _gauges("hsrpc_device_memory_bytes", "Device memory that the plan uses", [device for _ in stats.gpus])
    used = [gpu.device_bytes for gpu in stats.gpus]
    yield _gauges("hsrpc_device_memory_used_bytes", "Device memory in use", used)
    peak = [gpu.peak_device_bytes for gpu in stats.gpus]
    yield _gauges("hsrpc_device_memory_peak_bytes", "Most device memory in use at once", peak)
    yield _gauges("hsrpc_host_memory_bytes", "Pinned host memory that the plan uses", [host for _ in stats.gpus])
    yield _gauge("hsrpc_activation_share_ratio", "Planned share of tokens held as activations", plan.activation_share)


def _gpus(engine: Engine, stats: Stats) -> Iterator[Metric]:
    info = GaugeMetricFamily("hsrpc_gpu_info", "1 for each GPU, by name and uuid", labels=[_GPU, "name", "uuid"])
    for number, gpu in enumerate(engine.gpus):
        info.add_metric([str(number), gpu.machine.name, gpu.uuid], 1)
    yield info
    busy = CounterMetricFamily("hsrpc_gpu_busy_seconds", "Time in which it did its parts of steps", labels=[_GPU])
    bus = CounterMetricFamily("hsrpc_bus_bytes", "Bytes copied to the device", labels=["what", _GPU])
    for number, each in enumerate(stats.gpus):
        busy.add_metric([str(number)], each.busy_seconds)
        for what, moved in zip(_BUS, (each.weights_streamed_bytes, each.cache_loaded_bytes), strict=True):
            bus.add_metric([what, str(number)], moved)
    yield from (busy, bus)
    measured = [gpu.machine.hardware.load_bandwidth for gpu in engine.gpus]
    yield _gauges("hsrpc_bus_measured_bytes_per_second", "Rate of the bus, as measured at the start", measured)


def _work(stats: Stats) -> Iterator[Metric]:
    yield _counter("hsrpc_regenerated_tokens", "K and V rebuilt, tokens times layers", stats.regenerated_tokens)
    yield _counter("hsrpc_recomputed_tokens", "Tokens of requests that keep no cache", stats.recomputed_tokens)
    yield _counter("hsrpc_cached_tokens", "Tokens found in blocks of other requests, not computed", stats.cached_tokens)
    yield _counter("hsrpc_drafted_tokens", "Tokens drafted, and checked by steps", stats.drafted_tokens)
    yield _counter("hsrpc_accepted_tokens", "Drafted tokens that were the output's", stats.accepted_tokens)
    yield _counter("hsrpc_expert_hits", "Experts on demand that were on the device", stats.expert_hits)
    yield _counter("hsrpc_expert_loads", "Experts on demand that were loaded", stats.expert_loads)
    yield _counter("hsrpc_expert_load_bytes", "Bytes of the experts loaded", stats.expert_loaded_bytes)
    yield _counter("hsrpc_preemptions", "Times that a request was preempted", stats.preemptions)
    yield _counter("hsrpc_prompt_tokens", "Prompt tokens of the requests taken", stats.prompt_tokens)
    yield _counter("hsrpc_generated_tokens", "Tokens generated", stats.generated_tokens)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, values: Iterable[float]) -> Metric:
    """A value of each GPU."""
    family = GaugeMetricFamily(name, text, labels=[_GPU])
    for number, value in enumerate(values):
        family.add_metric([str(number)], value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
