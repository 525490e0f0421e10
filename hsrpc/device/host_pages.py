"""Host memory in whole pages, given by the system before it is pinned: the pages take longer than pinning them."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from hsrpc.config import format_bytes
from hsrpc.errors import ConfigError


class HostPages:
    """Anonymous memory. `fill` writes it, which makes the system give it; by default a byte of each page is written.

    Raises:
        ConfigError: the system does not give it.
    """

    def __init__(self, size: int, fill: Callable[[torch.Tensor], object] | None = None) -> None:
        try:
            self._memory = mmap.mmap(-1, _whole_pages(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            problem = f"the system does not give it ({error.strerror})"
            raise ConfigError("host_memory", format_bytes(size), problem, "lower host_memory") from error
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)[:size]
        """uint8 [size]"""
        (fill or _touch)(self.tensor)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages that are kept."""
        return _whole_pages(len(self.tensor))

    def shorten(self, size: int) -> None:
        """Keep `size` bytes; the pages behind them go back to the system."""
        self.tensor = self.tensor[:size]
        if self.num_bytes < len(self._memory):
            self._memory.madvise(mmap.MADV_DONTNEED, self.num_bytes, len(self._memory) - self.num_bytes)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _touch(tensor: torch.Tensor) -> None:
    tensor[:: mmap.PAGESIZE] = 0
