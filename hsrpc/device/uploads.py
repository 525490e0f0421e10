"""Small arrays on their way to the device, gathered into few copies: one apiece costs the host more than the bus."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hsrpc.plan.sizes import align

_CHUNK_BYTES = 2 * 1024**2
_NOTHING = torch.empty(0, dtype=torch.uint8)
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}

Upload: TypeAlias = Callable[[npt.NDArray[np.integer]], torch.Tensor]
"""Takes an array of int32 or int64 and gives a tensor on the device, to be filled."""


class Uploads:
    """Gives each array its place in a chunk of device memory; `send` fills them, in order with the current stream."""

    def __init__(self, allocate: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._allocate = allocate
        """Allocator of as many bytes on the host and on the device: uint8 [size] each."""
        self._used = 0
        self._open(0)

    def __call__(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        """Reserve a place for `array`: the device tensor that holds it once it is sent."""
        start = align(self._used)
        if start + array.nbytes > self._bytes.size:
            self.send()
            self._open(max(_CHUNK_BYTES, align(array.nbytes)))
            start = 0
        self._used = end = start + array.nbytes
        self._bytes[start:end].view(array.dtype)[:] = array.reshape(-1)
        found = self._views[array.dtype][start // array.itemsize : end // array.itemsize]
        return found if array.ndim == 1 else found.view(array.shape)

    def send(self) -> None:
        """Copy what has been gathered; what comes later goes to another chunk."""
        if self._used:
            self._device[: self._used].copy_(self._host[: self._used], non_blocking=True)
        self._open(0)

    def _open(self, size: int) -> None:
        """A chunk, which is written as bytes and taken as whole numbers."""
        self._host, self._device = self._allocate(size) if size else (_NOTHING, _NOTHING)
        self._bytes = self._host.numpy()
        self._views = {dtype: self._device.view(to) for dtype, to in _DTYPES.items()}
        self._used = 0
