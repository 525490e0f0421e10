"""A CPU device for tests that finds what a GPU may get wrong now and then: accesses to memory that no event orders.

Work runs at once, as on `CpuDevice`, but is judged as if the four streams ran on their own. Each stream has a vector
clock: how far it knows the others to be. `record` takes it, `wait` and `synchronize` pass it on. Every operation inside
`on(stream)` is seen, with the bytes that it reads and writes; one that conflicts with an access of which its stream
does not know is a race. So is memory that its own stream may reuse while another one still reads it.

    with ordered_devices():
        async with Engine(config) as engine: ...    # RaceError at the end, if anything was not ordered

Not seen are operations outside `on`. Memory from `empty` outside `on` counts as written there once, so that its first
use has to come after `drain`. The host is one actor: what one of its threads has waited for, all have.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hsrpc.config import DeviceKind
from hsrpc.device.device import OPENERS, CpuDevice, Event, Stream
from hsrpc.device.host_pages import HostPages
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.schedule.step import Runs
from hsrpc.testing.access_history import Actor
from hsrpc.testing.checker import Checker, Mark
from hsrpc.testing.operations import Role, Use, schema_of, tensors
from hsrpc.testing.sites import site_of

_MAX_RACES = 10
"""Told of in one error."""


class RaceError(AssertionError):
    """Accesses to memory that no event orders."""


class _Watch(TorchDispatchMode):
    """Tells the checker of each of this thread's operations, on the stream that is its own now."""

    def __init__(self, checker: Checker, stream: Actor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream
        self._checker = checker

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that keeps it from being compiled takes longer than what it wraps

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        schema = schema_of(func)
        used = schema.uses(args, kwargs)
        number = self._checker.operation(schema.name, self.stream, used)
        results = func(*args, **kwargs)
        self._checker.results(number, self.stream, used, tensors(results))
        if schema.gives_values:
            self._checker.synchronize(self._checker.mark(self.stream))
        return results


class OrderedDevice(CpuDevice):
    """A CPU with three streams, whose users are checked.

    `without` names one of `sites`, which is then left out, as if its line were not there.
    """

    def __init__(self, *, without: str | None = None) -> None:
        super().__init__()
        self.load, self.gather, self.compute, self.store = (
            cast("Stream", stream) for stream in (Actor.LOAD, Actor.GATHER, Actor.COMPUTE, Actor.STORE)
        )
        self.sites: set[str] = set()
        """Places where something had to wait for something else: streams, the host, and whoever reuses memory."""
        self._without = without
        self._checker = Checker()
        self._of_thread = threading.local()

    @property
    def num_operations(self) -> int:
        """Launched on the streams so far."""
        return self._checker.num_operations

    @property
    def races(self) -> list[str]:
        """What was found so far, each kind once."""
        return [f"{race} ({count} times)" for race, count in self._checker.races().items()]

    def check(self) -> None:
        """Raise what was found.

        Raises:
            RaceError: there are races.
        """
        if found := self.races:
            raise RaceError("\n".join([f"{len(found)} kinds of races, the first ones:", *found[:_MAX_RACES]]))

    def empty(self, shape: Sequence[int], dtype: torch.dtype, use: DeviceUse) -> torch.Tensor:
        with _disable_current_modes():
            tensor = super().empty(shape, dtype, use)
        owner = self._stream if self._stream is not None else Actor.DEFAULT
        self._checker.allocate(tensor, f"{use.value} {list(shape)}", owner)
        return tensor

    def pinned(
        self,
        size: int,
        use: HostUse,
        fill: Callable[[torch.Tensor], object] | None = None,
        *,
        pages: HostPages | None = None,
    ) -> torch.Tensor:
        tensor = super().pinned(size, use, fill, pages=pages)
        self._checker.allocate(tensor, f"pinned {use.value} [{size}]", None)
        return tensor

    def release_pinned(self) -> None:
        self._checker.drain()
        super().release_pinned()

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return self._on(cast("Actor", stream))

    def record(self, stream: Stream) -> Event:
        return cast("Event", self._checker.mark(cast("Actor", stream)))

    def wait(self, stream: Stream, event: Event) -> None:
        mark, actor = cast("Mark | None", event), cast("Actor", stream)
        # A stream runs in order: of itself it need not wait for anything.
        if mark is not None and mark.stream is not actor and self._waits(f"{actor} waits for {mark.stream}", "wait"):
            self._checker.wait(actor, mark)

    def synchronize(self, event: Event) -> None:
        mark = cast("Mark | None", event)
        if mark is not None and self._waits(f"host waits for {mark.stream}", "synchronize"):
            self._checker.synchronize(mark)

    def drain(self) -> None:
        if self._waits("host waits for all", "drain"):
            self._checker.drain()
        super().drain()

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        actor = cast("Actor", stream)
        if self._waits(f"memory is kept for {actor}", "keep"):
            self._checker.keep(tensor, actor)

    def upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).clone()

    def small_pinned(self, size: int) -> torch.Tensor:
        with _disable_current_modes():
            host = torch.empty(size, dtype=torch.uint8)
        self._checker.allocate(host, f"pinned memory [{size}]", None, is_staging=True)
        return host

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        if self._stream is None:
            return super().fetch(tensor)
        on_host = tensor.clone()
        self._checker.to_host(on_host)
        return partial(self.arrived, on_host, cast("Event", self._checker.mark(self._stream)))

    def arrived(self, target: torch.Tensor, event: Event) -> torch.Tensor:
        mark = cast("Mark", event)
        if self._waits(f"host waits for {mark.stream}", "arrived"):
            self._checker.synchronize(mark)
        self._checker.operation("reading the result", Actor.HOST, [Use(target, Role.READ)])
        return target

    def load_bytes(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with _disable_current_modes():
            self._launch("load_bytes", Use(source, Role.READ), Use(target[: len(source)], Role.WRITE))
            super().load_bytes(target, source)

    def copy_runs(self, target: torch.Tensor, source: torch.Tensor, runs: Runs) -> None:
        with _disable_current_modes():
            rows = runs.rows()
            self._launch("copy_runs", Use(source, Role.READ, rows.source), Use(target, Role.WRITE, rows.target))
            super().copy_runs(target, source, runs)

    def copy_rows(
        self, target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor
    ) -> None:
        with _disable_current_modes():
            self._launch(
                "copy_rows",
                Use(target_rows, Role.READ),
                Use(source_rows, Role.READ),
                Use(source, Role.READ, source_rows.numpy()),
                Use(target, Role.WRITE, target_rows.numpy()),
            )
            super().copy_rows(target, target_rows, source, source_rows)

    @property
    def _stream(self) -> Actor | None:
        """The one that this thread launches on."""
        watch = self._watch
        return None if watch is None else watch.stream

    @property
    def _watch(self) -> _Watch | None:
        return getattr(self._of_thread, "watch", None)

    @contextmanager
    def _on(self, stream: Actor) -> Iterator[None]:
        if (watch := self._watch) is not None:  # a second one would see the same operations
            before, watch.stream = watch.stream, stream
            try:
                yield
            finally:
                watch.stream = before
            return
        self._of_thread.watch = _Watch(self._checker, stream)
        try:
            with self._of_thread.watch:
                yield
        finally:
            self._of_thread.watch = None

    def _launch(self, name: str, *used: Use) -> None:
        """Note one of the device's own kernels or copies."""
        if self._stream is not None:
            self._checker.operation(name, self._stream, used)

    def _waits(self, what: str, method: str) -> bool:
        """Whether the call of `method` that is under way is to be heeded."""
        site = f"{what} in {site_of(sys._getframe(2), method)}"
        self.sites.add(site)
        return site != self._without


@contextmanager
def ordered_devices(*, without: str | None = None) -> Iterator[list[OrderedDevice]]:
    """Inside it, `open_device` gives a new OrderedDevice in place of the CPU; the list has all that were opened.

    Raises:
        RaceError: at the end, if there were races, unless `without` names what is left out on purpose.
    """
    opened: list[OrderedDevice] = []

    def opener() -> OrderedDevice:
        opened.append(OrderedDevice(without=without))
        return opened[-1]

    with patch.dict(OPENERS, {DeviceKind.CPU: opener}):
        yield opened
    for device in opened:
        if without is None:
            device.check()
