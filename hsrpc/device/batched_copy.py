"""Many copies in one driver call: cuMemcpyBatchAsync, on numpy arrays of addresses, without a Python loop."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_SRC_ACCESS_ORDER_STREAM = 1
_PREFER_OVERLAP_WITH_COMPUTE = 1


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h."""

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class BatchedCopy:
    """Callable that launches copies on a stream. The host call releases the interpreter lock."""

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        # CUDA 13 dropped the index of the failed copy from the arguments and named the result _v2.
        self._has_fail_index = not hasattr(driver, "cuMemcpyBatchAsync_v2")
        self._function = driver.cuMemcpyBatchAsync if self._has_fail_index else driver.cuMemcpyBatchAsync_v2
        attributes = _Attributes(_SRC_ACCESS_ORDER_STREAM, _Location(), _Location(), _PREFER_OVERLAP_WITH_COMPUTE)
        self._attributes = attributes
        self._first = ctypes.c_size_t(0)

    def __call__(self, targets: Ints, sources: Ints, sizes: Ints, stream: int) -> None:
        """Copy `sizes[i]` bytes from address `sources[i]` to `targets[i]`, in any order among themselves.

        Raises:
            RuntimeError: the driver refused.
        """
        if not len(sizes):
            return
        arrays = [np.ascontiguousarray(values, dtype=np.int64) for values in (targets, sources, sizes)]
        pointers = [ctypes.c_void_p(values.ctypes.data) for values in arrays]
        fail_index = ctypes.c_size_t(0)
        status = self._function(
            *pointers,
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            *([ctypes.byref(fail_index)] if self._has_fail_index else []),
            ctypes.c_void_p(stream),
        )
        if status:
            raise RuntimeError(f"cuMemcpyBatchAsync failed with CUDA error {status} on {len(sizes)} copies")
