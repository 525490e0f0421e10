"""The least time that a step can take on a machine, given the bytes and tokens that it really moved."""

from __future__ import annotations

from dataclasses import dataclass

from hsrpc.core.plan import Hardware
from hsrpc.core.sizes import ModelSizes
from hsrpc.engine.stats import StepRecord


@dataclass(frozen=True, slots=True)
class StepLimit:
    """Seconds, all layers."""

    bus: float
    forward: float
    regenerate: float
    attention: float

    @property
    def gpu(self) -> float:
        return self.forward + self.regenerate + self.attention

    @property
    def seconds(self) -> float:
        return max(self.bus, self.gpu)


def step_limit(record: StepRecord, sizes: ModelSizes, hardware: Hardware) -> StepLimit:
    """max(bus, gpu) for the work of one step, each at the rate measured on this machine."""
    tokens, layers = record.decode_tokens + record.prefill_tokens, sizes.num_layers
    return StepLimit(
        bus=(record.weight_bytes + record.cache_bytes) / hardware.load_bandwidth,
        forward=layers
        * max(tokens * sizes.layer_flop / hardware.gemm_rate, sizes.layer_bytes / hardware.memory_bandwidth),
        regenerate=record.regenerated_tokens * sizes.regenerate_flop / hardware.gemm_rate,
        attention=layers * (record.context_tokens + tokens) * sizes.kv_bytes / hardware.memory_bandwidth,
    )
