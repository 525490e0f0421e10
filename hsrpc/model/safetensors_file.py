"""Reads one safetensors file: the header is checked when it is opened, data goes straight into a tensor's memory.

Format: 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.bounds import MAX_DIMENSIONS, MAX_FILE_BYTES, MAX_JSON_BYTES
from hsrpc.model.config_file import shortened, shown
from hsrpc.model.foreign import HEAD_BYTES, check_own
from hsrpc.model.tensor import dtype_name

VALUES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Element types of weights that are no codes."""
DTYPES = VALUES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Element types that can be read."""
_LENGTH_BYTES = 8
_CHUNK_ELEMENTS = 1 << 23
_COMPARED_BYTES = 1 << 22
_REFETCH = "fetch the file again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The tensors of one file. Holds no handle, so reads may come from any thread.

    Raises:
        CheckpointError: on construction, when the file is truncated or its header is not one of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                check_own(path, file.read(HEAD_BYTES))
                file.seek(0)
                length = self._header_length(file.read(_LENGTH_BYTES), size)
                header = file.read(length)
        except OSError as error:
            raise self.refuse("a readable file", error.strerror) from None
        self.entries = self._parse(header, _LENGTH_BYTES + length)
        self._check_extent(_LENGTH_BYTES + length, size)

    def refuse(self, expected: str, found: object, remedy: str = _REFETCH, tensor: str = "") -> CheckpointError:
        where = f"{self.path}: {shortened(tensor)}" if tensor else str(self.path)
        return CheckpointError(f"{where}: expected {expected}, found {found}; {remedy}")

    def _header_length(self, prefix: bytes, size: int) -> int:
        if len(prefix) < _LENGTH_BYTES:
            raise self.refuse("a safetensors file", f"{len(prefix)} bytes")
        length = int.from_bytes(prefix, "little")
        if length > MAX_JSON_BYTES:
            raise self.refuse(f"a header of at most {MAX_JSON_BYTES} bytes", f"{length} bytes")
        if _LENGTH_BYTES + length > size:
            raise self.refuse(f"a file of at least {_LENGTH_BYTES + length} bytes", f"{size} bytes")
        return length

    def _parse(self, header: bytes, data_start: int) -> dict[str, TensorEntry]:
        try:
            values = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise self.refuse("a JSON header", error) from None
        if not isinstance(values, dict):
            raise self.refuse("a JSON object as header", type(values).__name__)
        values.pop("__metadata__", None)
        return {name: self._parse_entry(name, value, data_start) for name, value in values.items()}

    def _parse_entry(self, name: str, value: object, data_start: int) -> TensorEntry:
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise self.refuse("dtype, shape and two data_offsets in the header", shown(value), tensor=name)
        if len(shape) > MAX_DIMENSIONS:
            raise self.refuse(f"a shape of at most {MAX_DIMENSIONS} sizes", f"{len(shape)} sizes", tensor=name)
        entry = TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
        if dtype in DTYPES and entry.end - entry.start != math.prod(shape) * DTYPES[dtype].itemsize:
            found = f"{entry.end - entry.start} bytes"
            raise self.refuse(f"{math.prod(shape)} elements of {dtype}", found, tensor=name)
        return entry

    def _check_extent(self, data_start: int, size: int) -> None:
        """Tensors must follow one another without overlap and end with the file."""
        reached = data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != reached or entry.end < entry.start:
                raise self.refuse(f"data from byte {reached} on", f"from {entry.start} to {entry.end}", tensor=name)
            reached = entry.end
        if reached != size:
            raise self.refuse(f"a file of {reached} bytes", f"{size} bytes")

    def read(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        """Copies elements of the tensor `name`, from `first` on, into `out`; values are converted to its type.

        `out` has one dimension, contiguous, and as many elements as are read.

        Raises:
            CheckpointError: the element type is not supported, a value is too large for the type of `out`, or the file
                has become shorter.
        """
        entry = self.entries[name]
        is_direct = out.device.type == "cpu" and out.dtype == DTYPES.get(entry.dtype)
        if not is_direct:
            self.check_dtype(name)
        dtype = DTYPES[entry.dtype]
        begin = entry.start + first * dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            if is_direct:
                self._fill(file.fileno(), name, begin, out)
                return
            scratch = torch.empty(min(len(out), _CHUNK_ELEMENTS), dtype=dtype, device="cpu")
            for done in range(0, len(out), _CHUNK_ELEMENTS):
                piece = out[done : done + _CHUNK_ELEMENTS]
                self._fill(file.fileno(), name, begin + done * dtype.itemsize, scratch[: len(piece)])
                piece.copy_(scratch[: len(piece)])
                self._check_range(name, scratch[: len(piece)], piece)

    def _check_range(self, name: str, stored: torch.Tensor, served: torch.Tensor) -> None:
        """Check that no element has become infinite by its conversion."""
        if torch.finfo(served.dtype).max >= torch.finfo(stored.dtype).max or _is_finite(served):
            return
        if not _is_finite(stored):
            return  # infinite, or NaN, as it was published
        found = f"{stored.abs().max().item():.4g}"
        wider = [each for each in (torch.bfloat16, torch.float32) if _is_finite(stored.to(each))]
        remedy = f"serve it with --dtype {dtype_name(wider[0])}" if wider else _REFETCH
        expected = f"at most {torch.finfo(served.dtype).max:.4g}, the largest {dtype_name(served.dtype)}"
        raise self.refuse(expected, found, remedy, name)

    def same(self, name: str, other: SafetensorsFile, other_name: str) -> bool:
        """Whether the tensor `name` is the other one, byte for byte."""
        first, second = self.entries[name], other.entries[other_name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        with self.path.open("rb") as file, other.path.open("rb") as others:
            file.seek(first.start)
            others.seek(second.start)
            for done in range(0, first.end - first.start, _COMPARED_BYTES):
                size = min(_COMPARED_BYTES, first.end - first.start - done)
                if file.read(size) != others.read(size):
                    return False
        return True

    def check_dtype(self, name: str) -> None:
        dtype = self.entries[name].dtype
        if dtype not in VALUES:
            raise self.refuse("one of " + ", ".join(VALUES), shortened(dtype), "serve an unquantized checkpoint", name)

    def _fill(self, descriptor: int, name: str, start: int, out: torch.Tensor) -> None:
        memory = out.view(torch.uint8).numpy().data
        done = 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done:]], start + done)
            if count == 0:
                raise self.refuse(f"{len(memory)} bytes from byte {start} on", f"{done} bytes", tensor=name)
            done += count


def _is_finite(values: torch.Tensor) -> bool:
    """As `isfinite().all()`, which takes 25 times as long for float16 on the CPU."""
    return not len(values) or all(math.isfinite(bound.item()) for bound in values.aminmax())


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_FILE_BYTES for value in values)
