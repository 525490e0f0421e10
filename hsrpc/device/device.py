"""A device: memory, streams, events between them, and the copies that the engine needs.

Work is ordered by events, never by waiting for the device. A stream is entered in the thread that launches on it:

    with device.on(device.load): device.copy_runs(...)
    loaded = device.record(device.load)
    device.wait(device.compute, loaded)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hsrpc.config import DeviceKind, format_bytes
from hsrpc.device.account import Account
from hsrpc.device.host_memory import HostMemory
from hsrpc.device.host_pages import HostPages
from hsrpc.device.uploads import Uploads
from hsrpc.errors import ConfigError
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.schedule.step import Runs

Stream: TypeAlias = "torch.cuda.Stream | None"
Event: TypeAlias = "torch.cuda.Event | None"
"""None on the CPU, where work is done when the call returns."""


class DeviceMemory(NamedTuple):
    """Bytes of device memory in use, as the allocator counts them; 0 on the CPU."""

    used: int = 0
    peak: int = 0
    """Most in use at once so far."""


class Device(ABC):
    """One accelerator. `load` copies weights and cache blocks to the device, `store` new rows from it.

    On `gather` go the parts of weights that several devices have loaded for each other.
    """

    torch_device: torch.device
    warms_up: bool
    """What is done for the first time takes long: kernels are compiled and loaded."""
    load: Stream
    gather: Stream
    compute: Stream
    store: Stream

    def __init__(self) -> None:
        self._account = Account()
        self._only_use: DeviceUse | None = None

    def used_for(self, use: DeviceUse) -> Self:
        """The same device, with the same streams and account, whose memory from `empty` is all for `use`."""
        device = copy(self)
        device._only_use = use
        return device

    @property
    def allocated(self) -> Mapping[DeviceUse | HostUse, int]:
        """Bytes of `empty` and `pinned` that are held now, by use; what torch's operations allocate is not counted."""
        return self._account.num_bytes

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for people, such as NVIDIA H100."""

    @property
    @abstractmethod
    def uuid(self) -> str:
        """By which NVIDIA's tools know it; empty on the CPU."""

    @property
    @abstractmethod
    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses."""

    @property
    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What this process uses of it."""

    @abstractmethod
    def limit_memory(self, size: int) -> None:
        """Refuse allocations beyond `size` bytes in all, where the device can, and reset the peak."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, use: DeviceUse) -> torch.Tensor:
        """Device memory for `use`, not initialised."""
        memory = torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
        return self._account.add(memory, self._only_use or use)

    @abstractmethod
    def pages(self, size: int) -> HostPages | None:
        """Memory for `pinned`, from the system: that takes longer than pinning it. None where nothing is pinned.

        Raises:
            ConfigError: the memory cannot be had.
        """

    @abstractmethod
    def pinned(
        self,
        size: int,
        use: HostUse,
        fill: Callable[[torch.Tensor], object] | None = None,
        *,
        pages: HostPages | None = None,
    ) -> torch.Tensor:
        """`size` bytes of host memory for `use` that the device reads and writes at full speed: uint8 [size].

        `fill` writes them before they are pinned: pages that are there already are pinned faster. Or they are those
        of `pages`, if these suffice; what is left of them goes back to the system.

        Raises:
            ConfigError: the memory cannot be had or cannot be pinned; never falls back to pageable memory.
        """

    @abstractmethod
    def check_pinning(self, size: int) -> None:
        """Find out whether `size` bytes could be pinned, as far as the limits of this process have a say in it.

        Raises:
            ConfigError: a limit is too low.
        """

    @abstractmethod
    def release_pinned(self) -> None:
        """Give back all pinned memory; tensors on it must not be used any more."""

    @abstractmethod
    def release_cached(self) -> None:
        """Give free device memory back to the system."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Launches of this thread go to `stream`."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """The moment when all that was launched on `stream` so far is done."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """What is launched on `stream` from now on runs after `event`."""

    @abstractmethod
    def synchronize(self, event: Event) -> None:
        """Block this thread until `event`."""

    @abstractmethod
    def drain(self) -> None:
        """Block until nothing is under way; only when an engine starts and ends."""

    @abstractmethod
    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        """What each function launches on the compute stream, ready to be launched again as one; on the CPU, functions.

        They are called in order, twice, and so is what comes of them: each goes on with the memory that those before it
        have filled. Shapes and addresses are as they were. Nothing else may use the device meanwhile.
        """

    @abstractmethod
    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        """The memory of `tensor` is not reused before `stream` is done with it."""

    @abstractmethod
    def upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """A small host array on the device, in order with the current stream."""

    @contextmanager
    def uploads(self) -> Iterator[Uploads]:
        """Gathers small host arrays, for use on the current stream and on `store`: on the device when this is left."""
        uploads = Uploads(self._upload_memory)
        yield uploads
        uploads.send()

    def _upload_memory(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        host, target = self.small_memory(size)
        self.keep(target, self.store)
        return host, target

    def small_memory(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for `uploads`: uint8 [size] on the host, from which copies do not block, and [size] on the device."""
        return self.small_pinned(size), self.empty((size,), torch.uint8, DeviceUse.WORKSPACE)

    @abstractmethod
    def small_pinned(self, size: int) -> torch.Tensor:
        """Host memory uint8 [size] that the device reads and writes: so little that no line of a plan has it."""

    @abstractmethod
    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the host, on the current stream. What this returns waits for it and gives it."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a contiguous tensor to pinned memory, on the current stream: by a kernel, which can be captured."""

    def arrived(self, target: torch.Tensor, event: Event) -> torch.Tensor:
        """The pinned memory `target`, once `event` has come, before which it was sent: this thread waits, awake."""
        self.synchronize(event)
        return target

    @abstractmethod
    def load_bytes(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy pinned bytes to the front of `target` on the current stream, in pieces that let others come between."""

    @abstractmethod
    def copy_runs(self, target: torch.Tensor, source: torch.Tensor, runs: Runs) -> None:
        """Copy runs of rows of `source` [*, w] to `target` [*, w], on the current stream, by copy engine.

        One is pinned, the other on the device; both are contiguous.
        """

    @abstractmethod
    def copy_rows(
        self, target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor
    ) -> None:
        """`target[target_rows] = source[source_rows]` on the current stream; `target` [*, w] may be pinned memory."""


class CpuDevice(Device):
    """The CPU as a device: memory is ordinary memory, and every call is done when it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("cpu")
        self.warms_up = False
        self.load = self.gather = self.compute = self.store = None

    @property
    def name(self) -> str:
        return "CPU"

    @property
    def uuid(self) -> str:
        return ""

    @property
    def free_memory(self) -> int:
        return HostMemory.read().free

    @property
    def memory(self) -> DeviceMemory:
        return DeviceMemory()

    def limit_memory(self, size: int) -> None:
        pass

    def pages(self, size: int) -> HostPages | None:
        return None

    def pinned(
        self,
        size: int,
        use: HostUse,
        fill: Callable[[torch.Tensor], object] | None = None,
        *,
        pages: HostPages | None = None,
    ) -> torch.Tensor:
        try:
            tensor = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise ConfigError(
                "host_memory", format_bytes(size), "the system does not give it", "lower host_memory"
            ) from error
        if fill is not None:
            fill(tensor)
        return self._account.add(tensor, use)

    def check_pinning(self, size: int) -> None:
        pass

    def release_pinned(self) -> None:
        pass

    def release_cached(self) -> None:
        pass

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, stream: Stream) -> Event:
        return None

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def synchronize(self, event: Event) -> None:
        pass

    def drain(self) -> None:
        pass

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        return list(functions)

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        pass

    def upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array)

    def small_pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: tensor

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(tensor)

    def load_bytes(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target[: len(source)].copy_(source)

    def copy_runs(self, target: torch.Tensor, source: torch.Tensor, runs: Runs) -> None:
        assert target.is_contiguous()
        assert source.is_contiguous()
        for start, row, count in zip(runs.source.tolist(), runs.target.tolist(), runs.count.tolist(), strict=True):
            target[row : row + count].copy_(source[start : start + count])

    def copy_rows(
        self, target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor
    ) -> None:
        target.index_copy_(0, target_rows, source.index_select(0, source_rows))


def _open_cuda() -> Device:
    if not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "torch finds no CUDA device", "use device=cpu, or a torch build with CUDA")
    from hsrpc.device.cuda import CudaDevice  # loads Triton

    return CudaDevice()


OPENERS: dict[DeviceKind, Callable[[], Device]] = {DeviceKind.CPU: CpuDevice, DeviceKind.CUDA: _open_cuda}
"""What `open_device` calls; tests put other devices in place of the CPU."""


def open_device(kind: DeviceKind) -> Device:
    """The device to compute on; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    return OPENERS[device_kind(kind)]()


def device_kind(kind: DeviceKind) -> DeviceKind:
    """CUDA or CPU; `auto` takes CUDA where there is one."""
    if kind is not DeviceKind.AUTO:
        return kind
    return DeviceKind.CUDA if torch.cuda.is_available() else DeviceKind.CPU


def num_devices(kind: DeviceKind) -> int | None:
    """GPUs that there are; None: a CPU stands for as many as are wanted."""
    return torch.cuda.device_count() if device_kind(kind) is DeviceKind.CUDA else None
