"""What is decided before an engine starts, and the measured rates and budgets that it follows from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsrpc.config import CacheCoding, CachePolicy
from hsrpc.plan.demand import Demand
from hsrpc.plan.drafting import NO_DRAFTS, DraftPlan
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.sizes import PlacedSizes, Stays, WeightBuffers
from hsrpc.schedule.blocks import IN_PROPORTION, BlockKind, KindRule, PoolId
from hsrpc.schedule.recompute import RecomputeLimits
from hsrpc.schedule.step import BufferLimits, RowCosts

REGENERATE_ROWS = 4096
"""Activation rows that one regeneration GEMM takes, where its output is copied to its place: that bounds it."""
PENDING_QUERIES = 2
"""Mini-batches of the largest size whose queries may be launched and not computed yet: memory is planned for these."""
SAMPLE_ELEMENTS = 2**20
"""Logits that are sorted at once, which bounds the sampler's working memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard limits, bytes."""

    device: int
    host: int
    runtime: int = 0
    """Part of `device` that the allocator's rounding and the libraries' own buffers take."""
    draft_model: int = 0
    """Part of `device` that a draft model takes, which is planned before; 0: there is none."""

    @property
    def plannable(self) -> int:
        """What is left of `device` for the model."""
        return self.device - self.runtime - self.draft_model


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """A decode step of `batch` requests with `context` cached tokens each; seconds, all layers."""

    batch: int
    context: int
    mini_batches: int
    drafts: int = 0
    """Tokens that each request drafts."""
    tokens_per_request: float = 1.0
    """Tokens that the step gives each request, on average."""
    bus: float
    peers: float = 0.0
    """Weights from other GPUs."""
    forward: float
    """Projections and MLP of the new tokens; the attention of recomputed ones as well."""
    regenerate: float
    gather: float
    """Activation blocks on the device, copied to where regeneration reads them."""
    attention: float
    head: float
    """Logits."""
    experts: float
    """Experts that come on demand, and the waiting for the choice of them: beside it neither bus nor GPU works."""
    launch: float
    """Host time to launch the step, beside bus and GPU; 0 where a graph runs it."""
    boundary: float
    """Time between two steps that nothing hides, and the step's first load or last compute, which overlaps nothing."""
    step: float
    prefill: float
    """Compute of the prompts that come in during a step on average; not part of `step`."""
    longest_step: float
    """A step with `max_prefill_tokens` prompt tokens beside the decoding."""
    mean_step: float
    """A step while requests come and go."""

    @property
    def gpu(self) -> float:
        """All that a decode step computes."""
        return self.forward + self.regenerate + self.gather + self.attention + self.head

    @property
    def tokens_per_second(self) -> float:
        """While all requests decode."""
        return self.batch * self.tokens_per_request / self.step

    @property
    def mean_tokens_per_second(self) -> float:
        """While requests come and go: what the plan was chosen for."""
        return self.batch * self.tokens_per_request / self.mean_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before the engine starts."""

    policy: CachePolicy
    """The policy in force: never `auto`."""
    reason: str
    """Why, in a sentence for people."""
    activation_share: float
    """Part of the tokens in use, with a full batch of the expected length; each tier's follows from its blocks."""
    block_size: int
    max_batch: int
    max_model_len: int
    max_prefill_tokens: int
    """Prompt tokens of a step in which a full batch decodes, at most. Where weights stream they may need several
    mini-batches: a mini-batch has at most `buffers.queries` queries."""
    spare_prefill_tokens: float
    """More of them for each request that the batch lacks: as many as take the time of its decoding."""
    max_idle_prefill_tokens: int
    """Prompt tokens of a step in which none decodes, at most; may need several mini-batches."""
    recompute: RecomputeLimits
    buffers: BufferLimits
    costs: RowCosts
    resident: tuple[Stays, ...]
    """The weight tensors that stay on the device, for each layer; all others but experts on demand come to a buffer in
    every step: over the bus, or from the GPUs that hold them together."""
    placed: tuple[PlacedSizes, ...]
    """What each layer's tensors take, placed so; experts on demand are not among them."""
    num_blocks: dict[PoolId, int]
    device_bytes: dict[DeviceUse, int]
    """What the device budget is spent on; for hidden states, workspace, graphs and runtime bounds, else exact."""
    host_bytes: dict[HostUse, int]
    """What the host budget is spent on; for coded weights a bound, since their values decide how small they get."""
    budgets: Budgets
    prediction: StepPrediction
    hardware: Hardware
    demand: Demand | None = None
    """Where experts lie that come on demand; None: they stay or stream as other weights."""
    kv_layers: frozenset[int] = frozenset()
    """Layers in which activation blocks hold K and V, so that nothing is rebuilt there."""
    absorbs: bool = False
    """Single queries attend to activations as they are stored, without K and V; all blocks hold activations then."""
    cache_format: CacheCoding = CacheCoding.PLAIN
    """How cached tokens are kept."""
    kinds: frozenset[BlockKind] = frozenset(BlockKind)
    """Kinds that blocks may be of. In 8 bits all tokens' activations and K and V are rounded as blocks of these are."""
    shared_prefix: int = 0
    """First tokens that requests are expected to share."""
    num_gpus: int = 1
    """GPUs that each have such a plan, and load what streams for each other: all bytes and times are those of one."""
    kind_rule: KindRule = IN_PROPORTION
    """Decides of which kind a request's next blocks are."""
    drafts: DraftPlan = NO_DRAFTS
    """Room for drafts, and what verifying them takes."""

    @property
    def max_draft_tokens(self) -> int:
        """Tokens that a request drafts in a step, at most: there is room for as many of a whole batch."""
        return self.drafts.drafting.tokens

    def held(self, kind: BlockKind, layer: int) -> BlockKind:
        """What blocks of a kind hold in a layer."""
        return BlockKind.KV if layer in self.kv_layers else kind

    @property
    def in_place(self) -> PoolId:
        """The blocks that single queries read where they lie."""
        return PoolId.DEVICE_ACTIVATION if self.absorbs else PoolId.DEVICE_KV

    @property
    def keeps_cache(self) -> bool:
        return self.policy is not CachePolicy.RECOMPUTE

    @property
    def streamed_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer's weights that come to a buffer in every step, as they are when they are used."""
        return tuple(layer.streamed_bytes for layer in self.placed)

    @property
    def weight_buffer_bytes(self) -> int:
        """Bytes of each of the buffers that weights are loaded to."""
        return WeightBuffers.of(self.placed).packed

    @property
    def decode_buffer_bytes(self) -> int:
        """Bytes of the buffer that a layer's weights are decoded to, experts on demand last; 0: none are decoded."""
        experts = 0 if self.demand is None else self.demand.decoded_bytes
        return WeightBuffers.of(self.placed).decoded + experts

    @property
    def expert_traffic(self) -> tuple[float, ...]:
        """Bytes of device memory that decoding all experts of each layer reads and writes."""
        demand = self.demand
        if demand is None:
            return tuple(layer.expert_traffic for layer in self.placed)
        return tuple(count * demand.decode_traffic for count in demand.counts)

    @property
    def kept_bytes(self) -> int:
        """Bytes on the device of weights that stay packed, at most; they are among the resident ones."""
        return math.ceil(round(sum(layer.kept_bytes for layer in self.placed), 3))

    @property
    def resident_share(self) -> float:
        """Share of the layers' weights that stay on each device, packed or not; experts in slots are among them."""
        stays: float = sum(layer.ready_bytes for layer in self.placed)
        all_bytes = stays + sum(self.streamed_bytes)
        if self.demand is not None:
            experts = sum(self.demand.counts) * self.demand.ready_bytes
            stays += self.demand.hit_rate * experts
            all_bytes += experts
        return stays / all_bytes

    @property
    def spread_share(self) -> float:
        """Share of the layers' weights that the devices of several GPUs hold together, a piece each."""
        both = zip(self.resident, self.placed, strict=True)
        spread = sum(stays.spread * layer.streamed_bytes for stays, layer in both)
        return spread / sum(layer.ready_bytes + layer.streamed_bytes for layer in self.placed)

    @property
    def gathered_bytes(self) -> float:
        """Bytes that each of several GPUs gets from the others in every step."""
        return sum(layer.num_others * (layer.bus_bytes + layer.spread_bytes) for layer in self.placed)
