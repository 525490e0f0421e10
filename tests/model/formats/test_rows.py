"""Rows of codes: how far they are from what they mean, by the definition, for any numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.formats.rows import MIN_SCALE, ROW_ALIGNMENT, CodedRows, Codes, RowShape, ValueRows
from tests.engine.rounding import rounded

SHAPES = [RowShape(1, (40,)), RowShape(3, (16, 8)), RowShape(2, (5, 7))]
"""A whole row, heads of two parts, and sizes that are no multiples of anything."""


def parts_of(shape: RowShape, x: torch.Tensor) -> list[torch.Tensor]:
    """The numbers of each part [n, heads, width]."""
    starts = shape.starts
    return [x[:, a:b].unflatten(1, (shape.heads, -1)) for a, b in pairwise(starts)]


def numbers(shape: RowShape, seed: int, spread: float) -> torch.Tensor:
    """Rows [4, width] whose numbers differ by up to 2**spread in size, of any sign, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, shape.width, generator=generator)
    x *= 2.0 ** (spread * (torch.rand(x.shape, generator=generator) - 0.5))
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    return x


@given(
    shape=st.sampled_from(SHAPES),
    codes=st.sampled_from(Codes),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 40),
    size=st.integers(-60, 60),
)
def test_errors_are_within_half_a_step(shape: RowShape, codes: Codes, seed: int, spread: float, size: int) -> None:
    """A float8 code errs by a sixteenth of the number or a step of the least codes, a whole number by half a scale."""
    x = numbers(shape, seed, spread) * 2.0**size
    rows = CodedRows(shape, torch.float32, codes)
    found = rows.decode(rows.encode(x))
    for part, back in zip(parts_of(shape, x), parts_of(shape, found), strict=True):
        largest = part.abs().amax(-1, keepdim=True)
        scale = (largest / codes.largest) * (1 + 2.0**-7)  # rounded up to bfloat16
        bound = scale / 2 if codes is Codes.INT8 else torch.maximum(part.abs() / 16, scale * 2.0**-10)
        assert ((back - part).abs() <= bound * 1.000001 + MIN_SCALE).all()
        assert torch.equal(back.sign() * back.abs().gt(0), part.sign() * back.abs().gt(0))


@given(shape=st.sampled_from(SHAPES), codes=st.sampled_from(Codes), seed=st.integers(0, 2**32 - 1))
def test_codes_are_the_nearest(shape: RowShape, codes: Codes, seed: int) -> None:
    """As a search among all codes finds them, in float64."""
    x = numbers(shape, seed, 6.0)
    rows = CodedRows(shape, torch.float32, codes)
    found = parts_of(shape, rows.decode(rows.encode(x)))
    wanted = [rounded(part, codes.value) for part in parts_of(shape, x)]
    for each, by_definition in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, by_definition, rtol=1e-6, atol=0)


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 20))
def test_what_has_been_float8_stays_as_it_is(shape: RowShape, seed: int, spread: float) -> None:
    """Scales come back: K of latents have a part that is rounded already."""
    rows = CodedRows(shape, torch.float32, Codes.FP8)
    once = rows.decode(rows.encode(numbers(shape, seed, spread)))
    assert torch.equal(rows.decode(rows.encode(once)), once)


@pytest.mark.parametrize("codes", Codes)
@pytest.mark.parametrize("value", [0.0, 1e-42, -3e38, float("inf"), float("nan")])
def test_numbers_at_the_ends(value: float, codes: Codes) -> None:
    """Zeros and the smallest are 0, the largest are kept, and what is no number makes its head none: others stay."""
    shape = RowShape(2, (4, 4))
    rows, x = CodedRows(shape, torch.float32, codes), torch.ones(1, shape.width)
    x[0, 1] = value
    if abs(value) < 1:
        x[0, :4] = value
    found = rows.decode(rows.encode(x))
    if value != value or value == float("inf"):
        assert not found[0, 1].isfinite()
    else:
        torch.testing.assert_close(found[0, 1], torch.tensor(value), rtol=0.01, atol=MIN_SCALE)
    torch.testing.assert_close(found[0, 4:], x[0, 4:], rtol=0.01, atol=0)


@pytest.mark.parametrize("codes", Codes)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_a_byte_a_number_and_two_a_scale(shape: RowShape, codes: Codes) -> None:
    """Up to a multiple of 16; strided values are encoded as they are."""
    rows = CodedRows(shape, torch.float16, codes)
    size = -(-shape.width // 4) * 4 + 2 * shape.num_scales
    assert rows.size.num_bytes == rows.columns == -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT
    values = torch.randn(3, 2 * shape.width).half()[:, shape.width :]
    encoded = rows.encode(values)
    assert encoded.shape == (3, rows.columns)
    codes, scales = rows.parts(encoded)
    for found, wanted in zip((codes, scales), rows.parts(rows.encode(values.contiguous())), strict=True):
        assert torch.equal(
            found.view(torch.uint8), wanted.contiguous().view(torch.uint8).view_as(found.view(torch.uint8))
        )
    assert rows.decode(encoded).dtype is torch.float16
    assert ValueRows(shape, torch.float16).size.num_bytes == 2 * shape.width


@pytest.mark.parametrize("rows", [CodedRows(SHAPES[1], torch.float32, Codes.INT8), ValueRows(SHAPES[1], torch.float32)])
def test_rows_are_written_where_they_belong(rows: CodedRows | ValueRows) -> None:
    """All of the values, or some of them; others stay."""

    def copy(target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor) -> None:
        target[target_rows] = source[source_rows]

    values = torch.randn(3, SHAPES[1].width)
    target = rows.encode(torch.full((6, SHAPES[1].width), 2.0)).clone()
    rows.put(target, torch.tensor([5, 0, 2]), values)
    rows.writer(copy)(target, torch.tensor([3]), values, torch.tensor([1]))
    wanted = torch.full((6, SHAPES[1].width), 2.0)
    wanted[[5, 0, 2, 3]] = values[[0, 1, 2, 1]]
    torch.testing.assert_close(rows.decode(target), wanted, rtol=0, atol=0.02)
