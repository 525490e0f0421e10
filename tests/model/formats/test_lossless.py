"""Lossless coding of weights: every bit comes back, and normally distributed weights get smaller."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.formats import lossless as coding
from hsrpc.model.formats.lossless import BLOCK, MAX_SHARES, WORD, can_encode, decode, encode

DTYPES = (torch.float16, torch.bfloat16)


def returned(values: torch.Tensor) -> torch.Tensor:
    """Coded and decoded."""
    header, data = encode(values)
    assert len(data) == header.num_bytes
    target = torch.empty_like(values)
    decode(data, header, target)
    return target


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int16).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_there_is(dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormals, infinities and NaN with all their bits, whatever exponents are usual."""
    everything = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    assert bits(returned(everything)) == bits(everything)
    usual = torch.cat((torch.randn(2**17).mul(0.02).to(dtype), everything))[torch.randperm(2**17 + 2**16)]
    assert bits(returned(usual)) == bits(usual)


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from((WORD, 7 * WORD, BLOCK - WORD, BLOCK, BLOCK + WORD, 5 * BLOCK, 5 * BLOCK + 3 * WORD)),
    scale=st.floats(1e-6, 1e3),
    spread=st.integers(0, 30),
    chunk=st.sampled_from((BLOCK, 2 * BLOCK, 64 * BLOCK)),
    seed=st.integers(0, 99),
)
def test_any_distribution(dtype: torch.dtype, count: int, scale: float, spread: int, chunk: int, seed: int) -> None:
    """Whatever the length, the scale and how many exponents are out of the ordinary."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-spread, spread + 1, (count,), generator=generator)
    values = (torch.randn(count, generator=generator) * scale * 2.0**octaves).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "_CHUNK", chunk)
        assert bits(returned(values)) == bits(values)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.858), (torch.bfloat16, 0.67)])
def test_normal_weights_get_smaller(dtype: torch.dtype, most: float) -> None:
    """By as much as the documentation says, in any shape."""
    weights = (torch.randn(512, 1024) * 0.02).to(dtype)
    header, data = encode(weights)
    assert header.shape == (512, 1024)
    assert len(data) <= most * 2 * weights.numel()
    assert torch.equal(returned(weights), weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_distribution_takes_no_more_than_planned(dtype: torch.dtype) -> None:
    """Seven octaves that are equally frequent are what host memory is planned for."""
    weights = ((1 + torch.rand(2**16)) * 2.0 ** torch.randint(-6, 1, (2**16,))).to(dtype)
    _, data = encode(weights)
    assert len(data) <= MAX_SHARES[dtype] * 2 * weights.numel()
    assert torch.equal(returned(weights), weights)


def test_only_matrices_that_fill_words_are_coded() -> None:
    """Biases, norms and odd matrices stay as they are."""
    assert can_encode(torch.empty(3, WORD))
    assert not can_encode(torch.empty(3 * WORD))
    assert not can_encode(torch.empty(3, WORD + 1))
