"""The shortest time that a step can take on a machine, given the bytes and tokens that it really moved."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from hsrpc.plan.hardware import Hardware
from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.sizes import LayerSizes, ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did. The weights are prefetched across steps, so a single step's bytes are off by some layers."""

    seconds: float
    """Time from the tokens of the step before, or from the arrival of work, to its own."""
    num_gpus: int = 1
    """GPUs that shared the work: all numbers are those of all together."""
    num_requests: int
    decode_tokens: int
    prefill_tokens: int
    recomputed_tokens: int = 0
    """Tokens of requests that keep no cache, all but the newest of each."""
    drafted_tokens: int = 0
    """Tokens behind the newest ones of their requests, which these may turn out not to have."""
    context_tokens: int
    """Cached tokens attended to, of all requests."""
    weight_bytes: int
    """Copied to the device; of experts that come on demand those that were loaded."""
    cache_bytes: int
    """Copied to the device."""
    regenerated_tokens: int
    """Each layer counted."""
    expert_hits: int = 0
    """Experts on demand that were in a slot, each layer counted."""
    expert_loads: int = 0
    """Those that were not."""

    @property
    def held_tokens(self) -> int:
        """Tokens of all requests before the step: cached, or recomputed."""
        return self.context_tokens + self.recomputed_tokens

    @property
    def of_one_gpu(self) -> StepRecord:
        """Each GPU's share of the step, if all had an equal one, rounded up."""
        if self.num_gpus == 1:
            return self
        counts = {
            item.name: -(-getattr(self, item.name) // self.num_gpus)
            for item in fields(self)
            if item.name not in ("seconds", "num_gpus")
        }
        return replace(self, num_gpus=1, **counts)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds, all layers."""

    bus: float
    forward: float
    regenerate: float
    attention: float
    in_turn: float = 0.0
    """Experts that came on demand, and all that is computed but the products of experts: a choice is behind what was
    computed before it, and what it loads before all that follows. 0 where none come so."""
    peers: float = 0.0
    """Weights from other GPUs."""

    @property
    def gpu(self) -> float:
        return self.forward + self.regenerate + self.attention

    @property
    def seconds(self) -> float:
        return max(self.bus, self.gpu, self.in_turn, self.peers)


def roofline(
    record: StepRecord, sizes: ModelSizes, hardware: Hardware, *, absorbs: bool = False, gathered_bytes: float = 0.0
) -> Roofline:
    """max(bus, gpu, what takes turns) for the work of one step, each at the best rate measured on this machine.

    The work that the method itself asks for and no more: no copies within the device, no logits, one mini-batch.
    `absorbs`: queries attend to activations as they are stored. Several GPUs have equal shares of the work, which no
    division of it is faster than.
    """
    record = record.of_one_gpu
    share = max(1.0, hardware.weight_read_share, hardware.attention_read_share)
    best = replace(
        hardware, weight_read_share=share, attention_read_share=share, gemm_overhead=0.0, small_kernel_time=0.0
    )
    layer = LayerTimes(sizes, best, math.inf)
    tokens = record.decode_tokens + record.prefill_tokens + record.recomputed_tokens + record.drafted_tokens
    context = round(record.context_tokens / max(1, record.num_requests))
    layers, attend = sizes.num_layers, layer.absorbed if absorbs else layer.attention
    touched = _touched(record, sizes)
    found = Roofline(
        bus=float(layer.load(record.weight_bytes + record.cache_bytes)),
        forward=float(layers * layer.forward(tokens, touched=touched)),
        regenerate=float(layer.regenerate(record.regenerated_tokens)),
        attention=float(layers * attend(record.context_tokens + tokens, 0, context)),
        peers=gathered_bytes / hardware.gather_bandwidth,
    )
    if touched is None:
        return found
    loads = float(layer.load(record.expert_loads * sizes.largest(_expert_bytes)))  # all are alike
    return replace(found, in_turn=loads + found.gpu - float(layers * layer.expert_products(tokens, touched)))


def _touched(record: StepRecord, sizes: ModelSizes) -> float | None:
    """Experts that the step took of a layer, on average over those that have some; None: none come on demand."""
    count = record.expert_hits + record.expert_loads
    return count / sum(layer.experts is not None for layer in sizes.layers) if count else None


def _expert_bytes(layer: LayerSizes) -> int:
    return 0 if layer.experts is None else layer.experts.device_bytes
