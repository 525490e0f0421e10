"""The executor: computes steps on a thread of its own, and sees to it that the other lanes' tasks run theirs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch.autograd import profiler

from hsrpc.device.device import Device, Event
from hsrpc.engine.forward import Forward, Pass
from hsrpc.engine.gpus.contract import StepResult
from hsrpc.engine.graphs import DecodeGraphs
from hsrpc.engine.lanes import StepRun
from hsrpc.engine.pace import Pace
from hsrpc.engine.scorer import Scorer
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.engine.worker import Worker
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.model.sampler import PendingSample, Sampled, Sampler
from hsrpc.plan.plan import SAMPLE_ELEMENTS
from hsrpc.request import TokenLogprob
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.step import Packed, Scheduled, Step, StopFlag
from hsrpc.schedule.sweep import NOTHING_CARRIED, Carried, Lane, Op, OpKind

_log = logging.getLogger(__name__)
_OUT_OF_MEMORY = "the step ran out of device memory"


class _Launched(NamedTuple):
    """A step that is being computed."""

    step_id: int
    on_device: Pass


class _Request(NamedTuple):
    """What the executor's task is asked for."""

    run: StepRun
    ahead: Step | None


@dataclass(slots=True)
class _Before:
    """What the step before has left."""

    carried: Carried = NOTHING_CARRIED
    events: Sequence[Event] = ()
    """Events of its operations, by their numbers; empty where it did not run to its end."""
    barrier: tuple[Event, ...] = ()
    """All that it has launched: loads of the next step must not overwrite what it reads, nor read what it stores."""


class Executor:
    """Task that takes steps and returns their tokens. It alone computes."""

    def __init__(
        self,
        assembler: Assembler,
        device: Device,
        *,
        prefetcher: WeightPrefetcher,
        cache: CacheManager,
        forward: Forward,
        graphs: DecodeGraphs | None,
        score_rows: int,
    ) -> None:
        """`graphs`: for steps in place, where there are such; `score_rows`: rows of logits of prompts at a time."""
        self.forward = forward
        self._assembler = assembler
        self._prefetcher = prefetcher
        self._cache = cache
        self._device = device
        self._graphs = graphs
        self._sampler = Sampler(device.fetch, SAMPLE_ELEMENTS)
        self._scorer = Scorer(forward, self._sampler, score_rows)
        self._pace = Pace(device, assembler.max_queries)
        self._streams_weights = any(layer.is_streamed for layer in assembler.layers)
        self._requests: asyncio.Queue[_Request] = asyncio.Queue(1)
        self._results: asyncio.Queue[StepResult | OutOfDeviceMemoryError | None] = asyncio.Queue(1)
        self._launched: _Launched | None = None
        """A step whose logits are under way, ahead of its turn."""
        self._before = _Before()

    @property
    def runs_ahead(self) -> bool:
        """Steps in place can be launched before the tokens of the step before are known."""
        return self._graphs is not None and not self._graphs.waits

    @property
    def num_queued(self) -> int:
        """Steps, and parts of them, that are handed to a task and not taken, and results not taken."""
        queues = (self._requests, self._results, self._prefetcher.steps, self._cache.steps)
        return sum(queue.qsize() for queue in queues)

    async def run(self) -> None:
        """Compute step after step; ends by cancellation."""
        async with Worker("compute") as worker:
            while True:
                request = await self._requests.get()
                await self._results.put(await self._compute(worker, request))

    def assemble(self, scheduled: Scheduled) -> Step:
        """The step, to be executed next; it takes milliseconds for a large batch."""
        return self._assembler.assemble(scheduled, self._before.carried)

    def order(self, packed: Packed, stop: StopFlag) -> Step:
        """The step of these arrays, to be executed next."""
        return self._assembler.order(packed, stop, self._before.carried)

    async def execute(self, step: Step, ahead: Step | None = None) -> StepResult | None:
        """What the step gives; None where it was abandoned.

        `ahead` is launched before they are known; it is the next step to be executed.

        Raises:
            OutOfDeviceMemoryError: there are none; the executor is ready for the next step.
        """
        run = StepRun(step, self._device, self._before.events, self._before.barrier)
        if self._streams_weights:
            await self._prefetcher.steps.put(run)
            await self._cache.steps.put(run)
        await self._requests.put(_Request(run, ahead))
        result = await self._results.get()
        if isinstance(result, OutOfDeviceMemoryError):
            raise result
        return result

    async def _compute(self, worker: Worker, request: _Request) -> StepResult | OutOfDeviceMemoryError | None:
        step = request.run.step
        try:
            return await self._compute_step(worker, request)
        except torch.OutOfMemoryError as error:
            _log_out_of_memory(step, error)
            return OutOfDeviceMemoryError(_OUT_OF_MEMORY)

    async def _compute_step(self, worker: Worker, request: _Request) -> StepResult | OutOfDeviceMemoryError | None:
        run, ahead = request
        step = run.step
        launched, self._launched = self._launched, None
        if self._graphs is not None and step.is_in_place:
            if step.is_ahead and (launched is None or launched.step_id != step.step_id):
                return None  # the step before it failed, and with it the tokens to continue with
            sampled = await worker.run(partial(self._run_graphs, step, launched, ahead))
            return None if sampled is None else StepResult(sampled, [])
        state = _Computing(step)
        await self._run_lanes(worker, run, state)
        await self._end(worker, run, goes_on=run.step.ops.is_gathered or not state.is_out_of_memory)
        if state.is_out_of_memory:
            return OutOfDeviceMemoryError(_OUT_OF_MEMORY)
        return None if state.sampled is None else StepResult(state.sampled, state.scored)

    async def _run_lanes(self, worker: Worker, run: StepRun, state: _Computing) -> None:
        """Run the compute lane; of a step that waits for no weights, all lanes."""
        launch = partial(self._launch_or_stop, state)
        if self._streams_weights:
            await run.run(Lane.COMPUTE, worker, launch)
            return
        self._cache.begin(run.step)
        # Going from thread to thread takes longer than launching it.
        await worker.run(partial(run.run_here, launch))

    async def _end(self, worker: Worker, run: StepRun, *, goes_on: bool) -> None:
        """Take what the step leaves to the next one, once all lanes have launched what they will.

        `goes_on`: the next list may go on behind this one, where that is whole.
        """
        if self._streams_weights:
            is_whole = all([await run.ended.get() for _ in Lane]) and goes_on
            self._before.carried = run.step.ops.carries if is_whole else NOTHING_CARRIED
            self._before.events = run.events if is_whole else ()
        if run.step.stop.is_set:
            await worker.run(self._join_streams)

    def _join_streams(self) -> None:
        """Let what follows a stopped step, on any stream, come after all of it: nobody waited for all of its events."""
        device = self._device
        device.wait(device.compute, device.record(device.load))
        self._note_end()

    def _launch_or_stop(self, state: _Computing, op: Op) -> None:
        """Launch an operation; where it finds no memory the step is stopped, and what is left of it passed over."""
        if state.is_out_of_memory:
            return
        try:
            self._launch(state, op)
        except torch.OutOfMemoryError as error:
            _log_out_of_memory(state.step, error)  # here: it must not be kept with what its functions hold
            state.is_out_of_memory = True
            state.step.stop.set()

    def _launch(self, state: _Computing, op: Op) -> None:
        step = state.step
        with _range(op.kind):
            match op.kind:
                case OpKind.LOAD_BLOCKS:
                    self._cache.launch(op)
                case OpKind.LOAD_EXPERTS:
                    self._prefetcher.launch(op)
                case OpKind.EMBED:
                    state.on_device = self.forward.upload(step.mini_batches, step.ops.group_starts)
                    self.forward.launch(op, state.on_device)
                case OpKind.SCORE:
                    scores = step.mini_batches[op.batch].scores
                    assert scores is not None  # else the list does not ask for it
                    state.scored += self._scorer.score(scores, state.on_device.batches[op.batch])
                case OpKind.SAMPLE:
                    state.sampled = self._sample(step, state.on_device)
                case _:
                    if op.batch >= 0:
                        self._pace.turn(op.place, step.mini_batches[op.batch].num_queries)
                    self.forward.launch(op, state.on_device)

    def _sample(self, step: Step, on_device: Pass) -> list[Sampled]:
        """Tokens of the rows that are sampled; waits for the device, since the next step depends on them."""
        self._note_end()
        if not step.sampling:
            self._device.synchronize(self._device.record(self._device.compute))
            return []
        return _results(self._launch_sampling(step, on_device))

    def _launch_sampling(self, step: Step, on_device: Pass) -> list[PendingSample]:
        """As many rows at a time as there is room for; of a step without drafts all."""
        rows = iter(step.sampling)
        pending = []
        for logits in self.forward.logits(on_device):
            pending.append(self._sampler.launch(logits, list(islice(rows, len(logits)))))
            del logits  # its memory is the next rows'
        return pending

    def _note_end(self) -> None:
        """All of a step is launched: loads of the next one come after it."""
        device = self._device
        self._before.barrier = (device.record(device.compute), device.record(device.store))

    def _run_graphs(self, step: Step, launched: _Launched | None, ahead: Step | None) -> list[Sampled] | None:
        """Tokens of `step`; behind them `ahead` is computed already. None where it was stopped."""
        on_device = self._launch_graphs(step, None) if launched is None else launched.on_device
        if on_device is None:
            return None
        with self._device.on(self._device.compute):
            pending = self._launch_sampling(step, on_device)
        if ahead is not None:
            [all_rows] = pending  # a step that another is launched behind has no drafts
            coming = self._launch_graphs(ahead, all_rows.on_device)
            self._launched = None if coming is None else _Launched(ahead.step_id, coming)
        return _results(pending)

    def _launch_graphs(self, step: Step, sampled: torch.Tensor | None) -> Pass | None:
        assert self._graphs is not None  # asked before
        on_device = self._graphs.run(step.mini_batches[0], sampled, step.stop)
        self._note_end()
        return on_device


@dataclass(slots=True)
class _Computing:
    """A step in the compute lane."""

    step: Step
    on_device: Pass = field(default_factory=lambda: Pass([]))
    """Mini-batches of the step on the device, from the EMBED operation on."""
    sampled: list[Sampled] | None = None
    """Tokens of the step; None: it is not computed to its end."""
    scored: list[TokenLogprob | None] = field(default_factory=list)
    """Log-probabilities of the step's prompt tokens, as far as they are computed."""
    is_out_of_memory: bool = False
    """Why it was not."""


def _results(pending: Sequence[PendingSample]) -> list[Sampled]:
    """What was sampled, one part after the other; waits for the device."""
    return [sampled for part in pending for sampled in part.result()]


def _log_out_of_memory(step: Step, error: torch.OutOfMemoryError) -> None:
    _log.error("a step of %d requests ran out of device memory", step.counts.requests, exc_info=error)


def _range(kind: OpKind) -> AbstractContextManager[object]:
    """A range for torch's profiler while that runs: it takes the host as long as a small kernel."""
    return profiler.record_function(f"hsrpc.{kind.value}") if profiler._is_profiler_enabled else nullcontext()
