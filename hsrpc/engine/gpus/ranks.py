"""Several GPUs, each in a process of its own: what the front process has of them.

It starts the ranks, sends each its part of every step, and puts together what they give. A rank that ends, or that
says nothing any more, is the end of all: the others wait for what it would have loaded.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

import hsrpc
from hsrpc.config import EngineConfig
from hsrpc.device.group import LostError, MeetingPlace
from hsrpc.draft.drafter import Drafter
from hsrpc.engine.draft_model import PlannedDraftModel
from hsrpc.engine.gpus.contract import GpuFacts, GpuUse, Moved, StepResult, Task
from hsrpc.engine.gpus.drafts import FarDrafter
from hsrpc.engine.gpus.messages import (
    Allowed,
    Begin,
    Drafted,
    Execute,
    Executed,
    Failed,
    Line,
    Load,
    Loading,
    Measured,
    Ready,
    ResetCounts,
    Stop,
)
from hsrpc.engine.gpus.pulse import SERVING, Pulse
from hsrpc.engine.loading_progress import LoadingProgress
from hsrpc.errors import EngineFaultError, OutOfDeviceMemoryError
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.schedule.assemble import pack_step
from hsrpc.schedule.step import Packed, Scheduled, StopFlag
from hsrpc.schedule.windows import LayerWindows

STEP_LIMIT = 10.0
"""Times a step may take of what is predicted of the longest: contexts may be longer, and the host busy."""
MIN_STEP_LIMIT = 30.0
"""Seconds that it may take besides: kernels are compiled with the first steps."""
_CAUSE_SECONDS = 0.1
"""In which a rank that has failed is heard of, once another one misses it."""
RANK_MODULE = "hsrpc.engine.gpus.rank"
_SETTINGS = {
    "NCCL_NVLS_ENABLE": "0",  # multicast hangs where the host does not have it set up
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}
_VISIBLE = "CUDA_VISIBLE_DEVICES"

M = TypeVar("M")
Mask: TypeAlias = Callable[[], npt.NDArray[np.int32]]
"""What a row may sample, as `Matcher.allowed` has it; waits until that is known."""


@dataclass(slots=True, kw_only=True)
class JointStep(Packed):
    """A step of all GPUs: its mini-batches are those of its parts."""

    parts: tuple[Packed, ...]
    """One for each GPU, without rows to sample."""
    stop: StopFlag


class RankProcess:
    """A rank as the front process sees it."""

    def __init__(self, number: int, process: Process, line: Line, beats: int) -> None:
        """`beats`: file descriptor from which they come."""
        self._number = number
        self._process = process
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._pulse = Pulse(beats, process.pid, self._fail)
        self._executed: asyncio.Queue[Executed] = asyncio.Queue()
        self._drafted: SimpleQueue[Drafted | None] = SimpleQueue()

    @classmethod
    async def start(cls, number: int) -> Self:
        """Start the process of a GPU."""
        ours, theirs = socket.socketpair()
        beats, pulse = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", RANK_MODULE, str(theirs.fileno()), str(pulse)),
                stdin=DEVNULL,
                stdout=DEVNULL,
                pass_fds=[theirs.fileno(), pulse],
                env=_environment(number),
                start_new_session=True,  # Ctrl-C is for the front process, which ends this one
            )
        except BaseException:
            ours.close()
            os.close(beats)
            raise
        finally:
            theirs.close()
            os.close(pulse)
        return cls(number, process, await Line.over(ours), beats)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: tuple[Any, ...]) -> None:
        self._line.send(message)

    async def expect(self, kind: type[M], progress: LoadingProgress | None = None) -> M:
        """The next message of that kind; before there are steps. `progress` is told what it loads until then.

        Raises:
            HsrpcError: the rank cannot go on.
        """
        while not isinstance(message := await self._receive(), kind):
            if progress is not None and isinstance(message, Loading):
                progress.note(self._number, message.done, message.total)
        return message

    @property
    def has_executed(self) -> bool:
        """`executed` has something to give."""
        return not self._executed.empty()

    async def executed(self) -> Executed:
        """What the step gives that was asked for."""
        return await self._executed.get()

    def drafted(self) -> Drafted | None:
        """Wait for what was asked to be drafted, on another thread; None: the rank has ended.

        One that takes as long as no step should is ended.
        """
        try:
            return self._drafted.get(timeout=MIN_STEP_LIMIT)
        except Empty:
            self._loop.call_soon_threadsafe(self._fail, f"has not drafted after {MIN_STEP_LIMIT:g} s")
            return None

    async def run(self) -> None:
        """Take what the rank says; ends by cancellation, and the process with it.

        Raises:
            EngineFaultError: the rank is gone, or hangs.
        """
        self._pulse.limits = SERVING
        try:
            while True:
                match message := await self._receive():
                    case Executed():
                        self._executed.put_nowait(message)
                    case Drafted():
                        self._drafted.put(message)
        finally:
            self.kill()
            self._drafted.put(None)

    def kill(self) -> None:
        """End the process now, and what it has started.

        Not by `Process.kill`, which may take the exit code from whoever waits for it.
        """
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End the process, and wait until it has given back all that it held."""
        self.kill()
        self._pulse.close()
        self._line.writer.close()
        with suppress(ConnectionError):
            await self._line.writer.wait_closed()
        await self._process.wait()

    def _fail(self, problem: str) -> None:
        """It hangs: nothing that it says counts any more."""
        self._line.fail(EngineFaultError(f"the process of GPU {self._number} {problem}"))
        self.kill()

    async def _receive(self) -> Any:
        try:
            message = await self._line.receive()
        except EOFError:
            self.kill()
            how = _how_ended(await self._process.wait())
            raise EngineFaultError(f"the process of GPU {self._number} has ended, {how}") from None
        if isinstance(message, Failed):
            raise message.error
        return message


class Ranks:
    """Several GPUs; see `Gpus`."""

    def __init__(self, processes: Sequence[RankProcess], meeting: MeetingPlace) -> None:
        self._processes = processes
        self._meeting = meeting
        """Kept as long as they meet there."""
        self._plan: Plan
        self._windows: LayerWindows
        self._longest_step: float
        self._facts: Sequence[GpuFacts] = ()
        self._warms_up = self._runs_ahead = False
        self._uses: Sequence[GpuUse] = [GpuUse()] * len(processes)
        """What each rank said last."""
        self._queued = 0

    @classmethod
    async def start(cls, config: EngineConfig) -> Self:
        """Start the processes; they find each other, and measure, all at once.

        Raises:
            HsrpcError: a rank cannot go on.
        """
        count = config.num_gpus
        meeting, processes = MeetingPlace(count), list[RankProcess]()
        found = cls(processes, meeting)
        try:
            for number in range(count):
                processes.append(await RankProcess.start(number))
                processes[-1].send(Begin(config, number, count, meeting.meeting))
            measured = await _from_all(processes, Measured)
        except BaseException:
            await found.close()
            raise
        found._facts = [each.facts for each in measured]
        return found

    async def load(
        self,
        plan: Plan,
        choice: int,
        windows: LayerWindows,
        longest_step: float,
        draft_model: PlannedDraftModel | None = None,
        *,
        bars: bool = False,
    ) -> None:
        """Load the model as `plan` says, on all GPUs, and the draft model.

        `longest_step`: seconds that a step takes at most, as predicted; `bars`: show how far they are on a terminal.

        Raises:
            HsrpcError: a rank cannot go on.
        """
        self._plan, self._windows, self._longest_step = plan, windows, longest_step
        for process in self._processes:
            process.send(Load(plan, choice, draft_model))
        with LoadingProgress(self.count, bars=bars) as progress:
            ready = await _from_all(self._processes, Ready, progress)
        self._warms_up = any(each.warms_up for each in ready)
        self._runs_ahead = all(each.runs_ahead for each in ready)
        self._uses = [each.use for each in ready]

    @property
    def machine(self) -> Machine:
        """The machine as the slowest of the GPUs found it."""
        return _slowest([each.machine for each in self._facts])

    @property
    def facts(self) -> Sequence[GpuFacts]:
        return self._facts

    @property
    def processes(self) -> Sequence[RankProcess]:
        return self._processes

    @property
    def count(self) -> int:
        return len(self._processes)

    @property
    def name(self) -> str:
        return f"{self.count} x {self._facts[0].machine.name}"

    @property
    def tasks(self) -> Sequence[Task]:
        return [self._run]

    @property
    def warms_up(self) -> bool:
        return self._warms_up

    @property
    def runs_ahead(self) -> bool:
        return self._runs_ahead

    @property
    def num_queued(self) -> int:
        return self._queued

    def assemble(self, scheduled: Scheduled) -> JointStep:
        plan, numbers = self._plan, range(self.count)
        parts = [pack_step(scheduled.of_gpu(n), plan.block_size, self._windows, plan.in_place) for n in numbers]
        return JointStep(
            step_id=scheduled.step_id,
            mini_batches=tuple(batch for part in parts for batch in part.mini_batches),
            sampling=scheduled.sampling,
            counts=scheduled.counts,
            is_in_place=scheduled.is_in_place,
            is_ahead=scheduled.arrays is not None,
            parts=tuple(parts),
            stop=scheduled.stop,
        )

    async def execute(self, step: JointStep, ahead: JointStep | None = None) -> StepResult | None:
        self._queued += 1
        masks = self._send(step, ahead)
        step.stop.tell = partial(self._stop, step.step_id)
        if step.stop.is_set:
            self._stop(step.step_id)
        if any(masks):
            await self._tell_allowed(step.step_id, masks)
        executed = await self._executed()
        self._uses = [each.use for each in executed]
        self._queued -= 1
        results = [each.result for each in executed]
        for result in results:
            if isinstance(result, OutOfDeviceMemoryError):
                raise result
        whole = [result for result in results if isinstance(result, StepResult)]
        if len(whole) < len(results):
            return None
        return StepResult([each for part in whole for each in part.sampled], [s for part in whole for s in part.scored])

    def drafter(self) -> Drafter:
        """The draft models that were loaded."""
        return FarDrafter(self._processes, asyncio.get_running_loop().call_soon_threadsafe)

    def moved(self) -> Moved:
        return Moved(*map(sum, zip(*(each.moved for each in self._uses), strict=True)))

    def uses(self) -> Sequence[GpuUse]:
        return self._uses

    def reset_counts(self) -> None:
        self._uses = [GpuUse(memory=each.memory) for each in self._uses]
        for process in self._processes:
            process.send(ResetCounts())

    async def close(self) -> Callable[[], None]:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            await process.close()
        self._meeting.close()
        return gc.unfreeze

    async def _run(self) -> None:
        await results_of([process.run() for process in self._processes])

    async def _executed(self) -> list[Executed]:
        """What each GPU gives of the step under way.

        Raises:
            EngineFaultError: it takes far longer than any step should: one waits for another, or for its device.
        """
        executed: dict[int, Executed] = {}
        limit = MIN_STEP_LIMIT + STEP_LIMIT * self._longest_step
        try:
            async with asyncio.timeout(limit):
                for number, process in enumerate(self._processes):
                    executed[number] = await process.executed()
        except TimeoutError:
            numbers = (n for n, each in enumerate(self._processes) if n not in executed and not each.has_executed)
            late, predicted = ", ".join(map(str, numbers)), f"{self._longest_step:.2g} s were predicted at most"
            raise EngineFaultError(f"a step has not ended after {limit:.1f} s on GPU {late}; {predicted}") from None
        return list(executed.values())

    def _send(self, step: JointStep, ahead: JointStep | None) -> list[dict[int, Mask]]:
        """Send each rank its part of a step; the masks of its constrained rows, which are sent when they are known."""
        rows, masks = iter(step.sampling), list[dict[int, Mask]]()
        coming = [None] * self.count if ahead is None else ahead.parts
        for process, part, next_part in zip(self._processes, step.parts, coming, strict=True):
            of_part = list(islice(rows, part.num_sampled))
            found: dict[int, Mask] = {
                row: partial(each.matcher.allowed, len(each.draft))
                for row, each in enumerate(of_part)
                if each.matcher is not None
            }
            plain = tuple(row._replace(matcher=None) for row in of_part)
            known = replace(part, sampling=plain, mini_batches=() if part.is_ahead else part.mini_batches)
            process.send(Execute(known, tuple(found), next_part))
            masks.append(found)
        return masks

    async def _tell_allowed(self, step_id: int, masks: Sequence[Mapping[int, Mask]]) -> None:
        """Send the ranks what constrained rows may sample, once the step is under way and that is known."""
        allowed = await asyncio.to_thread(lambda: list(map(_allowed, masks)))
        for process, each in zip(self._processes, allowed, strict=True):
            if each:
                process.send(Allowed(step_id, each))

    def _stop(self, step_id: int) -> None:
        for process in self._processes:
            process.send(Stop(step_id))


def _allowed(masks: Mapping[int, Mask]) -> dict[int, npt.NDArray[np.int32]]:
    return {row: mask() for row, mask in masks.items()}


async def _from_all(
    processes: Sequence[RankProcess], kind: type[M], progress: LoadingProgress | None = None
) -> list[M]:
    """A message of that kind from each, `progress` being told what they load; what goes wrong first is told.

    Raises:
        HsrpcError: a rank cannot go on.
    """
    return await results_of([process.expect(kind, progress) for process in processes])


async def results_of(works: Sequence[Coroutine[Any, Any, M]]) -> list[M]:
    """Results of works, one for each rank; where one ends with an error the others are cancelled.

    Raises:
        HsrpcError: why a rank cannot go on, of all reasons the one that others may follow from.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if all(isinstance(error, LostError) for error in _errors(tasks)):  # others know why, if any do
            await asyncio.wait(tasks, timeout=_CAUSE_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for error in sorted(_errors(tasks), key=lambda error: isinstance(error, LostError)):
        raise error
    return [task.result() for task in tasks]


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return [error for task in ended if (error := task.exception()) is not None]


def _how_ended(code: int) -> str:
    """What the exit code of a process says."""
    return f"with exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _slowest(machines: Sequence[Machine]) -> Machine:
    """One as the slowest of them, with as little memory as any of them found."""
    return machines[0].slowest(machines[1:])


def _environment(number: int) -> dict[str, str]:
    """Variables of a rank: it sees its own GPU alone, so that all its threads use that."""
    home = str(Path(hsrpc.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    visible = os.environ.get(_VISIBLE)
    own = str(number) if not visible else visible.split(",")[number : number + 1]
    return os.environ | _SETTINGS | {"PYTHONPATH": path, _VISIBLE: own if isinstance(own, str) else "".join(own)}
