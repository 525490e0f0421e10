"""The executor: computes a step, layer by layer and mini-batch by mini-batch, on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import record_function

from hsrpc.core.batch import Ints, MiniBatch, Step, Work
from hsrpc.core.blocks import PoolId, Tier
from hsrpc.core.plan import REGENERATE_ROWS, SAMPLE_ELEMENTS, Plan
from hsrpc.device.device import Device, Event
from hsrpc.engine.cache import CacheManager, DeviceRows, Staged
from hsrpc.engine.graphs import make_graphs
from hsrpc.engine.weights import ModelWeights, Prefetched, WeightPrefetcher
from hsrpc.engine.worker import Worker
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.model.attention import Attention, InPlaceRows, PackedRows
from hsrpc.model.family import Family, Weights
from hsrpc.model.sampler import PendingSample, Sampled, Sampler, SamplingRow

_RUN_AHEAD = 8
"""Mini-batches of a layer that are launched and not computed yet."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Batch:
    """A mini-batch on the device."""

    hidden: torch.Tensor
    """[n, h] output of the layer computed last."""
    positions: torch.Tensor
    in_place: InPlaceRows | None
    """Of the first requests, with one query each; None: there are none."""
    packed: PackedRows | None
    """Of the requests after them; None: there are none."""
    num_in_place: int
    num_rebuilt: int
    """Rows at the front of both buffers that regeneration turns into one another."""
    new_rows: DeviceRows
    activation_rows: torch.Tensor
    activation_positions: torch.Tensor
    stores: dict[PoolId, DeviceRows]
    sample_rows: torch.Tensor


class _Launched(NamedTuple):
    """A step whose logits are being computed."""

    step: Step
    logits: torch.Tensor


class Executor:
    """Task that takes steps and returns their tokens. It alone computes."""

    def __init__(
        self,
        family: Family,
        weights: ModelWeights,
        prefetcher: WeightPrefetcher,
        cache: CacheManager,
        device: Device,
        *,
        plan: Plan,
    ) -> None:
        self._family = family
        self._fixed = weights.fixed
        self._num_layers = len(weights.layers)
        self._prefetcher = prefetcher
        self._cache = cache
        self._device = device
        self._attention = Attention(
            family.sizes, family.attention_scale, plan.block_size, device.torch_device, family.spec.dtype
        )
        self._graphs = make_graphs(family, weights, cache, self._attention, device, plan=plan)
        self._sampler = Sampler(SAMPLE_ELEMENTS)
        self._eos = frozenset(family.spec.eos_token_ids)
        self._steps: asyncio.Queue[tuple[Step, Step | None]] = asyncio.Queue(1)
        self._results: asyncio.Queue[list[Sampled] | OutOfDeviceMemoryError | None] = asyncio.Queue(1)
        self._launched: _Launched | None = None
        """A step whose logits are under way, ahead of its turn."""
        self._under_way: deque[Event] = deque()
        """Ends of the mini-batches that were launched last."""
        self._num_begun = 0
        self._untaken = 0
        """Cache buffers that the step has still to take."""

    @property
    def runs_ahead(self) -> bool:
        """Steps in place can be launched before the tokens of the step before are known."""
        return self._graphs is not None

    async def run(self) -> None:
        """Compute step after step; ends by cancellation."""
        async with Worker("compute") as worker:
            while True:
                step, ahead = await self._steps.get()
                await self._results.put(await self._compute_step(worker, step, ahead))

    async def execute(self, step: Step, ahead: Step | None = None) -> list[Sampled] | None:
        """Tokens in the order of `step.sampled`; None where the step was abandoned.

        `ahead` is launched before they are known; it is the next step to be executed.

        Raises:
            OutOfDeviceMemoryError: there are none; the executor is ready for the next step.
        """
        if not self._is_graph(step):
            await self._cache.begin(step)
        await self._steps.put((step, ahead))
        result = await self._results.get()
        if isinstance(result, OutOfDeviceMemoryError):
            raise result
        return result

    def _is_graph(self, step: Step) -> bool:
        return self._graphs is not None and step.is_in_place

    async def _compute_step(
        self, worker: Worker, step: Step, ahead: Step | None
    ) -> list[Sampled] | OutOfDeviceMemoryError | None:
        self._untaken = 0
        launched, self._launched = self._launched, None
        try:
            if self._is_graph(step):
                return await self._run_graph(worker, step, launched, ahead)
            return await self._run_layers(worker, step)
        except torch.OutOfMemoryError as error:
            _log.error("a step of %d requests ran out of device memory", len(step.works), exc_info=error)
            step.is_given_up = True
            await self._rewind()
            return OutOfDeviceMemoryError("the step ran out of device memory")

    async def _run_graph(
        self, worker: Worker, step: Step, launched: _Launched | None, ahead: Step | None
    ) -> list[Sampled] | None:
        if step.is_ahead and (launched is None or launched.step is not step):
            return None  # the step before it failed, and with it the tokens to continue with
        pending = await worker.run(partial(self._launch_graphs, step, launched, ahead))
        return await worker.run(pending.result)

    async def _run_layers(self, worker: Worker, step: Step) -> list[Sampled] | None:
        self._num_begun += 1
        self._untaken = self._num_layers * len(step.mini_batches)
        batches = await worker.run(partial(self._begin, step))
        for layer in range(self._num_layers):
            if step.is_abandoned:
                await self._rewind()
                return None
            await self._compute_layer(worker, layer, batches)
        return await worker.run(partial(self._sample, step, batches))

    def _launch_graphs(self, step: Step, launched: _Launched | None, ahead: Step | None) -> PendingSample:
        """Sample `step`, and behind that compute `ahead`."""
        logits = self._launch_graph(step, None) if launched is None else launched.logits
        with self._device.on(self._device.compute):
            pending = self._sampler.launch(logits, [self._row(work) for work in step.sampled])
        if ahead is not None:
            self._launched = _Launched(ahead, self._launch_graph(ahead, pending.on_device))
        return pending

    def _launch_graph(self, step: Step, sampled: torch.Tensor | None) -> torch.Tensor:
        assert self._graphs is not None  # asked before
        device = self._device
        logits = self._graphs.run(step.mini_batches[0], sampled)
        device.wait(device.store, device.record(device.compute))
        self._cache.stored()
        return logits

    async def _rewind(self) -> None:
        """Leave the step where it is: take what is still loaded for it, and begin the next sweep over the weights."""
        await self._cache.drain(self._untaken)
        self._prefetcher.restart(self._num_begun)

    async def _compute_layer(self, worker: Worker, layer: int, batches: Sequence[_Batch]) -> None:
        weights = await self._prefetcher.take(layer)
        done = weights.loaded
        try:
            for batch in batches:
                done = await self._compute_batch(worker, weights, batch)
        finally:
            self._prefetcher.give_back(weights, done)

    async def _compute_batch(self, worker: Worker, weights: Prefetched, batch: _Batch) -> Event:
        """When the weights are no longer read."""
        staged = await self._cache.take()
        self._untaken -= 1
        attended = staged.loaded
        try:
            attended, done = await worker.run(partial(self._compute, weights, staged, batch))
        finally:
            self._cache.give_back(staged, attended)
        return done

    def _begin(self, step: Step) -> list[_Batch]:
        with self._device.on(self._device.compute):
            return [self._upload(batch) for batch in step.mini_batches]

    def _upload(self, batch: MiniBatch) -> _Batch:
        upload = self._device.upload
        positions = upload(batch.positions)
        return _Batch(
            hidden=self._family.embed(self._fixed, upload(batch.token_ids), positions),
            positions=positions,
            in_place=self._in_place_rows(batch),
            packed=self._packed_rows(batch),
            num_in_place=batch.in_place.num_requests,
            num_rebuilt=batch.in_place.num_rebuilt,
            new_rows=self._cache.upload_rows(batch.new_rows),
            activation_rows=upload(batch.activation_rows),
            activation_positions=upload(batch.activation_positions),
            stores=self._cache.upload(batch.stores),
            sample_rows=upload(batch.sample_rows),
        )

    def _in_place_rows(self, batch: MiniBatch) -> InPlaceRows | None:
        rows, upload = batch.in_place, self._device.upload
        if not rows.num_requests:
            return None
        key_starts = batch.key_starts[: rows.num_requests + 1]
        return InPlaceRows(
            tables=upload(rows.tables.astype(np.int32)),
            counts=upload(rows.counts.astype(np.int32)),
            key_starts=upload(key_starts.astype(np.int32)),
            rebuilt_starts=upload(rows.rebuilt_starts.astype(np.int32)),
            most_keys=int((rows.counts + np.diff(rows.rebuilt_starts) + np.diff(key_starts)).max()),
        )

    def _packed_rows(self, batch: MiniBatch) -> PackedRows | None:
        first, upload = batch.in_place.num_requests, self._device.upload
        if first == len(batch.works):
            return None
        query_starts, key_starts = batch.query_starts[first:] - first, batch.key_starts[first:]
        return PackedRows(
            query_starts=upload(query_starts.astype(np.int32)),
            key_starts=upload(key_starts.astype(np.int32)),
            query_offsets=tuple(query_starts.tolist()),
            key_offsets=tuple(key_starts.tolist()),
            max_queries=_longest(query_starts),
            max_keys=_longest(key_starts),
        )

    def _compute(self, weights: Prefetched, staged: Staged, batch: _Batch) -> tuple[Event, Event]:
        """One layer of one mini-batch: events when the cache buffers, and when the weights, are no longer read."""
        device, family, w, buffers = self._device, self._family, weights.tensors, staged.buffers
        self._keep_pace()
        device.wait(device.compute, weights.loaded)
        device.wait(device.compute, staged.loaded)
        with device.on(device.compute):
            with record_function("hsrpc.project"):
                x = family.attention_input(w, batch.hidden)
                queries, kv = family.queries_keys_values(w, x, batch.positions)
                device.copy_rows(buffers.kv, batch.new_rows.target, kv, batch.new_rows.source)
                self._cache.store(Tier.DEVICE, weights.layer, batch.stores, kv, x)
            with record_function("hsrpc.regenerate"):
                self._regenerate(w, staged, batch)
            with record_function("hsrpc.attend"):
                attended = self._attend(queries, weights.layer, buffers.kv, batch)
            freed = device.record(device.compute)
            with record_function("hsrpc.finish"):
                batch.hidden = family.finish_layer(w, batch.hidden, attended)
            done = device.record(device.compute)
        self._under_way.append(done)
        device.wait(device.store, freed)
        with device.on(device.store):
            self._cache.store(Tier.HOST, weights.layer, batch.stores, kv, x)
        return freed, done

    def _keep_pace(self) -> None:
        """Launch no further ahead than keeps the device busy: a full launch queue blocks with the interpreter held."""
        while len(self._under_way) > _RUN_AHEAD:
            self._device.synchronize(self._under_way.popleft())

    def _attend(self, queries: torch.Tensor, layer: int, kv: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """[n, q]"""
        parts = []
        if batch.in_place is not None:
            pool = self._cache.device_kv(layer)
            parts.append(self._attention.in_place(queries[: batch.num_in_place], pool, kv, batch.in_place))
        if batch.packed is not None:
            parts.append(self._attention.packed(queries[batch.num_in_place :], kv, batch.packed))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _regenerate(self, w: Weights, staged: Staged, batch: _Batch) -> None:
        """Rebuild K and V of the cached activations where attention reads them; rows of chunks are copied there."""
        total, in_front, kv = len(batch.activation_rows), batch.num_rebuilt, staged.buffers.kv
        pieces = [*range(0, in_front, REGENERATE_ROWS), *range(in_front, total, REGENERATE_ROWS), total]
        for start, end in pairwise(pieces):
            rows = slice(start, end)
            out = kv[rows] if start < in_front else torch.empty_like(kv[rows])
            x, positions = staged.buffers.activations[rows], batch.activation_positions[rows]
            self._family.keys_values(w, x, positions, out)
            if start >= in_front:
                kv.index_copy_(0, batch.activation_rows[rows], out)

    def _sample(self, step: Step, batches: Sequence[_Batch]) -> list[Sampled]:
        """Tokens of the works that sample; waits for the device, since the next step depends on them."""
        self._cache.stored()
        sampling = step.sampled
        with self._device.on(self._device.compute):
            hidden = torch.cat([batch.hidden.index_select(0, batch.sample_rows) for batch in batches])
            if not sampling:
                self._device.synchronize(self._device.record(self._device.compute))
                return []
            logits = self._family.logits(self._fixed, hidden)
            return self._sampler.launch(logits, [self._row(work) for work in sampling]).result()

    def _row(self, work: Work) -> SamplingRow:
        request = work.request
        return SamplingRow(
            params=request.params,
            prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
            output_token_ids=request.output_token_ids,
            seed=request.params.seed or 0,
            stop_ids=self._eos | frozenset(request.params.stop_token_ids),
        )


def _longest(starts: Ints) -> int:
    return int(np.diff(starts).max())
