"""The limit of a decode step with a given placement, by the same formula for every system."""

from __future__ import annotations

from dataclasses import fields
from statistics import median

from benchmarks.peers.record import Traffic
from hsrpc.config import EngineConfig
from hsrpc.engine.startup import measure_machine
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.sizes import ModelSizes


def limit_seconds(traffic: Traffic, sizes: ModelSizes, hardware: Hardware) -> float:
    """max(bus, GPU) of one decode step that caches K and V."""
    record = StepRecord(
        seconds=0.0,
        num_requests=traffic.batch,
        decode_tokens=traffic.batch,
        prefill_tokens=0,
        context_tokens=traffic.batch * traffic.context,
        weight_bytes=traffic.weights,
        cache_bytes=traffic.cache,
        regenerated_tokens=0,
    )
    return roofline(record, sizes, hardware).seconds


def calibrate(model: str, count: int) -> list[Hardware]:
    """The machine's rates for a shape, measured `count` times; each takes about a second."""
    config = EngineConfig(model=RANDOM_PREFIX + model)
    return [measure_machine(config).hardware for _ in range(count)]


def median_hardware(found: list[Hardware]) -> Hardware:
    """Median of each rate."""
    return Hardware(**{item.name: median(getattr(each, item.name) for each in found) for item in fields(Hardware)})
