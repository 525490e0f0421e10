"""The executor: computes a step, layer by layer and mini-batch by mini-batch, on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from hsrpc.device.device import Device, Event
from hsrpc.engine.forward import DeviceBatch, Forward
from hsrpc.engine.graphs import make_graphs
from hsrpc.engine.tasks.cache import CacheManager, Staged
from hsrpc.engine.tasks.weights import Prefetched, WeightPrefetcher
from hsrpc.engine.weights import ModelWeights
from hsrpc.engine.worker import Worker
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.model.attention import Attention
from hsrpc.model.family import Family
from hsrpc.model.sampler import Sampled, Sampler, SamplingRow
from hsrpc.plan.plan import SAMPLE_ELEMENTS, Plan
from hsrpc.schedule.step import Step, Work

_log = logging.getLogger(__name__)


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
        attention: Attention,
        plan: Plan,
    ) -> None:
        self._family = family
        self._fixed = weights.fixed
        self._layers = weights.layers
        self._streams_weights = any(plan.streamed_bytes)
        self._num_layers = len(weights.layers)
        self._prefetcher = prefetcher
        self._cache = cache
        self._device = device
        self.forward = Forward(family, weights, cache, attention, device, max_queries=plan.buffers.queries)
        self._graphs = make_graphs(family, weights, cache, attention, device, plan=plan)
        self._sampler = Sampler(SAMPLE_ELEMENTS)
        self._eos = frozenset(family.spec.eos_token_ids)
        self._steps: asyncio.Queue[tuple[Step, Step | None]] = asyncio.Queue(1)
        self._results: asyncio.Queue[list[Sampled] | OutOfDeviceMemoryError | None] = asyncio.Queue(1)
        self._launched: _Launched | None = None
        """A step whose logits are under way, ahead of its turn."""
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
        if self._streams_weights:
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
            if self._streams_weights:
                return await self._run_layers(worker, step)
            return await self._run_resident(worker, step)
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
        return await worker.run(partial(self._sample_graphs, step, launched, ahead))

    async def _run_layers(self, worker: Worker, step: Step) -> list[Sampled] | None:
        self._num_begun += 1
        self._untaken = self._num_layers * len(step.parts)
        batches = await worker.run(partial(self._begin, step))
        for layer in range(self._num_layers):
            if step.is_abandoned:
                await self._rewind()
                return None
            await self._compute_layer(worker, layer, batches)
        return await worker.run(partial(self._sample, step, batches))

    async def _run_resident(self, worker: Worker, step: Step) -> list[Sampled] | None:
        slots = self._cache.borrow()
        try:
            return await worker.run(partial(self._sweep, step, slots))
        finally:
            for staged in slots:
                self._cache.give_back(staged, staged.loaded)

    def _sweep(self, step: Step, slots: list[Staged]) -> list[Sampled] | None:
        """All layers of a step that waits for no weights: blocks are loaded from here as well.

        Going from thread to thread with each mini-batch takes longer than launching it. `slots` has buffers with the
        events after which they are free, now and at the end.
        """
        device, compute, cache = self._device, self._device.compute, self._cache
        loads = cache.prepare(step)
        todo = [(layer, number) for layer in range(self._num_layers) for number in range(len(loads))]

        def load(place: int) -> None:
            if place < len(todo):
                layer, number = todo[place]
                slots[place % len(slots)] = cache.load(layer, loads[number], slots[place % len(slots)])

        for place in range(len(slots)):
            load(place)
        with device.on(compute):
            batches = self.forward.upload(step.mini_batches)
        for place, (layer, number) in enumerate(todo):
            if number == 0 and step.is_abandoned:
                return None
            weights = Prefetched(layer, self._layers[layer].resident, None, None, 0)
            staged = slots[place % len(slots)]
            attended, _ = self.forward.compute(weights, staged, batches[number])
            slots[place % len(slots)] = Staged(staged.buffers, attended)
            load(place + len(slots))
        return self._sample(step, batches)

    def _sample_graphs(self, step: Step, launched: _Launched | None, ahead: Step | None) -> list[Sampled]:
        """Tokens of `step`; behind them `ahead` is computed already."""
        logits = self._launch_graph(step, None) if launched is None else launched.logits
        with self._device.on(self._device.compute):
            pending = self._sampler.launch(logits, list(map(self._row, step.sampled)))
        if ahead is not None:
            self._launched = _Launched(ahead, self._launch_graph(ahead, pending.on_device))
        return pending.result()

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

    async def _compute_layer(self, worker: Worker, layer: int, batches: Sequence[DeviceBatch]) -> None:
        weights = await self._prefetcher.take(layer)
        done = weights.loaded
        try:
            if weights.decodings:
                await worker.run(partial(self.forward.decode_weights, weights))
            for batch in batches:
                done = await self._compute_batch(worker, weights, batch)
        finally:
            self._prefetcher.give_back(weights, done)

    async def _compute_batch(self, worker: Worker, weights: Prefetched, batch: DeviceBatch) -> Event:
        """When the weights are no longer read."""
        staged = await self._cache.take()
        self._untaken -= 1
        attended = staged.loaded
        try:
            attended, done = await worker.run(partial(self.forward.compute, weights, staged, batch))
        finally:
            self._cache.give_back(staged, attended)
        return done

    def _begin(self, step: Step) -> list[DeviceBatch]:
        with self._device.on(self._device.compute):
            return self.forward.upload(step.mini_batches)

    def _sample(self, step: Step, batches: Sequence[DeviceBatch]) -> list[Sampled]:
        """Tokens of the works that sample; waits for the device, since the next step depends on them."""
        self._cache.stored()
        sampling = step.sampled
        with self._device.on(self._device.compute):
            hidden = torch.cat([batch.sampled for batch in batches])
            if not sampling:
                self._device.synchronize(self._device.record(self._device.compute))
                return []
            logits = self._family.logits(self._fixed, hidden)
            return self._sampler.launch(logits, list(map(self._row, sampling))).result()

    def _row(self, work: Work) -> SamplingRow:
        request = work.request
        params = request.params
        return SamplingRow(params, request.token_ids, request.num_prompt_tokens, params.seed or 0, self._eos)
