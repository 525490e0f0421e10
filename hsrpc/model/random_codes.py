"""Formats in which random weights may be drawn, for measurements and plans of a quantised model without a checkpoint.

`random:SHAPE:FORMAT`, such as `random:qwen3-32b:fp8`: the model's matrices are quantised that are so in checkpoints
published in that format. Codes and scales are drawn, such that weights are about those that `RandomWeights` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from hsrpc.errors import ModelNotFoundError
from hsrpc.model.experts import ROUTER, SHARED_GATE
from hsrpc.model.family import Family
from hsrpc.model.formats.codes import Code, CodedMatrix, CodedParts, Factor
from hsrpc.model.formats.scaled import Scaled
from hsrpc.model.shapes import SHAPES
from hsrpc.model.tensor import TensorSpec

_BLOCK = 130_267
"""Bytes drawn, which repeat: a prime, so that rows of a matrix do not begin alike."""
_FACTOR = 2.0**-10
"""The number for all scales, where they have one: scales of usual weights then fit their type."""
_SPREAD = 0.2
"""Scales are up to so much larger or smaller than what weights need, as a part of it."""
_DEVIATIONS = {Code.E4M3: 100.0, Code.E2M1: 2.0, Code.UINT8: 28.0, Code.UINT4: 2.3}
"""Standard deviation of what codes mean: the largest of them are then those of a few weights in a block."""


@dataclass(frozen=True, slots=True)
class RandomFormat:
    """A format that random weights can have."""

    name: str
    matrix: Callable[[int, int], CodedMatrix]
    """The layout of a matrix of so many rows and columns."""
    experts_alone: bool = False
    """Where a layer has experts, nothing else is quantised."""

    def formats(self, family: Family) -> dict[TensorSpec, Scaled]:
        """The format of each tensor of the layers that is quantised."""
        dtype = family.spec.dtype
        found: dict[TensorSpec, Scaled] = {}
        for layer in range(family.num_layers):
            experts = {name for names in family.expert_names(layer) for name in names}
            for tensor in family.layer_tensors(layer):
                if _is_linear(tensor) and (tensor.name in experts or not (experts and self.experts_alone)):
                    sources = tuple(self.matrix(rows, columns) for rows, columns in tensor.source_shapes)
                    found[tensor] = Scaled(dtype, sources)
        return found


def _is_linear(tensor: TensorSpec) -> bool:
    """Whether it is the weight of a linear layer, other than those that are too small to be quantised."""
    is_weight = len(tensor.shape) == 2 and not tensor.mean and tensor.sources[0].endswith(".weight")
    return is_weight and tensor.name not in (ROUTER.weight, SHARED_GATE.weight)


def _fp8(rows: int, columns: int) -> CodedMatrix:
    return CodedMatrix(rows=rows, columns=columns, code=Code.E4M3, block=(128, 128))


def _mxfp4(rows: int, columns: int) -> CodedMatrix:
    return CodedMatrix(rows=rows, columns=columns, code=Code.E2M1, block=(1, 32), scale=torch.float8_e8m0fnu)


def _nvfp4(rows: int, columns: int) -> CodedMatrix:
    scale, factor = torch.float8_e4m3fn, Factor.MULTIPLIES
    return CodedMatrix(rows=rows, columns=columns, code=Code.E2M1, block=(1, 16), scale=scale, factor=factor)


def _w4a16(rows: int, columns: int) -> CodedMatrix:
    return CodedMatrix(rows=rows, columns=columns, code=Code.UINT4, block=(1, 128), scale=torch.bfloat16, zero=8)


def _w8a16(rows: int, columns: int) -> CodedMatrix:
    return CodedMatrix(rows=rows, columns=columns, code=Code.UINT8, block=(1, 128), scale=torch.bfloat16, zero=128)


RANDOM_FORMATS = {
    each.name: each
    for each in (
        RandomFormat("fp8", _fp8),
        RandomFormat("mxfp4", _mxfp4, experts_alone=True),
        RandomFormat("nvfp4", _nvfp4),
        RandomFormat("w4a16", _w4a16),
        RandomFormat("w8a16", _w8a16),
    )
}
"""By name: fp8 in blocks of 128 x 128; float4 with a power of two for 32, or a float8 for 16; 4 or 8 bits, with a scale
for 128."""


def split_format(name: str) -> tuple[str, RandomFormat | None]:
    """The shape, or the path of a config.json, in SHAPE or SHAPE:FORMAT, and the format; None: weights are plain.

    Raises:
        ModelNotFoundError: there is no such format.
    """
    shape, colon, form = name.rpartition(":")
    if colon and form in RANDOM_FORMATS:
        return shape, RANDOM_FORMATS[form]
    if shape in SHAPES:
        raise ModelNotFoundError(f"{form!r} is no format of random weights; use one of {', '.join(RANDOM_FORMATS)}")
    return name, None


def draw_codes(parts: CodedParts, deviation: float, generator: torch.Generator) -> None:
    """Fill the parts of a matrix whose weights are to be normal with that standard deviation.

    They repeat what was drawn once for all matrices, each from another place on: drawing is what takes long.
    """
    matrix, factor = parts.matrix, 1.0 if parts.factor is None else _FACTOR
    scale = deviation / _DEVIATIONS[matrix.code] / factor
    spread = _SPREAD
    if matrix.scale is torch.float8_e8m0fnu:
        scale, spread = 2.0 ** round(math.log2(scale)), 0.0
    first, second = torch.randint(_BLOCK, (2,), generator=generator).tolist()
    repeat((_scales(spread).roll(first) * scale).to(matrix.scale), parts.scales)
    repeat(_codes(matrix.code, matrix.zero or 0, deviation / scale / factor).roll(second), parts.codes)
    if parts.factor is not None:
        parts.factor.fill_(factor)


@cache
def _scales(spread: float) -> torch.Tensor:
    """Numbers about 1: float32 [_BLOCK]."""
    return torch.empty(_BLOCK).uniform_(1 - spread, 1 + spread, generator=torch.Generator().manual_seed(1))


@lru_cache(64)
def _codes(code: Code, zero: int, deviation: float) -> torch.Tensor:
    """Bytes of codes [_BLOCK], whose meanings are normal with that standard deviation as far as they reach."""
    numbers = torch.empty(_BLOCK * 8 // code.bits).normal_(0.0, deviation, generator=torch.Generator().manual_seed(0))
    if code is Code.E4M3:
        return numbers.clamp_(-code.largest, code.largest).to(torch.float8_e4m3fn).view(torch.uint8)
    if code is Code.E2M1:
        sizes = torch.bucketize(numbers.abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
        codes = (sizes | numbers.signbit() * 8).to(torch.uint8)
    else:
        codes = numbers.round_().add_(zero).clamp_(0, code.largest).to(torch.uint8)
    return codes if code.bits == 8 else codes[::2] | codes[1::2] << 4


def repeat(block: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` with what `block`, of one dimension, has, again and again."""
    block = block.to(out.device)
    flat = out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype, device=out.device)
    end = len(flat) // len(block) * len(block)
    flat[:end].view(-1, len(block)).copy_(block)
    flat[end:].copy_(block[: len(flat) - end])
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))
