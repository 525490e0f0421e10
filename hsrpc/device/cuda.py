"""An NVIDIA GPU as a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch

from hsrpc.device.batched_copy import BatchedCopy
from hsrpc.device.device import Device, DeviceMemory, Event, Stream
from hsrpc.device.host_pages import HostPages
from hsrpc.device.kernels import copy_rows
from hsrpc.device.pinned_pages import PinnedPages
from hsrpc.plan.memory_use import HostUse
from hsrpc.schedule.step import Runs

_PIECE_BYTES = 16 * 1024**2
"""A copy engine runs one copy to its end: in one piece, a layer's weights would keep a step's small arrays waiting."""
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class CudaDevice(Device):
    """The current CUDA device, with one stream each for loads, gathers, compute and stores."""

    def __init__(self) -> None:
        super().__init__()
        _share_memory()
        index = torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        self.warms_up = True
        self.load = torch.cuda.Stream(index)
        self.gather = torch.cuda.Stream(index)
        self.compute = torch.cuda.Stream(index)
        self.store = torch.cuda.Stream(index)
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._copy = BatchedCopy()
        self._row_0 = torch.zeros(1, dtype=torch.int64, device=self.torch_device)
        self._pinned = PinnedPages(torch.cuda.cudart())

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def uuid(self) -> str:
        return f"GPU-{torch.cuda.get_device_properties(self.torch_device).uuid}"

    @property
    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    @property
    def memory(self) -> DeviceMemory:
        stats = torch.cuda.memory_stats(self.torch_device)
        return DeviceMemory(*(stats.get(f"reserved_bytes.all.{which}", 0) for which in ("current", "peak")))

    def limit_memory(self, size: int) -> None:
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def pages(self, size: int) -> HostPages | None:
        return HostPages(size)

    def pinned(
        self,
        size: int,
        use: HostUse,
        fill: Callable[[torch.Tensor], object] | None = None,
        *,
        pages: HostPages | None = None,
    ) -> torch.Tensor:
        # Written before it is registered: threads write at once, but the driver registers one piece after the other.
        if pages is None or len(pages.tensor) < size:
            pages = HostPages(size, fill)
        pages.shorten(size)
        self._pinned.pin(pages)
        return self._account.add(pages.tensor, use)

    def release_pinned(self) -> None:
        self.drain()
        self._pinned.release()

    def check_pinning(self, size: int) -> None:
        self._pinned.check_limit(size)

    def release_cached(self) -> None:
        torch.cuda.empty_cache()

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def record(self, stream: Stream) -> Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        if event is not None and stream is not None:
            stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        if event is not None:
            event.synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        with self.on(self.compute):
            for function in functions:  # loads kernels and makes workspaces, which cannot be captured
                function()
        self.drain()
        graphs = [self._captured(function) for function in functions]
        with self.on(self.compute):
            for graph in graphs:
                graph.replay()  # the first time takes milliseconds longer
        return [graph.replay for graph in graphs]

    def _captured(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # One memory for all graphs: no two run at once, and what one leaves to the next is not given away before that
        # has used it, since they are captured in the order in which they are launched.
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=self.compute):
            function()
        return graph

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        if stream is not None:
            tensor.record_stream(stream)

    def upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def small_pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        on_host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.Event(self.torch_device, blocking=True)
        event.record(torch.cuda.current_stream(self.torch_device))

        def arrived() -> torch.Tensor:
            event.synchronize()
            return on_host

        return arrived

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        # A graph of kernels alone is launched quicker, and its end known sooner, than one with a copy at the end.
        copy_rows(target.view(1, -1), self._row_0, tensor.view(1, -1), self._row_0)

    def load_bytes(self, target: torch.Tensor, source: torch.Tensor) -> None:
        for start in range(0, len(source), _PIECE_BYTES):
            piece = source[start : start + _PIECE_BYTES]
            target[start : start + len(piece)].copy_(piece, non_blocking=True)

    def copy_runs(self, target: torch.Tensor, source: torch.Tensor, runs: Runs) -> None:
        assert target.is_contiguous()
        assert source.is_contiguous()
        row_bytes = target.stride(0) * target.element_size()
        self._copy(
            target.data_ptr() + runs.target * row_bytes,
            source.data_ptr() + runs.source * row_bytes,
            runs.count * row_bytes,
            torch.cuda.current_stream(self.torch_device).cuda_stream,
        )

    def copy_rows(
        self, target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor
    ) -> None:
        copy_rows(target, target_rows, source, source_rows)


def _share_memory() -> None:
    """Let the allocator map what is free anywhere to where it is wanted: it may have a budget's last bytes in pieces.

    Torch has no public function for it, only variables that it reads once; what they say holds.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
