"""The planner: what lies where, how much of the cache is activations, how many requests run at once.

Batch size, resident weights, and the kinds of the device's and of the host's blocks are chosen together by trying them
all out: the model of a step (`step_time`) takes arrays, so a grid is simpler than a solver, as quick, and finds the
optimum wherever it lies. The host's share of activations is the one dimension with a closed form: bus and GPU time are
linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsrpc.config import CachePolicy, EngineConfig, ExpertLoading, Placement, format_bytes, parse_bytes
from hsrpc.errors import ConfigError
from hsrpc.plan.build import Assembly
from hsrpc.plan.cache_policy import decide_cache
from hsrpc.plan.drafting import NO_DRAFT_TIME, DraftTime
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.placement import ResidentChoices, WeightChoice, demand_choices, spread_choices, streaming_choices
from hsrpc.plan.plan import Budgets, Plan, StepPrediction
from hsrpc.plan.search import Bools, Evaluation, Evaluator, Grid, HeldKinds, Point
from hsrpc.plan.sizes import Floats, ModelSizes, Number
from hsrpc.plan.step_time import StepModel, Traffic, token_bytes
from hsrpc.schedule.blocks import BlockKind

DEFAULT_CONTEXT = 1024
MODEST_CONTEXT = 4096
"""Most tokens of a request where nothing is given; `default_context` looks for more."""
MAX_BATCH = 512
_BATCH_GROWTH = 1.03
_RESIDENT_SHARES = tuple(i / 128 for i in range(129))
_AT_ONCE = 64
"""Choices of resident weights that are evaluated together with all batches."""
_STRIDE = 8
"""Every so many choices, of more than `_AT_ONCE`, are evaluated first, then those between the best."""
_PROMISING = 0.98
"""Choices next to one that gives this part of the best throughput may give more than it, with the same batch."""
_BUFFER_BYTES = (512 * 1024**2, 256 * 1024**2, 128 * 1024**2)
"""Sizes of a kv buffer to try: copies large enough to fill the bus, and few mini-batches."""
_BUFFER_PART = 20
"""At most this part of the device budget is one kv buffer."""
_DRAFTS = (0, 1, 3, 7, 15)
"""Tokens that each request drafts, at most: what to try where that is planned."""
_NEAR = 0.8
"""Batches from this part of that without drafts on are tried with drafts, for which there may be less room."""
_RECOMPUTE_TOKENS = (8192, 32768)
"""Their hidden states lie on the device."""
_WORTH = 0.99
"""Batches from this part of the best throughput on are worth it. The smallest is chosen, since a larger one makes every
request wait longer; where `max_batch` bounds that, the largest."""
_BOUNDLESS = 2**60
"""Bytes that are enough for any model."""
_EQUAL = 0.995
"""Candidates so near to the best of a batch count as equal: the simplest is chosen, by mini-batches, kinds, rows."""


class _Tried(NamedTuple):
    """What candidates there are to compare, beside the places of caches."""

    batch: Floats
    """[batches], ascending."""
    choices: npt.NDArray[np.int64]
    """Numbers of the choices of resident weights, ascending."""
    drafts: tuple[int, ...]
    """Tokens that each request drafts."""


class Planner:
    """Finds the plan of highest predicted throughput within the budgets: of several GPUs that of each."""

    def __init__(
        self,
        sizes: ModelSizes,
        budgets: Budgets,
        hardware: Hardware,
        config: EngineConfig,
        draft_time: DraftTime = NO_DRAFT_TIME,
    ) -> None:
        """`draft_time`: what a draft model takes, where that proposes tokens."""
        self.sizes = sizes
        self.budgets = budgets
        self.hardware = hardware
        self.config = config
        self.max_model_len = _max_model_len(config, sizes)
        self.decision = decide_cache(config, sizes)
        self.traffic = replace(_traffic(config, sizes, self.max_model_len), draft_time=draft_time)
        self._choices = ResidentChoices.of(sizes, _weight_choices(config, sizes, self._resident_shares(), hardware))
        self._models = {
            held: StepModel(sizes.holding(held.kinds), hardware, self.traffic)
            for held in _held_choices(sizes, self.decision.shares)
        }

    @property
    def _tried(self) -> _Tried:
        """All that there is to try at first."""
        drafts, every = self.config.draft_tokens, np.arange(len(self._choices.choices))
        return _Tried(_batches(self.config), every, (0 if isinstance(drafts, str) else drafts,))

    def plan(self) -> Plan:
        """The best plan.

        Raises:
            ConfigError: the budgets are too small for the model, or `max_step_time` cannot be met.
        """
        evaluator, point = self._best()
        return Assembly(evaluator, self.decision).plan(point)

    def curve(self) -> list[tuple[float, StepPrediction]]:
        """Activation shares from 0 to 1 and the best prediction for each that fits, for a plot.

        Raises:
            ConfigError: as `plan`.
        """
        self._best()
        points = []
        for share in (i / 20 for i in range(21)):
            config = replace(self.config, cache_policy=CachePolicy.HYBRID, activation_share=share)
            with suppress(ConfigError):
                points.append((share, self._with(config).plan().prediction))
        return points

    def _with(self, config: EngineConfig) -> Planner:
        return Planner(self.sizes, self.budgets, self.hardware, config, self.traffic.draft_time)

    def _best(self) -> tuple[Evaluator, Point]:
        """The best candidate; where drafts are planned, that with the most drafts around its batch which is as fast."""
        best = self._best_of(self._tried)
        if not isinstance(self.config.draft_tokens, str):
            return best
        batch = best[1].batch
        near = self._tried.batch[(self._tried.batch <= batch) & (self._tried.batch >= _NEAR * batch)]
        return self._best_of(self._tried._replace(batch=near, drafts=_DRAFTS))

    def _best_of(self, tried: _Tried) -> tuple[Evaluator, Point]:
        """The smallest of the batches that are worth it, or the largest under a bound; its simplest fast candidate."""
        few = self._few(tried)
        evaluated = self._evaluated(few)
        rates = self._rates([evaluation for _, evaluation in evaluated])
        if len(few.choices) < len(tried.choices):
            evaluated += self._evaluated(self._between(tried, few, [evaluation for _, evaluation in evaluated], rates))
            rates = self._rates([evaluation for _, evaluation in evaluated])
        found = [evaluation for _, evaluation in evaluated]
        if not rates.any():
            raise self._impossible(found)
        batch = _join([e.grid.batch for e in found], found)
        worth = batch[rates >= _WORTH * rates.max()]
        rates[batch != (worth.min() if self.config.max_batch is None else worth.max())] = 0.0
        equal = np.flatnonzero(rates >= _EQUAL * rates.max())
        simpler = (
            [e.grid.rows for e in found],
            [e.mixes for e in found],
            [e.times.mini_batches for e in found],
            [e.recomputed for e in found],
            [-e.grid.drafts for e in found],
        )
        order = np.lexsort((-rates[equal], *(_join(parts, found)[equal] for parts in simpler)))
        index = int(equal[order[0]])
        ends = np.cumsum([np.size(evaluation.times.step) for evaluation in found])
        return evaluated[np.searchsorted(ends, index, side="right")][0], _point(found, index)

    def _few(self, tried: _Tried) -> _Tried:
        """The choices of resident weights to begin with: all, or a part that has those without a load."""
        is_few = len(tried.choices) <= _AT_ONCE
        is_first = (tried.choices % _STRIDE == 0) | (self._choices.on_bus[tried.choices] == 0)
        return tried._replace(choices=tried.choices[is_first | is_few])

    def _between(self, tried: _Tried, few: _Tried, found: Sequence[Evaluation], rates: Floats) -> _Tried:
        """What is left: choices next to the best `few` of each way; all if `min_batch` fits none of these."""
        choice, batch = (_join([getattr(e.grid, name) for e in found], found) for name in ("choice", "batch"))
        others = np.setdiff1d(tried.choices, few.choices)
        if batch[rates > 0].max(initial=0) < self.config.min_batch:
            return tried._replace(choices=others)
        way = self._choices.way[choice]
        best = np.zeros(1 + self._choices.way.max())
        np.maximum.at(best, way, rates)
        promising = (rates > 0) & (rates >= _PROMISING * best[way])
        distance = np.abs(others[:, None] - np.unique(choice[promising])).min(axis=1)
        return tried._replace(batch=np.unique(batch[promising]), choices=others[distance < _STRIDE])

    def _rates(self, found: Sequence[Evaluation]) -> Floats:
        """Tokens/s of each candidate, as they are compared; 0: it does not fit, or is not in time."""
        possible = _join([e.fits & e.in_time for e in found], found).astype(np.bool_)
        batch = _join([e.grid.batch for e in found], found)
        tokens = batch * _join([e.times.tokens_per_request for e in found], found)
        rates = np.where(possible, tokens / _join([e.times.mean_step for e in found], found), 0.0)
        rates *= _join([self._choices.worth[e.grid.choice] for e in found], found)
        rates[batch < min(self.config.min_batch, batch[possible].max(initial=0))] = 0.0
        return rates

    def _evaluators(self, budgets: Budgets) -> list[Evaluator]:
        """One for each choice of the kinds that blocks may be of."""
        return [Evaluator(model, budgets, self.config, self._choices, held) for held, model in self._models.items()]

    def _evaluated(self, tried: _Tried) -> list[tuple[Evaluator, Evaluation]]:
        return [
            (each, each.evaluate(grid)) for each in self._evaluators(self.budgets) for grid in self._grids(each, tried)
        ]

    def _grids(self, evaluator: Evaluator, tried: _Tried) -> Iterator[Grid]:
        """All choices, for each size of the buffers; of equal candidates the first, with most resident, is taken."""
        for drafts in tried.drafts:
            if False in self.decision.absorbing:
                yield from self._rebuilding_grids(evaluator, tried, drafts)
            if True in self.decision.absorbing and (BlockKind.KV not in evaluator.held.kinds or not self.sizes.rounds):
                yield from self._absorbing_grids(evaluator.budgets, tried, drafts)

    def _rebuilding_grids(self, evaluator: Evaluator, tried: _Tried, drafts: int) -> Iterator[Grid]:
        budgets, shares, batch = evaluator.budgets, evaluator.shares, tried.batch[:, None, None]
        choices = self._possible_choices(budgets, tried)
        is_free = len(shares) > 1
        tries_kv_alone = is_free and not self.sizes.rounds  # else that is an evaluator of its own
        shares = (0.0, *shares) if tries_kv_alone else shares
        share = np.array(shares)[None, None, :]
        kv_only = (share == 0) & (np.arange(len(shares)) == 0) & (tries_kv_alone or not is_free)
        for wanted, recompute in product(self._row_choices(budgets), self._recompute_choices(batch)):
            rows = self._rows(batch, wanted, recompute)
            for choice in choices:
                yield Grid(
                    batch=batch,
                    choice=choice,
                    device_share=share,
                    kv_only=kv_only,
                    rows=rows,
                    recompute=recompute,
                    drafts=drafts,
                )

    def _absorbing_grids(self, budgets: Budgets, tried: _Tried, drafts: int) -> Iterator[Grid]:
        """Activations alone, and buffers of these; those of K and V have the rows of a chunk, or of drafts."""
        batch, choices = tried.batch[:, None, None], self._possible_choices(budgets, tried)
        share = np.ones((1, 1, 1))
        for wanted in self._row_choices(budgets, BlockKind.ACTIVATION):
            for recompute in self._recompute_choices(batch):
                for choice in choices:
                    yield Grid(
                        batch=batch,
                        choice=choice,
                        device_share=share,
                        kv_only=share == 0,
                        rows=self._rows(batch, 1, recompute),
                        recompute=recompute,
                        absorbed_rows=self._rows(batch, wanted, recompute),
                        drafts=drafts,
                    )

    def _possible_choices(self, budgets: Budgets, tried: _Tried) -> list[npt.NDArray[np.int64]]:
        """Choices of resident weights, from many to few, that alone do not exceed a budget; one where all do.

        As so many [1, choices, 1] at once that what is computed of them stays in the host's caches.
        """
        choices = self._choices
        on_device = choices.resident + choices.spread + choices.buffers + choices.experts + choices.tables
        fits = (on_device <= budgets.plannable) & (choices.on_host <= budgets.host)
        possible = tried.choices[fits[tried.choices]]
        found = (possible if possible.size else tried.choices[:1])[::-1]
        return [found[None, start : start + _AT_ONCE, None] for start in range(0, len(found), _AT_ONCE)]

    def _resident_shares(self) -> tuple[float, ...]:
        if self.config.placement is Placement.HOST:
            return (0.0,)
        given = self.config.resident_share
        return _RESIDENT_SHARES if given is None else (given,)

    def _row_choices(self, budgets: Budgets, kind: BlockKind = BlockKind.KV) -> list[int]:
        """Rows of a buffer for rows of that kind: as many as are wanted, or just those of the longest request."""
        max_bytes = budgets.device // _BUFFER_PART
        row = self.sizes.max_row_bytes(kind)
        return [*dict.fromkeys(min(size, max_bytes) // row for size in _BUFFER_BYTES), 1]

    def _recompute_choices(self, batch: Floats) -> list[Number]:
        """Tokens that a step may recompute: none, some, many. What requests share is loaded once for all: none."""
        given = self.config.recompute_share
        if given is not None:
            return [given * batch * self.traffic.context]
        may_recompute = self.config.cache_policy is CachePolicy.AUTO and not self.traffic.shared
        return [0, *_RECOMPUTE_TOKENS] if may_recompute else [0]

    def _rows(self, batch: Number, wanted: int, recompute: Number) -> Number:
        """`wanted`, but at least all that the longest request shows, or all of it where requests are recomputed."""
        block = self.config.block_size
        longest = -(-self.max_model_len // block) * block
        is_whole = (np.asarray(recompute) > 0) | (self.config.cache_policy is CachePolicy.RECOMPUTE)
        least = np.where(is_whole, longest, min(longest, self.sizes.sliding_window or longest))
        rows: Number = np.clip(wanted, least, batch * longest)
        return rows

    def _impossible(self, found: Sequence[Evaluation]) -> ConfigError:
        fits = _join([e.fits for e in found], found).astype(np.bool_)
        steps = _join([e.times.longest_step for e in found], found)
        return self._too_slow(steps[fits]) if fits.any() else self._too_small()

    def _too_slow(self, steps: Floats) -> ConfigError:
        return ConfigError(
            "max_step_time",
            self.config.max_step_time,
            f"the fastest step predicted takes {steps.min():.4f} s",
            "raise it, or give more gpu_memory",
        )

    def _too_small(self) -> ConfigError:
        device = self._smallest(lambda size: replace(self.budgets, device=size, host=_BOUNDLESS), self.budgets.device)
        if device > self.budgets.device:
            return ConfigError(
                "gpu_memory",
                format_bytes(self.budgets.device),
                f"too small for a context of {self.max_model_len}: the smallest plan takes {format_bytes(device)}",
                "raise it to that, or lower max_model_len or max_prefill_tokens",
            )
        host = self._smallest(lambda size: replace(self.budgets, host=size), self.budgets.host)
        share = max(self.decision.shares) if self.sizes.activation_ratio > 1 else min(self.decision.shares)
        block_size = self.config.block_size
        tokens = min(self.max_model_len, self.sizes.held_blocks(self.max_model_len, block_size) * block_size)
        cache = float(tokens * self.sizes.num_layers * token_bytes(self.sizes, share))
        return ConfigError(
            "host_memory",
            format_bytes(self.budgets.host),
            f"too small: weights take {format_bytes(self._choices.on_host.max())} less what stays on the device, "
            f"one request at full length {format_bytes(cache)}, the smallest plan {format_bytes(host)}",
            "raise it to that, or raise gpu_memory, or lower max_model_len",
        )

    def _smallest(self, budgets: Callable[[int], Budgets], given: int) -> int:
        """The smallest size from `given` on, as it is shown, with which some candidate fits; to 2 %."""
        too_small, enough = given, given
        while not self.fits(budgets(enough)):
            too_small, enough = enough, _as_shown(2 * max(1, enough))
        while enough - too_small > enough // 50:
            middle = _as_shown((too_small + enough) / 2)
            if not too_small < middle < enough:
                break
            too_small, enough = (too_small, middle) if self.fits(budgets(middle)) else (middle, enough)
        return enough

    def fits(self, budgets: Budgets | None = None, batch: int | None = None) -> bool:
        """Whether a candidate fits these budgets, or the planner's own; it may be too slow.

        `batch`: requests that it runs at once; None: any number that the planner tries.
        """
        budgets = budgets or self.budgets
        tried = self._tried if batch is None else self._tried._replace(batch=np.array([batch], dtype=np.float64))
        return any(
            bool(evaluator.evaluate(grid).fits.any())
            for evaluator in self._evaluators(budgets)
            for grid in self._grids(evaluator, tried)
        )


def _as_shown(size: float) -> int:
    """`size` bytes as a reader of `format_bytes` would give them."""
    return parse_bytes(format_bytes(size), "size")


def _max_model_len(config: EngineConfig, sizes: ModelSizes) -> int:
    given = config.max_model_len
    if given is not None and given > sizes.context_length:
        raise ConfigError(
            "max_model_len", given, f"the model's context has {sizes.context_length} tokens", "give at most that"
        )
    return given or min(sizes.context_length, MODEST_CONTEXT)


def _weight_choices(
    config: EngineConfig, sizes: ModelSizes, shares: tuple[float, ...], hardware: Hardware
) -> list[WeightChoice]:
    """Those to try; of two that are equal the later one is taken."""
    residence = config.resident_weights
    if sizes.num_gpus > 1 and len(shares) > 1:  # else it is said what stays on each
        return spread_choices(sizes, shares, residence, hardware)
    streams = config.experts is ExpertLoading.STREAM or sizes.num_gpus > 1  # each would pin all experts
    on_demand = [] if streams else demand_choices(sizes, shares, residence)
    if config.experts is not ExpertLoading.DEMAND:
        return on_demand + streaming_choices(sizes, shares, residence)
    if not on_demand:
        problem = "the model has no experts, or they are coded, or not all alike"
        remedy = "use experts=auto, or weight_coding=none for coded ones"
        raise ConfigError("experts", config.experts.value, problem, remedy)
    return on_demand


def _held_choices(sizes: ModelSizes, shares: tuple[float, ...]) -> list[HeldKinds]:
    """Kinds that blocks may be of, and the shares to try with them.

    In 8 bits the kinds are chosen apart, because they say what is rounded of all tokens: activations, K and V, or both.
    """
    both = frozenset(BlockKind)
    if not sizes.rounds:
        return [HeldKinds(both, shares)]
    alone = {0.0: frozenset({BlockKind.KV}), 1.0: frozenset({BlockKind.ACTIVATION})}
    if len(shares) == 1:
        return [HeldKinds(alone.get(shares[0], both), shares)]
    return [*(HeldKinds(kinds, (share,)) for share, kinds in alone.items()), HeldKinds(both, shares)]


def _traffic(config: EngineConfig, sizes: ModelSizes, longest: int) -> Traffic:
    """A request holds its prompt and half of its output on average."""
    context = min(config.expected_context or DEFAULT_CONTEXT, longest)
    output = config.expected_output or max(1, context // 4)
    prompt = max(1, context - output // 2)
    # Blocks that a window has left behind are nobody's.
    shared = min(config.expected_shared_prefix, prompt - 1) if sizes.sliding_window is None else 0
    return Traffic(
        context=context,
        prompt=prompt,
        output=output,
        longest=longest,
        shared=shared // config.block_size * config.block_size,
        acceptance=config.expected_acceptance,
    )


def _batches(config: EngineConfig) -> Floats:
    """Batch sizes to try: all small ones, then in steps of 3 %; `min_batch` and `max_batch` are among them."""
    last = config.max_batch or max(MAX_BATCH, config.min_batch)
    steps = {1, config.min_batch, last}
    size = 1
    while size < last:
        steps.add(size)
        size = max(size + 1, int(size * _BATCH_GROWTH))
    return np.array(sorted(steps), dtype=np.float64)


def _join(parts: Iterable[Number | Bools], found: Sequence[Evaluation]) -> Floats:
    """One value for each candidate of all grids, in a row."""
    shapes = [np.shape(evaluation.times.step) for evaluation in found]
    return np.concatenate([np.broadcast_to(part, shape).ravel() for part, shape in zip(parts, shapes, strict=True)])


def _point(found: Sequence[Evaluation], index: int) -> Point:
    """The candidate at `index` of what `_join` gives."""
    grids = [evaluation.grid for evaluation in found]
    values = [[getattr(grid, item.name) for grid in grids] for item in fields(Grid)]
    batch, choice, share, kv_only, rows, recompute, *more = (_join(value, found)[index] for value in values)
    absorbed, drafts = map(int, more)
    return Point(int(batch), int(choice), float(share), bool(kv_only), int(rows), float(recompute), absorbed, drafts)
