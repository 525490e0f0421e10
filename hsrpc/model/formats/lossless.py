"""Lossless coding of 16-bit weights: fewer bytes on the bus, the same bits behind it.

Weights are about normally distributed, so that a few exponents are those of nearly all values of a tensor. A code of
two bits is one of the three most frequent exponents, or says that the value has a code in the next level, where it is
one of the next three; behind three levels comes the exponent itself. A coded tensor has, for each value turned left by
one bit (exponent, mantissa, sign):

    codes     of all levels, 16 in a word; a level begins with a word
    planes    what the high byte has of the mantissa (float16): 32 values share a word for each bit
    offsets   for each block of values, where its codes of the next levels, and then its escapes, begin
    low       the low byte as it is
    escapes   exponents that no level has, a byte each

Normally distributed float16 takes 0.86 of its bytes, bfloat16 0.67.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch.nn import functional

from hsrpc.model.formats.format import Encoded, FromValues, Packing, moved
from hsrpc.model.formats.plain import PlainPacking
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.fitted import DECODE_RATE_SHARE
from hsrpc.plan.sizes import TensorSizes, align

LEVELS = 3
BLOCK = 4096
"""Values with offsets of their own."""
CODES_IN_WORD = 16
WORD = 32
"""Values that share a word of a plane; a tensor that is coded has a multiple of them."""
_ESCAPE = 3
"""The code that no exponent has."""
_ALIGNMENT = 16
"""Bytes; each part of the coded data begins at a multiple."""
_CHUNK = 1024 * BLOCK
"""Values encoded at once: they take about 50 bytes each meanwhile."""
_MANTISSA_BITS = {torch.float16: 3, torch.bfloat16: 0}
"""Bits of the mantissa in the high byte, behind the exponent."""
EXPECTED_SHARES = {torch.float16: 0.856, torch.bfloat16: 0.668}
"""Bytes of a coded tensor over its own, where values are normally distributed."""
MAX_SHARES = {torch.float16: 0.945, torch.bfloat16: 0.76}
"""The same for distributions a good deal wider, such as of seven exponents that are equally frequent."""


class CodedViews(NamedTuple):
    """Views of the parts of coded bytes."""

    codes: torch.Tensor
    """int32"""
    planes: torch.Tensor
    """int32 [words, mantissa bits]"""
    offsets: torch.Tensor
    """int32 [blocks, levels]"""
    low: torch.Tensor
    """uint8"""
    escapes: torch.Tensor
    """uint8"""


@dataclass(frozen=True, slots=True)
class Coding(Packing):
    """How a tensor was coded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    exponents: tuple[int, ...]
    """Exponents with codes, the most frequent first."""
    counts: tuple[int, ...]
    """Numbers of codes of each level, then of escapes."""

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
    def level_words(self) -> list[int]:
        """First word of each level, then the number of words."""
        return list(accumulate((-(-count // CODES_IN_WORD) for count in self.counts[:LEVELS]), initial=0))

    @property
    def tables(self) -> list[int]:
        """For each level its three exponents, a byte each."""
        parts = (self.exponents[start : start + _ESCAPE] for start in range(0, LEVELS * _ESCAPE, _ESCAPE))
        return [sum(exponent << 8 * code for code, exponent in enumerate(part)) for part in parts]

    @property
    def plane_words(self) -> int:
        """Words of each plane."""
        return self.num_values // WORD

    @property
    def ranks(self) -> torch.Tensor:
        """Ranks of the exponents by frequency: int32 [256]; the number of codes for all that have none."""
        ranks = torch.full((256,), len(self.exponents), dtype=torch.int32)
        ranks[list(self.exponents)] = torch.arange(len(self.exponents), dtype=torch.int32)
        return ranks

    def offsets(self, counts: torch.Tensor) -> torch.Tensor:
        """[blocks, levels] where a block's codes of the next levels begin, then its escapes, by how many it has."""
        words = torch.tensor([*self.level_words[1:LEVELS], 0]).to(counts.device, non_blocking=True)
        return counts.cumsum(0) - counts + CODES_IN_WORD * words

    @property
    def num_bytes(self) -> int:
        return self.bounds()[-1][1]

    @property
    def decoded_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.view(self.dtype).view(self.shape)

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]], moves: torch.Tensor | None = None) -> Callable[[], None]:
        if tensors[0].data.is_cuda:
            from hsrpc.model.kernels.lossless import WeightDecoder  # loads Triton

            return WeightDecoder.of(tensors, moves).run
        return partial(_decode_each, tensors, moves)

    def views(self, data: torch.Tensor) -> CodedViews:
        """The parts of the tensor's coded bytes (uint8)."""
        codes, planes, offsets, low, escapes = (data[start:end] for start, end in self.bounds())
        planes = planes.view(torch.int32).view(self.plane_words, self.mantissa_bits)
        offsets = offsets.view(torch.int32).view(-1, LEVELS)
        return CodedViews(codes.view(torch.int32), planes, offsets, low, escapes)

    def bounds(self) -> list[tuple[int, int]]:
        """First byte and end of each part, in the order of `CodedViews`."""
        planes = 4 * self.plane_words * self.mantissa_bits
        sizes = (4 * self.level_words[-1], planes, 4 * LEVELS * self.num_blocks, self.num_values, self.counts[-1])
        starts = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
        return [(start, start + size) for start, size in zip(starts, sizes, strict=False)]


@dataclass(frozen=True, slots=True)
class Lossless(FromValues):
    """Weights coded without loss: on the device while they are loaded, and decoded there before they are used.

    Tensors that do not fill words lie as they are. They are small, and counted as if they were coded.
    """

    dtype: torch.dtype

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether weights of that type can be coded."""
        return dtype in EXPECTED_SHARES

    @staticmethod
    def pays_on(device: torch.device) -> bool:
        """Whether a kernel decodes there, as fast as the planner counts."""
        return device.type == "cuda"

    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        size = align(tensor.numel * self.dtype.itemsize)
        expected = size * EXPECTED_SHARES[self.dtype]
        return TensorSizes(
            name=tensor.name,
            num_elements=tensor.numel,
            resident_bytes=tensor.numel * self.dtype.itemsize,
            device_bytes=size,
            buffer_bytes=size,
            bus_bytes=expected,
            host_bytes=size * MAX_SHARES[self.dtype],
            decoded_bytes=size,
            decode_traffic=(expected + size) / DECODE_RATE_SHARE,
        )

    def pack(self, values: torch.Tensor) -> tuple[Packing, torch.Tensor]:
        if not can_encode(values):
            return PlainPacking(tuple(values.shape), values.dtype), values.view(-1).view(torch.uint8)
        if values.is_cuda:
            from hsrpc.model.kernels.lossless import encode_weights  # loads Triton

            return encode_weights(values)
        return encode(values)

    def compile(self, device: torch.device) -> None:
        values = torch.arange(WORD, device=device).to(self.dtype).view(1, WORD)  # six exponents: a second level
        coding, data = self.pack(values)
        coding.decoding([Encoded(coding, data, values)])()


def can_encode(values: torch.Tensor) -> bool:
    """Whether `values` is a matrix that fills words; other tensors of a model are small."""
    return values.dim() > 1 and values.numel() % WORD == 0


def exponent_shift(dtype: torch.dtype) -> int:
    """Bits behind the exponent of a value that is turned."""
    return 8 + _MANTISSA_BITS[dtype]


def choose(values: torch.Tensor, counts: torch.Tensor) -> Coding:
    """The most frequent exponents get the codes; `counts` [256] says how often each occurs."""
    found, order = (part.tolist() for part in counts.sort(descending=True, stable=True))
    left = [sum(found[level * _ESCAPE :]) for level in range(LEVELS + 1)]
    return Coding(tuple(values.shape), values.dtype, tuple(order[: LEVELS * _ESCAPE]), tuple(left))


def encode(values: torch.Tensor) -> tuple[Coding, torch.Tensor]:
    """The coding of a float16 or bfloat16 tensor in host memory, which fills words, and its bytes (uint8)."""
    chunks, shift = values.reshape(-1).view(torch.int16).split(_CHUNK), exponent_shift(values.dtype)
    occurring = [(turn(chunk) >> shift).bincount(minlength=256) for chunk in chunks]
    coding = choose(values, torch.stack(occurring).sum(0))
    data = torch.zeros(coding.num_bytes, dtype=torch.uint8)
    parts, ranks = coding.views(data), coding.ranks
    levels: list[list[torch.Tensor]] = [[] for _ in range(LEVELS)]
    escapes, per_block = [], []
    for number, chunk in enumerate(chunks):
        turned, first = turn(chunk), number * _CHUNK
        exponents = turned >> shift
        rank = ranks[exponents]
        for level, codes in enumerate(levels):
            codes.append((rank[rank >= level * _ESCAPE] - level * _ESCAPE).clamp(max=_ESCAPE))
        escapes.append(exponents[rank >= LEVELS * _ESCAPE])
        per_block.append(_in_rows(rank, BLOCK)[:, :, None].ge(_LEVEL_ENDS).sum(1))
        parts.low[first : first + len(chunk)] = turned & 0xFF
        _write_planes(parts.planes[first // WORD :], turned >> 8)
    for start, codes in zip(coding.level_words, levels, strict=False):
        packed = _packed(torch.cat(codes))
        parts.codes[start : start + len(packed)] = packed
    parts.escapes.copy_(torch.cat(escapes))
    parts.offsets.copy_(coding.offsets(torch.cat(per_block)))
    return coding, data


def decode(data: torch.Tensor, coding: Coding, target: torch.Tensor) -> None:
    """Write the values that were coded to `target`, the same to the bit. All is in host memory."""
    parts = coding.views(data)
    exponents = torch.zeros(coding.num_values, dtype=torch.int32)
    left = torch.arange(coding.num_values)
    for level, word in enumerate(coding.level_words[:LEVELS]):
        table = torch.tensor([*coding.exponents[level * _ESCAPE :][:_ESCAPE], 0], dtype=torch.int32)
        codes = _unpacked(parts.codes[word:], len(left))
        exponents[left] = table[codes]
        left = left[codes == _ESCAPE]
    exponents[left] = parts.escapes.int()
    mantissa = torch.zeros_like(exponents)
    for bit in range(coding.mantissa_bits):
        plane = parts.planes[:, bit, None] >> torch.arange(WORD) & 1
        mantissa |= plane.view(-1).int() << bit
    turned = (exponents << coding.mantissa_bits | mantissa) << 8 | parts.low
    target.view(-1).view(torch.int16).copy_(turned >> 1 | (turned & 1) << 15)


def _decode_each(tensors: Sequence[Encoded[Coding]], moves: torch.Tensor | None) -> None:
    for coding, data, operand, _ in moved(tensors, moves):
        decode(data, coding, operand)


_LEVEL_ENDS = torch.arange(1, LEVELS + 1, dtype=torch.int32) * _ESCAPE
"""Ranks from which on a value has codes of the next level, or an escape."""


def turn(values: torch.Tensor) -> torch.Tensor:
    """16 bits each (int16), turned left by one: numbers below 2**16 (int32), of which the last bit is the sign."""
    bits = values.int() & 0xFFFF
    return (bits << 1 | bits >> 15) & 0xFFFF


def _write_planes(planes: torch.Tensor, high: torch.Tensor) -> None:
    """Bit j of 32 numbers is word j of theirs."""
    if planes.shape[1]:
        numbers, bits = high.view(-1, WORD).long(), torch.arange(WORD)
        for bit in range(planes.shape[1]):
            planes[: len(numbers), bit] = ((numbers >> bit & 1) << bits).sum(1).int()


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two bits each: int32 words."""
    shifts = 2 * torch.arange(CODES_IN_WORD)
    parts = [(_in_rows(part, CODES_IN_WORD).long() << shifts).sum(1).int() for part in codes.split(_CHUNK)]
    return torch.cat(parts)


def _unpacked(words: torch.Tensor, count: int) -> torch.Tensor:
    shifts = 2 * torch.arange(CODES_IN_WORD)
    return (words[: -(-count // CODES_IN_WORD), None] >> shifts & 3).view(-1)[:count]


def _in_rows(values: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of `size` values each, zeros behind the last."""
    return functional.pad(values, (0, -len(values) % size)).view(-1, size)
