"""Where the time of a step goes, by torch's profiler over a few steps more than the measured ones."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule

from hsrpc.config import DeviceKind
from hsrpc.plan.roofline import StepRecord

PROFILED_STEPS = 2
_RANGE = "hsrpc."
"""Begins the names of the executor's ranges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Seconds of a step under the profiler, which slows it down by a few percent; None: not measured."""

    step: float
    busy: float | None
    """Share, from its first to its last kernel, in which the compute stream ran one; it has the most kernel time."""
    copies: float | None
    """Copies from the host to the device, added up over the streams."""
    copy_rate: float | None
    """Bytes/s while they run."""
    parts: Mapping[str, float]
    """Seconds by range of the executor: of its kernels, or of its thread where the device is the CPU."""
    launching: float | None
    """Seconds a step that the executor's thread spends in all ranges."""


def has_gpu(device: DeviceKind) -> bool:
    """Whether there is a GPU's time to be measured."""
    return device is not DeviceKind.CPU and torch.cuda.is_available()


class StepProfiler:
    """Takes the record of each step. After the first that is typical one step warms up, and the next are profiled.

    With `ranges` it sees the executor's ranges too, which costs the profiled steps more time.
    """

    def __init__(self, is_typical: Callable[[StepRecord], bool], *, on_cuda: bool, ranges: bool) -> None:
        self.is_done = False
        """All steps that are wanted have been profiled."""
        self._is_typical = is_typical
        self._on_cuda = on_cuda
        self._ranges = ranges
        self._seconds: list[float] = []
        self._bytes: list[int] = []
        self._is_started = False
        self._profiler = profile(
            activities=[ProfilerActivity.CPU] * ranges + [ProfilerActivity.CUDA] * on_cuda,
            schedule=schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1),
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )

    def __call__(self, record: StepRecord) -> None:
        if self.is_done:
            return
        if self._is_started:
            self._profiler.step()
            self._seconds.append(record.seconds)
            self._bytes.append(record.weight_bytes + record.cache_bytes)
        elif self._is_typical(record):
            self._profiler.start()
            self._is_started = True
        if len(self._seconds) == 1 + PROFILED_STEPS:
            self._profiler.stop()
            self.is_done = True

    def result(self) -> StepProfile | None:
        """What was found; None, and the profiler is stopped, where the steps ended too soon."""
        if not self.is_done:
            if self._is_started:
                self._profiler.stop()
            return None
        busy = copies = launching = None
        parts: dict[str, float] = {}
        if self._on_cuda:
            busy, copies = device_times(self._raw_events())
        if self._ranges:
            parts, on_host = range_times(self._raw_events(), on_cuda=self._on_cuda)
            launching = on_host if self._on_cuda else None
        step = sum(self._seconds[1:]) / PROFILED_STEPS
        size = sum(self._bytes[1:]) / PROFILED_STEPS
        rate = size / copies if copies else None
        return StepProfile(step=step, busy=busy, copies=copies, copy_rate=rate, parts=parts, launching=launching)

    def save(self, file: Path) -> None:
        """The profiled steps for Perfetto or chrome://tracing, compressed where the name ends in .gz."""
        self._profiler.export_chrome_trace(str(file))

    def _raw_events(self) -> Iterable[Any]:
        """Far cheaper than `events()`, which builds a tree: batched copies are many."""
        inner = self._profiler.profiler
        assert inner is not None  # it was stopped
        assert inner.kineto_results is not None
        return inner.kineto_results.events()


def device_times(events: Iterable[Any]) -> tuple[float, float]:
    """Busy share of the stream with the most kernel time, and seconds a step of copies to the device, from raw events.

    Kernels of one stream never overlap, hence their sum is the time in which one runs. Steps may be launched ahead, so
    the kernels seen may be those of more steps than were profiled.
    """
    kernels: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    copies = 0
    for event in events:
        name = event.name()
        if event.device_type() != DeviceType.CUDA or event.is_user_annotation() or name.startswith((_RANGE, "Memset")):
            continue
        if not name.startswith("Memcpy"):
            kernels[event.device_resource_id()].append((event.start_ns(), event.duration_ns()))
        elif "HtoD" in name:
            copies += event.duration_ns()
    return max(map(_busy, kernels.values()), default=(0, 0.0))[1], copies / 1e9 / PROFILED_STEPS


def _busy(kernels: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """Time in kernels, given as starts and durations, and its share of the time from the first to the last."""
    total = sum(duration for _, duration in kernels)
    window = max(start + duration for start, duration in kernels) - min(start for start, _ in kernels)
    return total, total / window


_Place: TypeAlias = tuple[object, object]
"""Device type, and stream or thread."""


def range_times(events: Iterable[Any], *, on_cuda: bool) -> tuple[dict[str, float], float]:
    """Seconds a step of each range, in order of first appearance, and of the host in all of them, from raw events.

    On CUDA a range's seconds are of the kernels that lie within its shadow on their stream.
    """
    ranges: defaultdict[_Place, list[tuple[int, int, str]]] = defaultdict(list)
    kernels: list[tuple[_Place, int, int]] = []
    for event in events:
        name, place = event.name(), (event.device_type(), event.device_resource_id())
        if name.startswith(_RANGE):
            ranges[place].append((event.start_ns(), event.duration_ns(), name.removeprefix(_RANGE)))
        elif place[0] == DeviceType.CUDA and not event.is_user_annotation():
            kernels.append((place, event.start_ns(), event.duration_ns()))
    on_host = sorted(chain.from_iterable(found for place, found in ranges.items() if place[0] == DeviceType.CPU))
    parts = {name: 0.0 for *_, name in on_host}
    per_step = 1e9 * PROFILED_STEPS
    for name, duration in _kernels_of(ranges, kernels) if on_cuda else ((name, took) for _, took, name in on_host):
        parts[name] = parts.get(name, 0.0) + duration / per_step
    return parts, sum(duration for _, duration, _ in on_host) / per_step


def _kernels_of(
    ranges: Mapping[_Place, list[tuple[int, int, str]]], kernels: Iterable[tuple[_Place, int, int]]
) -> Iterator[tuple[str, int]]:
    """The range that each kernel begins in, and its nanoseconds; ranges of one stream never overlap."""
    shadows = {place: sorted(found) for place, found in ranges.items()}
    for place, start, duration in kernels:
        found = shadows.get(place, [])
        number = bisect_right(found, start, key=itemgetter(0)) - 1
        if number >= 0 and start < sum(found[number][:2]):
            yield found[number][2], duration
