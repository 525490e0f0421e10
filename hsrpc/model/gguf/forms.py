"""In which form a tensor of a GGUF file is written: as values, or as its codes in a layout that others read.

The value of a code is it times the scale of its 32 columns, a product in float32: so it is kept to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from hsrpc.model.gguf.file import GgufTensor, decode
from hsrpc.model.gguf.weights import LatentTarget, Piece, Target
from hsrpc.model.tensor import dtype_name

GROUP = 32
"""Columns that share a scale."""
_CODE_BITS = {
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q5_0: 8,
    GGMLQuantizationType.Q8_0: 8,
    GGMLQuantizationType.IQ4_NL: 8,
}
"""Types whose blocks are a float16 scale and what is a whole number of so many bits for each of 32 columns, decoded."""
_CHUNK_ELEMENTS = 1 << 18
"""Decoded at once: fastest by far, of 2**14 to 2**22."""

Rows = npt.NDArray[np.generic]
Read = Callable[[GgufTensor, Rows], tuple[torch.Tensor, ...]]
"""From rows of a tensor to what is written of them: each [rows, ...]."""


@dataclass(frozen=True)
class Values:
    """Values, rounded once from float32 to `dtype`."""

    dtype: torch.dtype

    def num_bytes(self, target: Target | LatentTarget) -> int:
        return torch.Size(target.shape).numel() * self.dtype.itemsize

    def tensors(self, target: Target | LatentTarget) -> Iterator[tuple[str, torch.Tensor]]:
        """The one tensor.

        Raises:
            CheckpointError: a value is too large for the type.
        """
        yield target.name, self._latent(target) if isinstance(target, LatentTarget) else self._shaped(target)

    def _shaped(self, target: Target) -> torch.Tensor:
        def read(tensor: GgufTensor, rows: Rows) -> tuple[torch.Tensor, ...]:
            values = _decoded(tensor, rows)
            return (self._rounded(tensor, values - target.offset if target.offset else values),)

        [values] = _gather(target, read)
        shaped = values.view(target.shape)
        return shaped.transpose(-1, -2).contiguous() if target.transposed else shaped

    def _latent(self, target: LatentTarget) -> torch.Tensor:
        keys, values = map(self._whole, (target.keys, target.values))
        return torch.cat((keys.transpose(1, 2), values), dim=1).view(target.shape)

    def _whole(self, tensor: GgufTensor) -> torch.Tensor:
        piece = Piece(tensor, 0, len(tensor.rows))
        return self._shaped(Target(name=tensor.name, shape=tensor.shape, pieces=(piece,)))

    def _rounded(self, tensor: GgufTensor, values: torch.Tensor) -> torch.Tensor:
        rounded = values.to(self.dtype)
        if self.dtype == torch.float16 and not rounded.isfinite().all() and values.isfinite().all():
            expected = f"at most {torch.finfo(self.dtype).max:.4g}, the largest {dtype_name(self.dtype)}"
            raise tensor.refuse(expected, f"{values.abs().max().item():.4g}", "convert it with --dtype bfloat16")
        return rounded


@dataclass(frozen=True)
class Groups:
    """Whole numbers of `bits` bits in words of 32, the lowest bits first, with a float16 scale for each 32 columns.

    `pack-quantized` of compressed-tensors, symmetric: stored are unsigned numbers, from 0 for the least.
    """

    bits: int
    layout: ClassVar[str] = "pack-quantized"

    @property
    def scheme(self) -> dict[str, object]:
        """What compressed-tensors says of such weights."""
        return _scheme(self.bits, "int")

    def num_bytes(self, target: Target) -> int:
        rows, columns = target.shape
        return rows * columns * self.bits // 8 + rows * columns // GROUP * 2 + 16

    def tensors(self, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
        """Codes int32 [rows, words], scales float16 [rows, groups] and the shape, under the name of the weight."""
        packed, scales = _gather(target, self._read)
        yield f"{target.name}_packed", packed
        yield f"{target.name}_scale", scales
        yield f"{target.name}_shape", torch.tensor(target.shape)

    def _read(self, tensor: GgufTensor, rows: Rows) -> tuple[torch.Tensor, ...]:
        """With a scale of one, the values of a block are its codes."""
        blocks = _blocks(tensor, rows).copy()
        scales = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
        blocks[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        codes = (_decoded(tensor, blocks.reshape(len(rows), -1)) + (1 << self.bits - 1)).to(torch.uint8)
        octets = codes if self.bits == 8 else _in_bytes(codes)
        return octets.view(torch.int32), torch.from_numpy(scales)


@dataclass(frozen=True)
class Float4Groups:
    """Numbers in e2m1, two in a byte, the lower bits first, with an exponent for each 32 columns.

    `mxfp4-pack-quantized` of compressed-tensors.
    """

    layout: ClassVar[str] = "mxfp4-pack-quantized"

    @property
    def scheme(self) -> dict[str, object]:
        """What compressed-tensors says of such weights."""
        return _scheme(4, "float") | {"scale_dtype": "torch.uint8"}

    def num_bytes(self, target: Target) -> int:
        return _float4_bytes(target)

    def tensors(self, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
        """Codes uint8 [rows, columns / 2] and exponents uint8 [rows, groups], under the name of the weight."""
        codes, exponents = _gather(target, _read_float4)
        yield f"{target.name}_packed", codes.flatten(1)
        yield f"{target.name}_scale", exponents


@dataclass(frozen=True)
class Float4Experts:
    """The same, of all experts together, as gpt-oss is published."""

    def num_bytes(self, target: Target) -> int:
        return _float4_bytes(target)

    def tensors(self, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
        """Codes uint8 [experts, rows, groups, 16] and exponents uint8 [experts, rows, groups]."""
        codes, exponents = _gather(target, _read_float4)
        groups = (*target.shape[:-1], target.shape[-1] // GROUP)
        yield f"{target.name}_blocks", codes.view(*groups, GROUP // 2)
        yield f"{target.name}_scales", exponents.view(groups)


InGroups = Groups | Float4Groups
"""Forms of compressed-tensors."""
Kept = InGroups | Float4Experts


def kept_forms(targets: Iterable[Target | LatentTarget]) -> dict[str, Kept]:
    """The form of each weight whose codes can be written, by its name; the values of all others must be.

    A checkpoint is of one method: where experts are stacked, other codes are not kept.
    """
    found = {target.name: _kept_form(target) for target in targets if isinstance(target, Target)}
    kept = {name: form for name, form in found.items() if form is not None}
    stacked: dict[str, Kept] = {name: form for name, form in kept.items() if isinstance(form, Float4Experts)}
    return stacked or kept


def _kept_form(target: Target) -> Kept | None:
    types = {piece.tensor.type for piece in target.pieces}
    if ".layers." not in target.name or len(target.shape) not in (2, 3):
        return None
    if len(target.shape) == 3:
        return Float4Experts() if types == {GGMLQuantizationType.MXFP4} and target.transposed else None
    if types == {GGMLQuantizationType.MXFP4}:
        return Float4Groups()
    bits = {_CODE_BITS.get(kind) for kind in types}
    [found] = bits if len(bits) == 1 else [None]
    return None if found is None else Groups(found)


def _scheme(bits: int, kind: str) -> dict[str, object]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", "group_size": GROUP}


def _float4_bytes(target: Target) -> int:
    return torch.Size(target.shape).numel() // GROUP * (GROUP // 2 + 1)


def _read_float4(tensor: GgufTensor, rows: Rows) -> tuple[torch.Tensor, ...]:
    """Codes [rows, groups, 16] and exponents [rows, groups]: in a block of the file the exponent comes first, and the
    second half of the columns has the higher bits."""
    blocks = torch.from_numpy(_blocks(tensor, rows).copy())
    codes = torch.cat((blocks[:, :, 1:] & 15, blocks[:, :, 1:] >> 4), dim=-1)
    return _in_bytes(codes), blocks[:, :, 0].contiguous()


def _in_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits in each byte."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _gather(target: Target, read: Read) -> list[torch.Tensor]:
    """What `read` makes of all rows, in their order: each [rows, ...]."""
    places = None if target.order is None else target.order.argsort()
    out: list[torch.Tensor] = []
    start, num_rows = 0, sum(piece.stop - piece.start for piece in target.pieces)
    for tensor, rows in _chunks(target.pieces):
        made = read(tensor, rows)
        out = out or [part.new_empty((num_rows, *part.shape[1:])) for part in made]
        stop = start + len(rows)
        for whole, part in zip(out, made, strict=True):
            whole[slice(start, stop) if places is None else places[start:stop]] = part
        start = stop
    return out


def _chunks(pieces: tuple[Piece, ...]) -> Iterator[tuple[GgufTensor, Rows]]:
    """Rows of the pieces in order, some at a time."""
    for tensor, first, last in pieces:
        step = max(1, _CHUNK_ELEMENTS // _columns(tensor))
        for start in range(first, last, step):
            yield tensor, tensor.rows[start : min(start + step, last)]


def _decoded(tensor: GgufTensor, rows: Rows) -> torch.Tensor:
    """Values of `rows`: float32 [rows, columns]. They are decoded as one row, which is several times as fast."""
    values = decode(np.ascontiguousarray(rows).reshape(1, -1), tensor.type)
    return torch.from_numpy(np.require(values, requirements="W")).view(len(rows), _columns(tensor))


def _columns(tensor: GgufTensor) -> int:
    return torch.Size(tensor.shape).numel() // len(tensor.rows)


def _blocks(tensor: GgufTensor, rows: Rows) -> npt.NDArray[np.uint8]:
    """Blocks of `rows`: [rows, blocks, bytes of a block]."""
    return rows.view(np.uint8).reshape(len(rows), -1, GGML_QUANT_SIZES[tensor.type][1])
