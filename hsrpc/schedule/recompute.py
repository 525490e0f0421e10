"""Which requests are uncached: every step recomputes their tokens while the bus loads the caches of the others.

Recomputing is the third way to have a token's K and V, beside loading them and rebuilding them from its activation. It
takes no time on the bus, and several times the GPU time of rebuilding, so it pays where the GPU would wait for the bus
even if all blocks held activations. It needs a request's token ids only, so the request's blocks can be freed between
any two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import RowCosts
from hsrpc.schedule.windows import LayerWindows, first_visible

BALANCE = 7 / 8
"""GPU time over bus time at which a step is shortest: beyond it the GPU loses more than the bus gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeLimits:
    """What a step may recompute."""

    tokens: int = 0
    """Tokens of all uncached requests in a step, on average over their lives; 0: every request keeps its cache."""
    weights: float = 0.0
    """Seconds that a layer's weights take on the bus."""
    is_forced: bool = False
    """Whatever it costs: for measurements and tests."""


NO_RECOMPUTE = RecomputeLimits()


class Choice(NamedTuple):
    """Which requests become uncached, or cached, with the next step."""

    giving_up: list[Request]
    """Cached requests whose blocks are to be freed: they are uncached from now on."""
    taking_back: list[Request]
    """Uncached requests in order of preference: the first for which there is room is cached again, the others stay."""


class RecomputePolicy:
    """Chooses, before each step, which decoding requests become uncached, or which one is cached again."""

    def __init__(
        self,
        limits: RecomputeLimits,
        costs: RowCosts,
        *,
        block_size: int,
        max_queries: int,
        windows: LayerWindows,
    ) -> None:
        self._limits = limits
        self._costs = costs
        self._block_size = block_size
        self._max_queries = max_queries
        """Queries of a mini-batch, at most: an uncached request has to fit into one until it ends."""
        self._windows = tuple(windows.shares)

    @property
    def is_of_use(self) -> bool:
        return self._limits.tokens > 0

    def choose(self, running: Sequence[Request], other_tokens: int) -> Choice:
        """Choose for a step with `other_tokens` of prompts and drafts, in the order of `running`, as the GPU has time.

        Where the GPU takes longer than the bus even without those, uncached requests are cached again instead, the
        last first.
        """
        compute, is_forced = self._costs.compute, self._limits.is_forced
        uncached = [request for request in running if request.is_uncached]
        cached = [(request, *self._cached(request)) for request in running if not request.is_uncached]
        bus = self._limits.weights + sum(on_bus for _, on_bus, _ in cached)
        gpu = compute * sum(request.num_tokens for request in uncached) + sum(on_gpu for *_, on_gpu in cached)
        if gpu > bus and uncached and not is_forced:
            return Choice([], uncached[::-1])
        gpu += compute * other_tokens
        room = self._limits.tokens - sum(map(self._mean_tokens, uncached))
        giving_up = []
        for request, on_bus, on_gpu in cached:
            less, more = bus - on_bus, gpu - on_gpu + compute * request.num_tokens
            pays = on_bus > 0 and more <= BALANCE * less
            if (pays or is_forced) and self._can_recompute(request) and self._mean_tokens(request) <= room:
                bus, gpu, room = less, more, room - self._mean_tokens(request)
                giving_up.append(request)
        return Choice(giving_up, [])

    def _cached(self, request: Request) -> tuple[float, float]:
        """Seconds of bus and GPU for the cached tokens of a request that its next token attends to, a layer."""
        costs, bus, gpu = self._costs, 0.0, 0.0
        for window, share in self._windows:
            first = first_visible(request.num_computed, window) // self._block_size - request.blocks.first
            count, tokens = request.blocks.pools[first:].count, share * self._block_size
            on_host = count(PoolId.HOST_ACTIVATION)
            activations = on_host + count(PoolId.DEVICE_ACTIVATION)
            bus += tokens * (count(PoolId.HOST_KV) * costs.load_kv + on_host * costs.load_activation)
            gpu += tokens * (activations * costs.regenerate)
        return bus, gpu

    def _can_recompute(self, request: Request) -> bool:
        return request.is_decoding and request.max_total_tokens <= self._max_queries

    def _mean_tokens(self, request: Request) -> int:
        """Tokens of a request, on average from now to its end."""
        return (request.num_tokens + request.max_total_tokens) // 2
