"""Many plans at once, as arrays: what each would place where, whether it fits, and how fast it would be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hsrpc.config import CachePolicy, EngineConfig, Placement
from hsrpc.plan.device_memory import Staging, device_bytes, query_bytes
from hsrpc.plan.placement import ResidentChoices
from hsrpc.plan.plan import Budgets
from hsrpc.plan.sizes import Floats, ModelSizes, Number
from hsrpc.plan.step_time import Candidates, StepModel, StepTimes, token_bytes
from hsrpc.schedule.blocks import BlockKind

Bools: TypeAlias = npt.NDArray[np.bool_]

MIN_CHUNK, MAX_CHUNK = 256, 8192
"""Prompt tokens beside decoding, where nothing else is asked for."""
MIN_IDLE_CHUNK, MAX_IDLE_CHUNK = 8192, 16384
"""Prompt tokens of a step in which nothing decodes."""
_SPARE = 1.25
"""Compute time of an idle chunk over the time in which the weights arrive: above 1, the GPU never waits for them."""
_BACKLOG, _STREAMED_BACKLOG = 2.0, 8.0
"""Steps whose incoming prompt tokens fit one chunk, so that newcomers catch up; the second, where weights stream. There
a step of few requests takes as long as one of many, so the batch should fill quickly."""
_CHUNK_PART = 20
"""At most this part of the device budget is workspace for the queries of a mini-batch."""
_MIN_STREAMED = 2048
"""Prompt tokens of a mini-batch whose compute in a layer takes longer than the host needs to launch it."""
_MIN_CHUNK = 16
"""Prompt tokens that must fit a step within `max_step_time`; a candidate that has room for fewer is too slow."""
_ROUNDING = 1 + 1e-9
_SHARES = 100
"""Shares are whole multiples of one over this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The choices that make a candidate; arrays that broadcast."""

    batch: Floats
    choice: npt.NDArray[np.int64]
    """Number of a choice of the resident weights."""
    device_share: Floats
    """Activations' part of the device's blocks."""
    kv_only: Bools
    """The host has no activations either: no buffers for them."""
    rows: Number
    """Rows of a mini-batch's kv buffer."""
    recompute: Number
    """Tokens that a step may recompute, at most."""
    absorbed_rows: Number = 0
    """Rows of the activation buffer, where single queries attend to activations as they are; 0: they need K and V."""
    drafts: Number = 0
    """Tokens that each request drafts in a step."""

    @property
    def queries(self) -> Number:
        """New tokens of a whole batch that decodes."""
        return self.batch * (1 + self.drafts)

    @property
    def absorbs(self) -> Bools:
        return np.asarray(self.absorbed_rows) > 0


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate of a grid."""

    batch: int
    choice: int
    device_share: float
    kv_only: bool
    rows: int
    recompute: float
    absorbed_rows: int = 0
    drafts: int = 0

    def as_grid(self) -> Grid:
        """Arrays without dimensions."""
        return Grid(
            batch=np.asarray(self.batch, dtype=np.float64),
            choice=np.asarray(self.choice),
            device_share=np.asarray(self.device_share),
            kv_only=np.asarray(self.kv_only),
            rows=self.rows,
            recompute=self.recompute,
            absorbed_rows=self.absorbed_rows,
            drafts=self.drafts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What follows from a grid; arrays that broadcast."""

    grid: Grid
    staging: Staging
    chunk: Number
    idle_chunk: Number
    host_share: Number
    recomputed: Number
    """Part of the tokens in use that every step recomputes."""
    device_blocks: Number
    host_blocks: Number
    on_device: Number
    times: StepTimes
    mixes: Bools
    """Both kinds are in use."""
    fits: Bools
    """Both budgets."""
    in_time: Bools
    """Within `max_step_time`, a chunk beside."""


class HeldKinds(NamedTuple):
    """Kinds that blocks may be of, and in which parts."""

    kinds: frozenset[BlockKind]
    shares: tuple[float, ...]
    """Activations' parts of the device's blocks to try; one alone holds for the host as well."""


class Evaluator:
    """Fills in what the choices of a grid leave open: chunks, blocks of each tier, the host's kinds."""

    def __init__(
        self,
        model: StepModel,
        budgets: Budgets,
        config: EngineConfig,
        choices: ResidentChoices,
        held: HeldKinds,
    ) -> None:
        self.held = held
        self.model = model
        self.sizes: ModelSizes = model.sizes
        self.budgets = budgets
        self.config = config
        self.choices = choices
        self.shares = held.shares
        self.recomputes = config.cache_policy is CachePolicy.RECOMPUTE
        """Nothing is cached: every step computes all tokens."""
        self.max_model_len = model.traffic.longest
        self.longest = -(-self.max_model_len // config.block_size)
        """Blocks of one request at full length, were none of them freed."""
        self._rows_per_block = self.sizes.num_layers * config.block_size

    def evaluate(self, grid: Grid) -> Evaluation:
        """Everything about the grid's candidates."""
        arrival = self._arrival(grid.choice)
        chunk, idle_chunk = self._chunks(grid, arrival)
        prompt_queries = self._prompt_queries(chunk, idle_chunk, arrival)
        grid = replace(grid, rows=np.maximum(grid.rows, self._chunk_rows(grid, prompt_queries)))
        staging = self.staging(grid, prompt_queries, idle_chunk)
        device_room = self.budgets.plannable - sum(device_bytes(self.sizes, staging).values())
        device_room = device_room - self.sizes.max_coded_bytes
        choices = self.choices
        for part in (choices.resident, choices.spread, choices.buffers, choices.experts, choices.tables):
            device_room = device_room - part[grid.choice]
        host_room = self.budgets.host - self.choices.on_host[grid.choice]
        usable = self._usable_blocks(grid, idle_chunk)
        max_blocks = usable + (0 if self.recomputes else grid.batch)  # each has one to grow into
        device_blocks = np.minimum(self._device_blocks(device_room, grid.device_share), max_blocks)
        on_device = self._on_device(grid.batch, device_blocks, self.model.traffic.context)
        queries = prompt_queries if self.recomputes else staging.queries - grid.queries
        candidates = self._candidates(grid, device_blocks, chunk, queries)
        prompt_chunk = np.minimum(staging.queries, idle_chunk)
        missing = np.maximum(0, self._needed_blocks(grid.batch, prompt_chunk, grid.drafts) - device_blocks)
        host_share = np.where(grid.absorbs, 1.0, self._host_share(candidates, grid.kv_only, host_room, missing))
        candidates = replace(candidates, host_share=host_share)
        recomputed = self._recomputed(candidates, grid.recompute, staging)
        candidates = replace(candidates, recomputed=recomputed)
        cached = grid.batch * (1 - recomputed)
        missing = np.maximum(0, self._needed_blocks(cached, prompt_chunk, grid.drafts) - device_blocks)
        # Where the device holds all requests at full length, the host gets no blocks: a step that reads any of them
        # goes through buffers, while all others read their blocks in place.
        of_use = np.where(device_blocks >= usable, 0.0, max_blocks - device_blocks)
        host_blocks = np.minimum(self._blocks(host_room, host_share), of_use)
        work = self.model.work(candidates)
        times = self.model.steps(candidates, work)
        fitted = self._fitted(chunk, np.where(arrival > 0, np.minimum(idle_chunk, MAX_CHUNK), chunk), times)
        times = self.model.steps(replace(candidates, chunk=fitted), work)
        return Evaluation(
            grid=grid,
            staging=staging,
            chunk=fitted,
            idle_chunk=idle_chunk,
            host_share=host_share,
            recomputed=recomputed,
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            on_device=on_device,
            times=times,
            mixes=self._mixes(grid, on_device, host_share),
            fits=(device_room >= 0) & (host_room >= 0) & (host_blocks >= missing),
            in_time=self._in_time(chunk, fitted, times),
        )

    def _arrival(self, choice: npt.NDArray[np.int64]) -> Number:
        """Seconds in which a layer's weights come, in steps with prompts, on average; 0: none come."""
        choices = self.choices
        sizes = choices.on_bus_at_most[choice], choices.from_buses[choice], choices.from_devices[choice]
        return self.model.layer.arrival(*(size / self.sizes.num_layers for size in sizes))

    def staging(self, grid: Grid, prompt_queries: Number, idle_chunk: Number) -> Staging:
        """Sizes of the device buffers for candidates; `prompt_queries`: prompt tokens of a mini-batch, at most."""
        batch, rows, traffic = grid.batch, grid.rows, self.model.traffic
        streams = self.choices.streams[grid.choice]
        segments = np.where(streams, 1.0, self.choices.num_segments[grid.choice])
        if self.recomputes:
            step_tokens = batch * self.max_model_len
            return Staging(
                batch=batch,
                drafts=grid.drafts,
                rows=rows,
                activation_rows=0,
                queries=rows,
                step_tokens=step_tokens,
                graph_batch=batch,
                table=self.longest,
            )
        # A mini-batch of recomputed requests holds whole requests, and enough tokens to compute longer than its launch.
        min_tokens = max(traffic.at_end, min(_MIN_STREAMED, self._max_prompt_tokens()))
        whole = np.where(np.asarray(grid.recompute) > 0, np.minimum(min_tokens, batch * self.max_model_len), 0)
        return Staging(
            batch=batch,
            drafts=grid.drafts,
            rows=rows,
            activation_rows=np.where(grid.kv_only, 0, np.maximum(rows, grid.absorbed_rows)),
            queries=np.maximum(prompt_queries + grid.queries, whole),
            step_tokens=idle_chunk + grid.queries + np.minimum(grid.recompute, batch * traffic.at_end),
            absorbing=np.where(grid.absorbs, grid.queries, 0),
            graph_batch=batch,
            graph_drafts=np.where(streams, 0, grid.drafts),
            num_segments=segments,
            table=self.longest,
        )

    def _chunks(self, grid: Grid, arrival: Number) -> tuple[Number, Number]:
        """Prompt tokens of a step beside decoding, and without.

        Beside decoding, as many as compute while the weights stream or the host launches, which costs next to nothing,
        or as keep up with the traffic; without, as many as keep the GPU busy meanwhile. Where the bus is busy anyway,
        they may take several mini-batches.
        """
        given, batch = self.config.max_prefill_tokens, grid.batch
        if given is not None or self.recomputes:
            chunk = np.full_like(batch, given or 1)
            return chunk, chunk
        hidden = self.model.hidden_chunk(arrival)
        backlog = np.where(arrival > 0, _STREAMED_BACKLOG, _BACKLOG)
        wanted = np.maximum(hidden, backlog * self.model.prompt_tokens(batch, grid.drafts))
        room = self._max_prompt_tokens()
        part = self.budgets.device // _CHUNK_PART
        idle_room = min(MAX_IDLE_CHUNK, max(MIN_CHUNK, part // (2 * self.sizes.hidden_bytes)))
        chunk = np.clip(wanted, MIN_CHUNK, np.where(arrival > 0, max(room, min(MAX_CHUNK, idle_room)), room))
        idle_chunk = np.maximum(chunk, np.clip(_SPARE * hidden, MIN_IDLE_CHUNK, idle_room))
        every_token = batch * self.max_model_len
        return np.floor(np.minimum(chunk, every_token)), np.floor(np.minimum(idle_chunk, every_token))

    def _max_prompt_tokens(self) -> int:
        """Prompt tokens of a mini-batch where nothing else is asked for: their workspace takes a part of the device."""
        part = self.budgets.device // _CHUNK_PART
        return min(MAX_CHUNK, max(MIN_CHUNK, part // int(query_bytes(self.sizes, 1))))

    def _prompt_queries(self, chunk: Number, idle_chunk: Number, arrival: Number) -> Number:
        """Upper bound of the prompt tokens of a mini-batch.

        Where weights stream, a step may have several mini-batches with prompts. Each has room for `_MIN_STREAMED`
        tokens then, so that it computes longer than its launch takes.
        """
        if self.recomputes:
            return MAX_CHUNK  # bounded by its rows
        if self.config.max_prefill_tokens is not None:
            return chunk
        min_queries = np.where(arrival > 0, np.minimum(_MIN_STREAMED, idle_chunk), 0)
        found: Number = np.minimum(np.maximum(chunk, min_queries), self._max_prompt_tokens())
        return found

    def _chunk_rows(self, grid: Grid, prompt_queries: Number) -> Number:
        """Buffer rows that let `prompt_queries` tokens be one mini-batch, however much of a prompt is cached."""
        if self.recomputes:
            return 0.0 * grid.batch
        longest = self.longest * self.config.block_size
        window = self.sizes.sliding_window
        # A chunk may take the decoding requests' queries too, and sees no more than its window beside.
        cached = longest if window is None else np.minimum(longest, window + grid.queries)
        rows: Number = np.minimum(prompt_queries + cached, grid.batch * longest)
        return rows

    def _needed_blocks(self, batch: Number, chunk: Number, drafts: Number) -> Number:
        """Blocks for one request at full length and the others at the expected one, each with blocks to grow into.

        `chunk`: tokens of one request in a step, at most. A prompt holds what its chunk adds, until the step has ended.
        """
        if self.recomputes:
            return 0 * batch
        growth = np.ceil((1 + np.asarray(drafts)) / self.config.block_size)
        expected = self._held_blocks(self.model.traffic.context, 1 + drafts) + growth - self._shared_blocks
        found: Number = self._held_blocks(self.max_model_len, chunk) + np.maximum(0, np.ceil(batch) - 1) * expected
        return found

    def _usable_blocks(self, grid: Grid, idle_chunk: Number) -> Number:
        """Blocks that all requests hold at full length, or with a step's prompts: more would never be used."""
        batch = grid.batch
        if self.recomputes:
            return 0 * batch
        # Each chunk touches one block more than its tokens fill.
        prompts = np.ceil(idle_chunk / self.config.block_size) + batch
        found: Number = np.minimum(
            batch * self.longest, batch * self._held_blocks(self.max_model_len, 1 + grid.drafts) + prompts
        )
        return found - np.maximum(0, batch - 1) * self._shared_blocks

    def _held_blocks(self, num_tokens: int, chunk: Number = 1) -> Number:
        return self.sizes.held_blocks(num_tokens, self.config.block_size, chunk)

    @property
    def _shared_blocks(self) -> int:
        """Full blocks that all requests hold."""
        return self.model.traffic.shared // self.config.block_size

    def _device_blocks(self, room: Number, share: Number) -> Number:
        if self.config.placement is Placement.HOST:
            return 0.0 * room * share
        return self._blocks(room, share)

    def _blocks(self, room: Number, share: Number) -> Number:
        """Blocks that `room` bytes hold, where `share` of them are activations."""
        found: Number = np.floor(np.maximum(0.0, room) / (self._rows_per_block * token_bytes(self.sizes, share)))
        return found

    def _on_device(self, batch: Floats, blocks: Number, length: int) -> Number:
        """Part of the cached tokens that lies on the device, which fills first; requests have `length` tokens."""
        used = batch * self._held_blocks(length) - np.maximum(0, batch - 1) * self._shared_blocks
        found: Number = np.minimum(1.0, blocks / used)
        return found

    def _host_share(self, candidates: Candidates, kv_only: Bools, room: Number, missing: Number) -> Number:
        """The share at which bus and GPU balance, or the higher one with which the missing blocks fit the host."""
        if len(self.shares) == 1:
            return self.shares[0]
        sizes = self.sizes
        allowed = np.maximum(0.0, room) / (self._rows_per_block * np.maximum(1.0, missing))
        kv, activation = (sizes.mean_row_bytes(kind) for kind in BlockKind)
        min_share = (kv - allowed) / (kv - activation)
        at_zero, at_one = (self.model.work(replace(candidates, host_share=share)) for share in (0.0, 1.0))
        balanced = self.model.balanced_share(at_zero, at_one)
        # Where all tokens in use fit the device, the host takes what overflows later, in the device's mix of kinds.
        wanted = np.where(candidates.on_device < 1, balanced, candidates.device_share)
        share = np.maximum(wanted, np.clip(min_share, 0.0, 1.0))
        rounded: Number = np.where(kv_only, 0.0, np.ceil(share * _SHARES - 1e-9) / _SHARES)
        return rounded

    def _recomputed(self, candidates: Candidates, tokens: Number, staging: Staging) -> Number:
        """Part of the tokens to recompute: where bus and GPU balance, or as configured.

        0 where requests outgrow a mini-batch before they end: an uncached request must fit into one.
        """
        if self.recomputes:
            return 1.0
        traffic, given = self.model.traffic, self.config.recompute_share
        part = np.asarray(tokens) / (candidates.batch * traffic.context)
        max_part = np.minimum(part, 1.0 - candidates.on_device)
        max_part = np.where(staging.queries >= traffic.at_end, max_part, 0.0)
        if given is not None:
            return np.minimum(given, max_part)
        if not np.any(max_part):
            return 0.0 * max_part
        found: Number = np.floor(self.model.balanced_recompute(candidates, max_part) * _SHARES) / _SHARES
        return found

    def _mixes(self, grid: Grid, on_device: Number, host_share: Number) -> Bools:
        share = on_device * grid.device_share + (1 - on_device) * host_share
        found: Bools = np.asarray((share > 0) & (share < 1))
        return found

    def _candidates(self, grid: Grid, device_blocks: Number, chunk: Number, prompt_queries: Number) -> Candidates:
        """Candidates with K and V alone on the host and nothing recomputed; both are decided with their step times."""
        traffic = self.model.traffic
        return Candidates(
            batch=grid.batch,
            streamed=self.choices.on_bus[grid.choice] / self.sizes.num_layers,
            from_buses=self.choices.from_buses[grid.choice] / self.sizes.num_layers,
            from_devices=self.choices.from_devices[grid.choice] / self.sizes.num_layers,
            decode_traffic=self.choices.decode_traffic[grid.choice] / self.sizes.num_layers,
            expert_traffic=self.choices.expert_traffic[grid.choice] / self.sizes.num_layers,
            spared_traffic=self.choices.spared_traffic[grid.choice] / self.sizes.num_layers,
            on_demand=self.choices.on_demand[grid.choice],
            missed=self.choices.missed[grid.choice],
            on_device=self._on_device(grid.batch, device_blocks, traffic.context),
            on_device_at_end=self._on_device(grid.batch, device_blocks, traffic.at_end),
            device_share=grid.device_share,
            host_share=0.0,
            recomputed=0.0,
            chunk=chunk,
            prompt_queries=prompt_queries,
            rows=np.where(grid.absorbs & np.equal(grid.drafts, 0), grid.absorbed_rows, grid.rows),
            absorbs=grid.absorbs,
            drafts=grid.drafts,
        )

    def _fitted(self, chunk: Number, max_chunk: Number, times: StepTimes) -> Number:
        """The chunk for a predicted step: up to `max_chunk` tokens where they compute while the bus is busy anyway.

        It keeps the step within `max_step_time`; without that, it no more than doubles a step on the bus.
        """
        bound, model = self.config.max_step_time, self.model
        if self.config.max_prefill_tokens is None and not self.recomputes:
            hidden = np.minimum(np.floor(model.chunk_within(times.step, times)), max_chunk)
            chunk = np.where(times.bus > 0, np.maximum(chunk, hidden), chunk)
            if bound is None:
                delay = np.maximum(times.step, self.sizes.num_layers * model.hardware.prompt_launch_time)
                doubled = np.maximum(np.floor(model.chunk_within(times.step + delay, times)), MIN_CHUNK)
                chunk = np.where(times.bus > 0, np.minimum(chunk, doubled), chunk)
        if bound is None:
            return chunk
        bounded: Number = np.clip(np.floor(model.chunk_within(bound, times)), 1, chunk)
        return bounded

    def _in_time(self, chunk: Number, fitted: Number, times: StepTimes) -> Bools:
        """Whether each step with `fitted` prompt tokens is within `max_step_time`, and these are not too few."""
        bound = self.config.max_step_time
        if bound is None:
            return np.full(np.shape(times.step), fill_value=True)
        found: Bools = (times.longest_step <= bound * _ROUNDING) & (fitted >= np.minimum(chunk, _MIN_CHUNK))
        return found
