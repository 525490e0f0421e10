"""How long a step's list takes on a device: the same list that the tasks run, with a time for each operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hsrpc.schedule.sweep import Op, OpKind, OpList, Stream


class Timeline(NamedTuple):
    """When the operations of a list run."""

    ends: tuple[float, ...]
    """End of each operation, in seconds since the list's beginning."""
    busy: dict[Stream, float]
    """Seconds in which each stream works."""
    seconds: float
    """Seconds until the tokens are there."""


def simulate(ops: OpList, seconds: Callable[[Op], float], before: Sequence[float] = ()) -> Timeline:
    """Run a list: each stream takes its operations in order, each as soon as those that it comes after are done.

    `before`: ends of the list before, relative to this one's beginning, for the weights that it has loaded.
    """
    free = dict.fromkeys(Stream, 0.0)
    busy = dict.fromkeys(Stream, 0.0)
    if before:
        free[Stream.LOAD] = free[Stream.GATHER] = max(0.0, *before)
    ends: list[float] = []
    for op in ops.ops:
        stream, took = op.kind.stream, seconds(op)
        start = max([free[stream], *(before[a] if a < 0 else ends[a] for a in op.after)])
        free[stream] = start + took
        busy[stream] += took
        ends.append(start + took)
    sample = next(end for op, end in zip(ops.ops, ends, strict=True) if op.kind is OpKind.SAMPLE)
    return Timeline(tuple(ends), busy, sample)


def steady(ops: OpList, repeat: Callable[[OpList], OpList], seconds: Callable[[Op], float]) -> Timeline:
    """A step in the middle of many: `repeat` makes the list that follows a list."""
    before: tuple[float, ...] = ()
    timeline = simulate(ops, seconds)
    for _ in range(3):
        before = tuple(end - timeline.seconds for end in timeline.ends)
        ops = repeat(ops)
        timeline = simulate(ops, seconds, before)
    return timeline
