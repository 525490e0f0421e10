"""Lossless coding of 16-bit weights: fewer bytes on the bus, the same bits behind it.

Weights are about normally distributed, so nearly all exponents of a tensor lie in a window of seven octaves. A coded
tensor has, for each value turned left by one bit (exponent, mantissa, sign):

    low       its low byte as it is
    planes    its other bits: the exponent's place in the window in 3 (or 4) bits, then what the high byte has of the
              mantissa; 32 values share a word for each of these bits
    escapes   a byte for each exponent outside the window (its place is the last one), in order
    offsets   for each block of values, the escapes before it

Normally distributed float16 takes 0.89 of its bytes, bfloat16 0.70.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

BLOCK = 1024
"""Values that begin at an offset among the escapes."""
WORD = 32
_ALIGNMENT = 16
"""Of the parts, bytes."""
_CHUNK = 4 * 1024**2
"""Values encoded at once, a multiple of the block: they take about 50 bytes each meanwhile."""
_MANTISSA_BITS = {torch.float16: 3, torch.bfloat16: 0}
"""Of the high byte, behind the exponent."""
_CODE_BITS = (3, 4)
EXPECTED_SHARES = {torch.float16: 0.888, torch.bfloat16: 0.70}
"""Bytes of a coded tensor over its own, where values are normally distributed."""
MOST_SHARES = {torch.float16: 0.945, torch.bfloat16: 0.76}
"""The same with four bits and hardly an escape: for all but strange values."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How a tensor was coded; `base` is the exponent of the window's first place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    base: int
    code_bits: int
    num_escapes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_values // BLOCK)

    @property
    def mantissa_bits(self) -> int:
        return _MANTISSA_BITS[self.dtype]

    @property
    def num_planes(self) -> int:
        return self.code_bits + self.mantissa_bits

    @property
    def num_bytes(self) -> int:
        return self._ends()[-1]

    def parts(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of coded bytes: planes int32 [words, planes], offsets int32 [blocks], low uint8 [n], escapes uint8."""
        ends = self._ends()
        starts = [0, *(_aligned(end) for end in ends[:-1])]
        planes, offsets, low, escapes = (data[start:end] for start, end in zip(starts, ends, strict=True))
        return planes.view(torch.int32).view(-1, self.num_planes), offsets.view(torch.int32), low, escapes

    def _ends(self) -> list[int]:
        """Of each part, bytes."""
        words = self.num_blocks * (BLOCK // WORD)
        ends, start = [], 0
        for size in (4 * words * self.num_planes, 4 * self.num_blocks, self.num_values, self.num_escapes):
            ends.append(start + size)
            start = _aligned(ends[-1])
        return ends


def encode(values: torch.Tensor) -> tuple[Coding, torch.Tensor]:
    """A float16 or bfloat16 tensor's coding and its bytes (uint8), on the tensor's device."""
    chunks = values.reshape(-1).view(torch.int16).split(_CHUNK)
    mantissa_bits = _MANTISSA_BITS[values.dtype]
    counts = torch.stack([_exponents(_turned(chunk), mantissa_bits).bincount(minlength=256) for chunk in chunks])
    coding = Coding(tuple(values.shape), values.dtype, *_window(counts.sum(0)))
    data = torch.zeros(coding.num_bytes, dtype=torch.uint8, device=values.device)
    planes, offsets, low, escapes = coding.parts(data)
    done = num_escapes = 0
    for chunk in chunks:
        turned = _turned(chunk)
        exponents = _exponents(turned, mantissa_bits)
        place = exponents - coding.base
        last = 2**coding.code_bits - 1
        is_outside = (place < 0) | (place >= last)
        mantissa = (turned >> 8) & (2**mantissa_bits - 1)
        _write_planes(planes[done // WORD :], torch.where(is_outside, last, place) | mantissa << coding.code_bits)
        inside_blocks = _padded(is_outside, BLOCK).sum(1)
        offsets[done // BLOCK :][: len(inside_blocks)] = num_escapes + inside_blocks.cumsum(0) - inside_blocks
        low[done : done + len(chunk)] = turned & 0xFF
        found = exponents[is_outside]
        escapes[num_escapes : num_escapes + len(found)] = found
        done, num_escapes = done + len(chunk), num_escapes + len(found)
    return coding, data


def decode(data: torch.Tensor, coding: Coding, target: torch.Tensor) -> None:
    """Write the values that were coded to `target`, the same to the bit."""
    planes, _, low, escapes = coding.parts(data)
    bits = torch.arange(WORD, device=data.device)
    code = torch.zeros(len(planes), WORD, dtype=torch.int32, device=data.device)
    for number in range(coding.num_planes):
        code |= (planes[:, number, None] >> bits & 1).int() << number
    code = code.view(-1)[: coding.num_values]
    last = 2**coding.code_bits - 1
    exponents = coding.base + (code & last)
    exponents[code & last == last] = escapes.int()
    turned = (exponents << coding.mantissa_bits | code >> coding.code_bits) << 8 | low
    target.view(-1).view(torch.int16).copy_(turned >> 1 | (turned & 1) << 15)


def _turned(values: torch.Tensor) -> torch.Tensor:
    """16 bits each (int16), turned left by one: numbers below 2**16 (int32), of which the last bit is the sign."""
    bits = values.int() & 0xFFFF
    return (bits << 1 | bits >> 15) & 0xFFFF


def _exponents(turned: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    return turned >> 8 + mantissa_bits


def _window(counts: torch.Tensor) -> tuple[int, int, int]:
    """Of how many values have each exponent: base, bits and escapes of the window that takes the fewest bytes."""
    total, found = int(counts.sum()), []
    for bits in _CODE_BITS:
        covered = counts.unfold(0, 2**bits - 1, 1).sum(1)
        base = int(covered.argmax())
        escapes = total - int(covered[base])
        found.append((bits * total + 8 * escapes, base, bits, escapes))
    _, base, bits, escapes = min(found)
    return base, bits, escapes


def _write_planes(planes: torch.Tensor, code: torch.Tensor) -> None:
    """Bit j of 32 codes is word j of theirs."""
    words = _padded(code, WORD).long()
    bits = torch.arange(WORD, device=code.device)
    for number in range(planes.shape[1]):
        planes[: len(words), number] = ((words >> number & 1) << bits).sum(1).int()


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """In rows of `size`, zeros behind the last."""
    return functional.pad(values, (0, -len(values) % size)).view(-1, size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
