"""Which requests keep no cache: their tokens are computed anew in every step, while the bus is busy with the others'.

The third way to have a token's K and V, beside loading them and rebuilding them from its activation: it takes the bus
nothing, and the GPU several times what rebuilding takes. It pays where the GPU would wait in spite of all caches being
activations. A request needs no more than its token ids for it, so it can give its blocks up between any two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hsrpc.core.batch import RowCosts
from hsrpc.core.blocks import PoolId
from hsrpc.core.request import Request

BALANCE = 7 / 8
"""GPU time over bus time at which a step is shortest: beyond it the GPU loses more than the bus gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeLimits:
    """What a step may compute anew."""

    tokens: int = 0
    """Of all requests in a step, on average over their lives; 0: every request keeps its cache."""
    weights: float = 0.0
    """Seconds that a layer's weights take on the bus."""
    is_forced: bool = False
    """Whatever it costs: for measurements and tests."""


NO_RECOMPUTING = RecomputeLimits()


@dataclass(slots=True)
class _Load:
    """Seconds of a layer."""

    bus: float
    gpu: float


class Recomputing:
    """Chooses, before each step, which of the requests that decode give up their blocks, and who takes some again."""

    def __init__(
        self, limits: RecomputeLimits, costs: RowCosts, *, block_size: int, max_model_len: int, max_queries: int
    ) -> None:
        self._limits = limits
        self._costs = costs
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_queries = max_queries
        """Of a mini-batch: a request that keeps nothing has to fit to its end."""

    @property
    def is_of_use(self) -> bool:
        return self._limits.tokens > 0

    def giving_up(self, running: Sequence[Request], prompt_tokens: int) -> Iterator[Request]:
        """Those that are to give up their blocks, the first to run first; so many prompt tokens are computed beside."""
        load, room = self._load(running), self._limits.tokens - sum(map(self._mean_tokens, _recomputing(running)))
        load.gpu += prompt_tokens * self._costs.compute
        for request in running:
            tokens = self._mean_tokens(request)
            bus, gpu = self._cached(request)
            if tokens > room or not self._can_give_up(request) or not (bus or self._limits.is_forced):
                continue
            less, more = load.bus - bus, load.gpu - gpu + request.num_tokens * self._costs.compute
            if more <= BALANCE * less or self._limits.is_forced:
                load.bus, load.gpu = less, more
                room -= tokens
                yield request

    def taking_back(self, running: Sequence[Request]) -> Request | None:
        """One that should keep its cache again, because the GPU has too much to do; None: nobody."""
        load = self._load(running)
        if load.gpu <= load.bus or self._limits.is_forced:
            return None
        return next(_recomputing(reversed(running)), None)

    def _load(self, running: Iterable[Request]) -> _Load:
        load = _Load(self._limits.weights, 0.0)
        for request in running:
            bus, gpu = self._cached(request)
            load.bus += bus
            load.gpu += request.num_tokens * self._costs.compute if request.recomputes else gpu
        return load

    def _cached(self, request: Request) -> tuple[float, float]:
        """Seconds of bus and GPU for what is cached of it."""
        count, costs = request.blocks.pools.count, self._costs
        on_host = count(PoolId.HOST_ACTIVATION)
        activations = on_host + count(PoolId.DEVICE_ACTIVATION)
        bus = count(PoolId.HOST_KV) * costs.load_kv + on_host * costs.load_activation
        return self._block_size * bus, self._block_size * activations * costs.regenerate

    def _can_give_up(self, request: Request) -> bool:
        return (
            request.is_decoding
            and not request.recomputes
            and request.most_tokens(self._max_model_len) <= self._max_queries
        )

    def _mean_tokens(self, request: Request) -> int:
        """From now to its end."""
        return (request.num_tokens + request.most_tokens(self._max_model_len)) // 2


def _recomputing(running: Iterable[Request]) -> Iterator[Request]:
    return (request for request in running if request.recomputes)
