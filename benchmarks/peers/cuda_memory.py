"""Device and host memory of a peer: its budget, its peak, and pinned memory of exact size for its weights."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

_PORTABLE = 0x01
_GPU = torch.device("cuda", 0)


class PinnedWeights:
    """Pinned tensors of exact size, kept until the process ends.

    torch's own pinned allocator rounds up to powers of two, which would cost a peer a quarter of its host budget.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._kept: list[mmap.mmap] = []

    def random(self, shape: Sequence[int], mean: float, deviation: float) -> torch.Tensor:
        """float16, drawn on the GPU.

        Raises:
            MemoryError: CUDA does not pin it.
        """
        target = self._allocate(torch.Size(shape))
        target.copy_(random_on_gpu(shape, mean, deviation))
        return target

    def _allocate(self, shape: torch.Size) -> torch.Tensor:
        pages = -(-2 * shape.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(memory, dtype=torch.float16)
        tensor.zero_()  # by all cores: the pages are there before they are registered, which has one core
        status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), pages, _PORTABLE)
        if int(status) != 0:
            raise MemoryError(f"CUDA cannot pin {pages} bytes (error {int(status)}); lower the host budget")
        self._kept.append(memory)
        self.num_bytes += pages
        return tensor[: shape.numel()].view(shape)


def random_on_gpu(shape: Sequence[int], mean: float, deviation: float) -> torch.Tensor:
    """float16 with a normal distribution."""
    return torch.empty(tuple(shape), dtype=torch.float16, device=_GPU).normal_(mean, deviation)


def limit_device(size: int) -> None:
    """The allocator refuses what goes beyond `size` bytes."""
    total = torch.cuda.get_device_properties(_GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), _GPU)


def unlimit_device() -> None:
    """Calibration after a run is not part of it."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, _GPU)


def reset_peak() -> None:
    """Loading is not part of the run, nor is what it left in the allocator."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(_GPU)


def peak_bytes() -> int:
    """Most bytes reserved at once since `reset_peak`."""
    return torch.cuda.max_memory_reserved(_GPU)


def pinned_by_torch() -> int:
    """Most bytes that torch's own pinned allocator held at once, rounded up to powers of two.

    Its count of the bytes in use does not sink when pinned memory is freed (torch 2.11), and cannot be used.
    """
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def device_name() -> str:
    return torch.cuda.get_device_name(_GPU)
