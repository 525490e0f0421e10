"""What is decided before an engine starts, and the measured rates and budgets that it follows from."""

from __future__ import annotations

from dataclasses import dataclass

from hsrpc.config import CachePolicy
from hsrpc.core.batch import BufferLimits, RowCosts
from hsrpc.core.blocks import PoolId

BUFFERS = 2
"""Device buffers of each sort: one is filled while the other is computed with."""
REGENERATE_ROWS = 4096
"""Activation rows that one regeneration GEMM takes, which bounds its output."""
SAMPLE_ELEMENTS = 2**20
"""Logits that are sorted at once, which bounds the sampler's working memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates measured on the machine at hand."""

    load_bandwidth: float
    """Host to device, bytes/s."""
    store_bandwidth: float
    """Device to host, bytes/s."""
    gemm_rate: float
    """FLOP/s at the regeneration shape."""
    memory_bandwidth: float
    """Device memory, bytes/s, read plus written."""
    launch_time: float = 0.0
    """Host seconds to launch one layer of one mini-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard limits, bytes."""

    device: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """A decode step of `batch` requests with `context` cached tokens each; seconds, all layers."""

    batch: int
    context: int
    bus: float
    forward: float
    regenerate: float
    attention: float
    step: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before the engine starts."""

    policy: CachePolicy
    """The policy in force: never `auto`."""
    reason: str
    """Why, in a sentence for people."""
    activation_share: float
    block_size: int
    max_batch: int
    max_model_len: int
    max_prefill_tokens: int
    buffers: BufferLimits
    costs: RowCosts
    resident: tuple[frozenset[str], ...]
    """For each layer, the names of the packed tensors that stay on the device."""
    streamed_bytes: tuple[int, ...]
    """For each layer, the weight bytes that cross the bus in every step."""
    num_blocks: dict[PoolId, int]
    device_bytes: dict[str, int]
    """What the device budget is spent on."""
    host_bytes: dict[str, int]
    """What the host budget is spent on."""
    budgets: Budgets
    prediction: StepPrediction
    hardware: Hardware

    @property
    def keeps_cache(self) -> bool:
        return self.policy is not CachePolicy.RECOMPUTE

    @property
    def weight_buffer_bytes(self) -> int:
        return max(self.streamed_bytes)

    @property
    def resident_share(self) -> float:
        """Share of the layers' weights that stay on the device."""
        total = self.device_bytes["resident weights"] + sum(self.streamed_bytes)
        return self.device_bytes["resident weights"] / total
