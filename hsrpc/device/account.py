"""The account of a device: bytes that were handed out and are still held, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import count
from weakref import finalize

import torch

from hsrpc.plan.memory_use import DeviceUse, HostUse


class Account:
    """Counts tensors' memory until the last tensor on it is gone.

    Any thread may add. Entries come and go by single operations of a dictionary, so that no lock is held when the
    garbage collector, which runs anywhere, ends one.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[DeviceUse | HostUse, int]] = {}
        self._numbers = count()

    def add(self, tensor: torch.Tensor, use: DeviceUse | HostUse) -> torch.Tensor:
        """`tensor`, which has just been allocated and is counted from now on."""
        number = next(self._numbers)
        self._held[number] = use, tensor.nbytes
        finalize(tensor.untyped_storage(), self._held.pop, number).atexit = False
        return tensor

    @property
    def num_bytes(self) -> Mapping[DeviceUse | HostUse, int]:
        """Bytes held now, by use; 0 for a use without an entry."""
        found: Counter[DeviceUse | HostUse] = Counter()
        for use, size in self._held.copy().values():
            found[use] += size
        return found
