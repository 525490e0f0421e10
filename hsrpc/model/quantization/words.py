"""From the words in which AWQ, GPTQ and compressed-tensors have codes of 4 and 8 bits, to codes row by row.

A word is an int32 with 32 // bits codes in it. They come out as bytes, where column 2i of 4 bits is in the low half of
byte i. Zero points come out as uint8 [rows, groups].
"""

from __future__ import annotations

import torch

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight rows that AWQ has in a word is in each field of four bits, the lowest first."""
_SWAPS = ((4, 0x0F0F0F0F, 1), (8, 0x00FF00FF, 2), (16, 0x0000FFFF, 4))
"""By which eight words of eight fields are transposed: bits of a field, low fields of each pair, words apart."""


def gptq_codes(words: torch.Tensor, out: torch.Tensor) -> None:
    """Codes of GPTQ, int32 [n, rows], whose word has neighbours along the columns, to bytes: uint8 [rows, 4 n]."""
    out.view(torch.int32).copy_(words.t())


def awq_codes(words: torch.Tensor, out: torch.Tensor) -> None:
    """Codes of AWQ's gemm version, int32 [8 n, rows // 8], whose word has neighbours along the rows, to bytes.

    Those are uint8 [rows, 4 n].
    """
    fields = words.view(-1, 8, words.shape[1]).clone()
    for bits, low, apart in _SWAPS:
        pairs = fields.view(len(fields), -1, 2, apart, words.shape[1])
        _swap(pairs[:, :, 0], pairs[:, :, 1], bits, low)
    rows = out.view(torch.int32).unflatten(0, (-1, 8))  # [rows // 8, 8, n]
    for field, row in enumerate(_AWQ_ORDER):
        rows[:, row].copy_(fields[:, field].t())


def gptq_zeros(words: torch.Tensor, bits: int, rows: int, *, less_one: bool) -> torch.Tensor:
    """Zero points of GPTQ, int32 [groups, words]: in its first version each is stored `less_one`."""
    stored = _fields(words, bits)[:, :rows]
    return _transposed((stored + 1) & ((1 << bits) - 1) if less_one else stored)


def awq_zeros(words: torch.Tensor) -> torch.Tensor:
    """Zero points of AWQ's gemm version: int32 [groups, rows // 8]"""
    fields = _fields(words, 4).view(len(words), -1, 8)
    found = torch.empty_like(fields)
    found[:, :, list(_AWQ_ORDER)] = fields
    return _transposed(found.view(len(words), -1))


def compressed_zeros(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points of compressed-tensors, int32 [words, groups]; they and its codes are stored as unsigned numbers."""
    return _transposed(_fields(_transposed(words), bits)[:, :rows])


def _swap(first: torch.Tensor, second: torch.Tensor, bits: int, low: int) -> None:
    """Exchange the high fields of the first words with the low ones of the second, in place."""
    differing = first >> bits
    differing ^= second
    differing &= low
    second ^= differing
    differing <<= bits
    first ^= differing


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers in the words of each row, the lowest bits first: uint8."""
    octets = words.flatten().view(torch.uint8).view(len(words), -1)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.t().contiguous()
