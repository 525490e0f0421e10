"""A rank: the process of one of several GPUs. It computes its part of each step, as long as the front process is there.

It has the same tasks as an engine with one GPU. What it lacks is the front: scheduler, tokenizer, output.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from hsrpc.device.device import Device, open_device
from hsrpc.device.group import Connected
from hsrpc.draft.drafter import Drafter
from hsrpc.engine.gpus.contract import GpuFacts, StepResult, Task
from hsrpc.engine.gpus.drafts import NearDrafter
from hsrpc.engine.gpus.messages import (
    Allowed,
    Begin,
    Draft,
    Execute,
    Executed,
    Failed,
    Forget,
    Line,
    Load,
    Loading,
    Measured,
    Ready,
    ResetCounts,
    Stop,
)
from hsrpc.engine.gpus.one import OneGpu
from hsrpc.engine.gpus.pulse import Heart
from hsrpc.engine.model_files import ModelFiles
from hsrpc.engine.startup import measure, open_gpu
from hsrpc.engine.worker import Worker
from hsrpc.errors import EngineFaultError, HsrpcError, OutOfDeviceMemoryError
from hsrpc.schedule.step import Step, StopFlag

_log = logging.getLogger(__name__)


class _Masks:
    """What the constrained rows of a step may sample, once the front process has told."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._masks: Mapping[int, npt.NDArray[np.int32]] = {}

    def tell(self, masks: Mapping[int, npt.NDArray[np.int32]]) -> None:
        self._masks = masks
        self._told.set()

    def of(self, row: int) -> npt.NDArray[np.int32]:
        """Wait until it is told."""
        self._told.wait()
        return self._masks[row]


@dataclass(frozen=True, slots=True)
class _TheirMatcher:
    """A matcher that the front process has."""

    masks: _Masks
    row: int
    failure: str | None = None

    def push(self, token_id: int) -> None:
        raise AssertionError("the front process takes note of tokens")

    def allowed(self, num_drafted: int = 0) -> npt.NDArray[np.int32]:
        return self.masks.of(self.row)  # of a row behind drafted tokens: what may come behind these

    def matched(self, draft: Sequence[int]) -> int:
        raise AssertionError("the front process drafts")


@dataclass(slots=True)
class _Work:
    """A step that was asked for."""

    execute: Execute
    stop: StopFlag = field(default_factory=StopFlag)
    masks: _Masks = field(default_factory=_Masks)


class Rank:
    """One of the ranks, with its end of the line to the front process."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._loads: asyncio.Queue[Load] = asyncio.Queue()
        self._works: asyncio.Queue[_Work] = asyncio.Queue()
        self._drafts: asyncio.Queue[Draft | Forget] = asyncio.Queue()
        self._under_way: dict[int, _Work] = {}
        """Steps that were asked for and not executed, by id."""
        self._number = 0
        self._gpu: OneGpu | None = None

    async def run(self) -> None:
        """Load and compute as the front process asks; ends with this process."""
        begin: Begin = await self._line.receive()
        self._number = begin.rank
        logging.basicConfig(format=f"gpu {begin.rank}: %(levelname)s: %(message)s")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._told(self._read))
            with self._telling():
                gpu, drafter = await self._open(begin)
                self._gpu = gpu
                for task in gpu.tasks:
                    group.create_task(self._told(task))
                if drafter is not None:
                    group.create_task(self._told(partial(self._draft, NearDrafter(drafter))))
                self._line.send(Ready(gpu.warms_up, gpu.runs_ahead, *gpu.uses()))
                await self._compute(gpu)

    async def _told(self, task: Task) -> None:
        with self._telling():
            await task()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell at once what goes wrong here: this process may wait long for threads of its other tasks."""
        try:
            yield
        except Exception as error:
            _log.error("this rank ends", exc_info=error)
            self._line.send(Failed(_known(error, self._number)))
            raise

    async def _open(self, begin: Begin) -> tuple[OneGpu, Drafter | None]:
        """The GPU with the model, and the draft model beside it where there is one."""
        device, joined = await asyncio.to_thread(_join, begin)
        model = await asyncio.to_thread(ModelFiles.read, begin.config, device.torch_device)
        machine = await asyncio.to_thread(measure, device, model.spec, joined)
        self._line.send(Measured(GpuFacts(device.uuid, machine)))
        load = await self._loads.get()
        spec, tell = model.spec_of(load.choice, load.plan), asyncio.get_running_loop().call_soon_threadsafe

        def note(done: int, total: int) -> None:
            tell(self._line.send, Loading(done, total))

        stop, draft_model = threading.Event(), load.draft_model
        opening = partial(open_gpu, spec, load.plan, model.source, device, stop)
        gpu = await asyncio.to_thread(opening, group=joined, progress=note)
        return gpu, None if draft_model is None else await asyncio.to_thread(draft_model.open, device, stop)

    async def _read(self) -> None:
        """Take messages; without the front process there is nothing left to do."""
        while True:
            try:
                message = await self._line.receive()
            except EOFError:
                os._exit(0)  # whatever its threads wait for
            match message:
                case Load():
                    self._loads.put_nowait(message)
                case Execute():
                    work = self._under_way[message.packed.step_id] = _Work(message)
                    self._works.put_nowait(work)
                case Draft() | Forget():
                    self._drafts.put_nowait(message)
                case Allowed(step_id, masks):
                    self._under_way[step_id].masks.tell(masks)
                case Stop(step_id):
                    if step_id in self._under_way:
                        self._under_way[step_id].stop.set()
                case ResetCounts():
                    assert self._gpu is not None  # it is ready
                    self._gpu.reset_counts()

    async def _draft(self, drafter: NearDrafter) -> None:
        """Draft as the front process asks, between two steps."""
        async with Worker("drafts") as worker:
            while True:
                message = await self._drafts.get()
                if isinstance(message, Draft):
                    self._line.send(await worker.run(partial(drafter.draft, message)))
                else:
                    await worker.run(partial(drafter.forget, message))

    async def _compute(self, gpu: OneGpu) -> None:
        ahead: Step | None = None
        while True:
            work = await self._works.get()
            step_id, step = work.execute.packed.step_id, _step(gpu, work, ahead)
            coming = work.execute.ahead
            ahead = None if coming is None else gpu.executor.order(coming, StopFlag())
            result = await _execute(gpu, step, ahead)
            del self._under_way[step_id]
            self._line.send(Executed(step_id, result, *gpu.uses()))


def _join(begin: Begin) -> tuple[Device, Connected]:
    """The device, and the group; all measure at once then."""
    device = open_device(begin.config.device)
    joined = Connected(begin.meeting, begin.rank, begin.size, device.torch_device)
    joined.meet()
    return device, joined


def _step(gpu: OneGpu, work: _Work, ahead: Step | None) -> Step:
    """The step that was asked for; its list and arrays may have come `ahead`."""
    packed = work.execute.packed
    if packed.is_ahead:
        assert ahead is not None  # it came with the step before
        step = ahead
        step.stop = work.stop
    else:
        step = gpu.executor.order(packed, work.stop)
    rows = list(packed.sampling)
    for row in work.execute.constrained:
        rows[row] = rows[row]._replace(matcher=_TheirMatcher(work.masks, row))
    step.sampling = tuple(rows)
    return step


async def _execute(gpu: OneGpu, step: Step, ahead: Step | None) -> StepResult | OutOfDeviceMemoryError | None:
    """What the step gives; `ahead` may have nothing to compute here."""
    try:
        return await gpu.execute(step, ahead if ahead is not None and ahead.is_in_place else None)
    except OutOfDeviceMemoryError as error:
        return error


def _known(error: Exception, number: int) -> HsrpcError:
    """What the front process is told: what nobody expects is a fault of GPU `number`."""
    if isinstance(error, HsrpcError):
        return error
    return EngineFaultError(f"GPU {number} failed: {type(error).__name__}: {error}")


async def serve(end: socket.socket, pulse: int) -> None:
    """Be the rank that the process at the other `end` asks for; `pulse`: file descriptor to which it beats."""
    Heart(pulse, asyncio.get_running_loop())
    line = await Line.over(end)
    with suppress(BaseExceptionGroup):  # it is told
        await Rank(line).run()
    await line.writer.drain()


def main() -> None:
    """Serve over the socket and the pipe whose numbers are given; ends at once, whatever threads are left."""
    end, pulse = map(int, sys.argv[1:])
    asyncio.run(serve(socket.socket(fileno=end), pulse))
    os._exit(1)


if __name__ == "__main__":
    main()
