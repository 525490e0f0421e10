"""Runs a step's list of operations: by three tasks, each with its lane, or on one thread.

A task launches its operations in order. Before one it waits until those that it comes after are launched, which their
tasks say through its inbox, and lets its stream wait for their events where they are on another stream. A step that is
stopped ends wherever its lanes are: each skips the rest of its operations and tells the others. Where other GPUs wait
for weights that this one loads, these go on to the end, and all else is passed over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, TypeAlias

from hsrpc.device.device import Device, Event
from hsrpc.engine.worker import Worker
from hsrpc.schedule.step import Step
from hsrpc.schedule.sweep import Lane, Op, OpKind, Stream

Launch: TypeAlias = Callable[[Op], object]
"""Launches an operation on the stream that is current."""

_ENDED = -1


class _Message(NamedTuple):
    """How far another lane is."""

    lane: Lane
    number: int
    """The operation that it launched, or _ENDED."""


class StepRun:
    """A step under way: the events of its operations, and what its lanes tell one another."""

    def __init__(self, step: Step, device: Device, before: Sequence[Event] = (), barrier: Sequence[Event] = ()) -> None:
        """`before`: events of the list before, where it ran to its end; `barrier`: no load may begin before them."""
        self.step = step
        self.events: list[Event] = [None] * len(step.ops)
        self.ended: asyncio.Queue[bool] = asyncio.Queue(len(Lane))
        """An entry of each lane once it launches no more: whether it has launched all of its operations."""
        self._device = device
        self._before = before
        self._barrier = barrier
        self._streams = {
            Stream.LOAD: device.load,
            Stream.GATHER: device.gather,
            Stream.COMPUTE: device.compute,
            Stream.STORE: device.store,
        }
        self._inboxes: dict[Lane, asyncio.Queue[_Message]] = {lane: asyncio.Queue() for lane in Lane}
        """A lane is ahead of another by their buffers at most, and weights come in few parts: that bounds each."""
        self._launched = {lane: dict.fromkeys(Lane, _ENDED) for lane in Lane}
        """Last operation of each other lane that a lane knows to be launched, by lane."""

    async def run(self, lane: Lane, worker: Worker, launch: Launch) -> bool:
        """Launch a lane's operations on its worker; whether all were, for the step may be stopped on the way."""
        is_whole = False
        try:
            is_whole = await self._launch_all(lane, worker, launch)
        finally:
            for other in set(Lane) - {lane}:
                self._inboxes[other].put_nowait(_Message(lane, len(self.events) if is_whole else _ENDED))
            self.ended.put_nowait(is_whole)
        return is_whole

    def run_here(self, launch: Launch) -> bool:
        """Launch all operations on this thread, in the order of the list; as `run`."""
        self.hold_loads()
        for _, numbers in groupby(range(len(self.events)), key=lambda number: self.step.ops.ops[number].place):
            if self._is_ended:
                return False
            self.launch(list(numbers), launch)
        return True

    def hold_loads(self) -> None:
        """Let loads wait for what the step before has launched, and so what comes from other devices."""
        for event in self._barrier:
            self._device.wait(self._device.load, event)
        if self._barrier and self.step.ops.is_gathered:
            self._hold_gathers()

    def _hold_gathers(self) -> None:
        self._device.wait(self._device.gather, self._device.record(self._device.load))

    def launch(self, numbers: Sequence[int], launch: Launch) -> None:
        """Launch these operations, each behind the events of those that it comes after."""
        ops, device = self.step.ops, self._device
        for kind, group in groupby(numbers, key=lambda number: ops.ops[number].kind.stream):
            stream = self._streams[kind]
            with device.on(stream):
                for number in group:
                    for event in self._waits(number):
                        device.wait(stream, event)
                    if not self._passes_over(ops.ops[number]):
                        launch(ops.ops[number])
                    if number in ops.awaited:
                        self.events[number] = device.record(stream)

    @property
    def _is_ended(self) -> bool:
        """Nothing more is launched."""
        return self.step.stop.is_set and not self.step.ops.is_gathered

    def _passes_over(self, op: Op) -> bool:
        """Whether an operation of a stopped step is left out that goes on for weights for which other GPUs wait."""
        return self.step.stop.is_set and self.step.ops.is_gathered and op.kind.lane is not Lane.WEIGHTS

    def _waits(self, number: int) -> Iterator[Event]:
        """Events of another stream before which an operation must not run."""
        ops = self.step.ops.ops
        for before in ops[number].after:
            if before < 0:  # weights, which other streams alone wait for
                yield self._before[before]
            elif crosses(ops[number].kind, ops[before].kind):
                yield self.events[before]

    async def _launch_all(self, lane: Lane, worker: Worker, launch: Launch) -> bool:
        numbers = self.step.ops.lanes[lane]
        if numbers and lane is not Lane.COMPUTE:
            await worker.run(self.hold_loads)
        done = 0
        while done < len(numbers):
            if not await self._until_ready(lane, numbers[done]) or self._is_ended:
                return False
            chosen = self._in_one_go(lane, numbers, done)
            await worker.run(partial(self.launch, chosen, launch))
            done += len(chosen)
            for number in chosen:
                for reader in self.step.ops.readers[number]:
                    self._inboxes[reader].put_nowait(_Message(lane, number))
        return True

    def _in_one_go(self, lane: Lane, numbers: Sequence[int], first: int) -> Sequence[int]:
        """Operations from `first` on that are of one place, as far as nothing is to be waited for between them."""
        ops, end = self.step.ops.ops, first + 1
        while (
            end < len(numbers)
            and ops[numbers[end]].place == ops[numbers[first]].place
            and self._is_ready(lane, numbers[end])
        ):
            end += 1
        return numbers[first:end]

    def _is_ready(self, lane: Lane, number: int) -> bool:
        ops, launched = self.step.ops.ops, self._launched[lane]
        others = ((before, ops[before].kind.lane) for before in ops[number].after if before >= 0)
        return all(other is lane or before <= launched[other] for before, other in others)

    async def _until_ready(self, lane: Lane, number: int) -> bool:
        """Wait until what an operation comes after is launched; False where that will never be."""
        while not self._is_ready(lane, number):
            message = await self._inboxes[lane].get()
            if message.number == _ENDED:
                return False
            self._launched[lane][message.lane] = message.number
        return True


def crosses(kind: OpKind, before: OpKind) -> bool:
    """Whether two kinds of operations are on different streams: then the one waits for the other's event."""
    return kind.stream is not before.stream
