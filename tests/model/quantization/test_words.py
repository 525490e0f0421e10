"""Codes and zero points of AWQ, GPTQ and compressed-tensors, held against the formats' own packages."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.model.quantization.words import awq_codes, awq_zeros, compressed_zeros, gptq_codes, gptq_zeros

_SIZES = st.integers(1, 5)


def numbers(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(1 << bits, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


def octets(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Row by row, as they are to come out."""
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of each row in words, the lowest first."""
    places = torch.arange(0, 32, bits)
    return (fields.unflatten(-1, (-1, 32 // bits)).long() << places).sum(-1).to(torch.int32)


@settings(max_examples=30, deadline=None)
@given(rows=_SIZES, columns=_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, rows: int, columns: int) -> None:
    """Columns share words, and rows those of zero points."""
    codes, out = numbers(bits, 3 * rows, 8 * columns), torch.zeros(3 * rows, bits * columns, dtype=torch.uint8)
    gptq_codes(words(codes, bits).t(), out)
    assert torch.equal(out, octets(codes, bits))
    zeros = numbers(bits, 8 * rows, columns)
    stored = words(zeros.t(), bits)
    assert torch.equal(gptq_zeros(stored, bits, 8 * rows - 1, less_one=False), zeros[:-1])
    stored = words((zeros.t() - 1) & ((1 << bits) - 1), bits)
    assert torch.equal(gptq_zeros(stored, bits, 8 * rows, less_one=True), zeros)


@settings(max_examples=30, deadline=None)
@given(rows=_SIZES, columns=_SIZES)
def test_awq(rows: int, columns: int) -> None:
    """Eight rows share words, in an order of their own, which another reader of the format undoes."""
    stored = torch.randint(-(1 << 31), 1 << 31, (8 * columns, rows), dtype=torch.int32)
    out = torch.zeros(8 * rows, 4 * columns, dtype=torch.uint8)
    awq_codes(stored, out)
    unpacked = AutoAWQConverter.reverse_awq_order(*AutoAWQConverter.unpack_awq(stored, stored, 4), 4)
    codes, zeros = ((each & 15).to(torch.uint8).t() for each in unpacked)
    assert torch.equal(out, octets(codes, 4))
    assert torch.equal(awq_zeros(stored), zeros)


@settings(max_examples=30, deadline=None)
@given(rows=_SIZES, columns=_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed(bits: int, rows: int, columns: int) -> None:
    """Codes lie row by row as they come; zero points share words along the rows."""
    values = numbers(bits, rows, columns).to(torch.int16)
    signed = (values - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(compressed_zeros(pack_to_int32(signed, bits, packed_dim=0), bits, rows), values.to(torch.uint8))
    row = -(-columns * bits // 8)
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, columns % 2))
    assert torch.equal(pack_to_int32(signed, bits).view(torch.uint8)[:, :row], octets(padded, bits)[:, :row])
