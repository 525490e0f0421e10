"""The GPUs of one host that share a stream of weights: which part of a layer each loads, and how it gets the others.

A layer crosses as bytes, whatever format it has: n GPUs cut its packed bytes into n parts of one size, the last one
padded. Each loads its own part to where it belongs in the layer's buffer, and then all gather: a collective operation,
which every GPU launches for every layer in the same order. Parts that stay on the devices are gathered from where they
lie: the same operation, with memory of its own for what a GPU gives.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from hsrpc.errors import EngineFaultError
from hsrpc.plan.sizes import part_bytes

_HOST = "127.0.0.1"
_LIMIT = timedelta(seconds=60)
"""After which a collective operation that does not end is a fault: GPUs go through the layers side by side."""


class LostError(EngineFaultError):
    """The other GPUs did not do their part: why, they know."""


class DeviceGroup(ABC):
    """The GPUs that load for each other, as one of them sees it."""

    size: int
    rank: int
    """Number of this GPU among them."""

    @property
    def is_alone(self) -> bool:
        """It loads all by itself, and gathers nothing."""
        return self.size == 1

    def part(self, num_bytes: int) -> tuple[int, int]:
        """First byte and end of what this GPU loads of a layer's `num_bytes`; the end may lie in the padding."""
        size = self.part_bytes(num_bytes)
        return self.rank * size, (self.rank + 1) * size

    def part_bytes(self, num_bytes: int) -> int:
        """Bytes of each GPU's part."""
        return num_bytes if self.is_alone else part_bytes(num_bytes, self.size)

    @abstractmethod
    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Fill `whole` (uint8, all parts) with the parts of all GPUs, on the current stream.

        `own` is this GPU's: its place in `whole`, or memory apart from it.

        Raises:
            LostError: they do not come.
        """

    @abstractmethod
    def meet(self) -> None:
        """Block this thread until all have come here.

        Raises:
            LostError: not all do.
        """

    @abstractmethod
    def leave(self) -> None:
        """End the connections to the others."""


class Alone(DeviceGroup):
    """One GPU."""

    size = 1
    rank = 0

    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        raise AssertionError("nothing is gathered")

    def meet(self) -> None:
        pass

    def leave(self) -> None:
        pass


ALONE = Alone()


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of a group find each other: a store on this host, which the front process keeps."""

    port: int
    """Port on the loopback interface."""

    def join(self, size: int) -> Store:
        """The store as one of `size` processes sees it."""
        return TCPStore(_HOST, self.port, world_size=size, is_master=False, timeout=_LIMIT)


class MeetingPlace:
    """The store of a meeting."""

    def __init__(self, size: int) -> None:
        """For `size` processes; only this host reaches it."""
        with socket.socket() as listener:
            listener.bind((_HOST, 0))
            listener.listen()
            self.meeting = Meeting(listener.getsockname()[1])
            self._store: TCPStore | None = TCPStore(
                _HOST,
                self.meeting.port,
                world_size=size,
                is_master=True,
                wait_for_workers=False,
                timeout=_LIMIT,
                master_listen_fd=listener.detach(),
            )

    def close(self) -> None:
        """End the store's thread, and its connections."""
        self._store = None


class Connected(DeviceGroup):
    """One of several GPUs, each of a process of its own, connected by NCCL, or by gloo on the CPU."""

    def __init__(self, meeting: Meeting, rank: int, size: int, device: torch.device) -> None:
        """Connect to the others; returns once all have.

        Raises:
            LostError: not all do.
        """
        self.rank = rank
        self.size = size
        self._device = device
        on_gpu = device.type == "cuda"
        with _with_others():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=meeting.join(size),
                rank=rank,
                world_size=size,
                timeout=_LIMIT,
                device_id=device if on_gpu else None,  # connects now, not with the first operation
            )

    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        with _with_others():
            _all_gather(whole, own)

    def meet(self) -> None:
        with _with_others():
            dist.barrier(device_ids=[self._device.index] if self._device.type == "cuda" else None)

    def leave(self) -> None:
        dist.destroy_process_group()


@contextmanager
def _with_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of many kinds; what they have in common is that this GPU can do nothing about it
        raise LostError(f"the other GPUs did not do their part: {error}") from None


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name before torch 2.13. In place, where the part lies where it comes to lie, and else it copies that as well;
waits on the current stream."""
