"""Quantised weights whose rows get another order: the same values, in that order, by codes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.model.formats.codes import Code, CodedMatrix, decode
from hsrpc.model.quantization.reader import Quantized, Stored

NOWHERE = Stored(None, "", ())  # type: ignore[arg-type]


@st.composite
def orders(draw: st.DrawFn) -> tuple[CodedMatrix, torch.Tensor]:
    """A matrix, and an order of its rows: any, of heads, or within heads."""
    heads, head = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 6, 8]))
    rows, columns = heads * head, draw(st.sampled_from([1, 5, 16]))
    code = draw(st.sampled_from([Code.E2M1, Code.UINT8]))
    block = draw(st.integers(1, rows + 2)), draw(st.integers(1, columns))
    zero = draw(st.sampled_from([None, 3]))
    matrix = CodedMatrix(rows=rows, columns=columns, code=code, block=block, scale=torch.float16, zero=zero)
    kind = draw(st.sampled_from(["any", "heads", "within"]))
    if kind == "any":
        return matrix, torch.tensor(draw(st.permutations(range(rows))))
    index = torch.arange(rows).view(heads, head)
    if kind == "heads":
        return matrix, index[draw(st.permutations(range(heads)))].flatten()
    return matrix, index[:, draw(st.permutations(range(head)))].flatten()


def quantized(matrix: CodedMatrix) -> Quantized:
    """A weight of random codes, scales and zero points."""
    parts = matrix.parts(torch.zeros(matrix.num_bytes, dtype=torch.uint8))
    codes = torch.randint(0, 256, parts.codes.shape, dtype=torch.uint8)
    scales, zeros = torch.rand(matrix.grid).half(), torch.randint(0, 17, matrix.grid, dtype=torch.uint8)
    return Quantized(
        matrix,
        NOWHERE,
        codes=lambda out: out.copy_(codes),
        scales=lambda out: out.copy_(scales),
        zeros=None if matrix.zero is not None else lambda out: out.copy_(zeros),
    )


def values(weight: Quantized) -> torch.Tensor:
    matrix, out = weight.matrix, torch.empty(weight.matrix.shape)
    parts = matrix.parts(torch.zeros(matrix.num_bytes, dtype=torch.uint8))
    weight.fill(parts)
    decode(parts, out)
    return out


@given(orders())
def test_rows_are_those_of_the_order(drawn: tuple[CodedMatrix, torch.Tensor]) -> None:
    """With no more scales than rows have, and as many as before where no block is cut."""
    matrix, order = drawn
    weight = quantized(matrix)
    ordered = weight.in_order(order)
    assert torch.equal(values(ordered), values(weight)[order])
    assert ordered.matrix.grid[0] <= matrix.rows
    if torch.equal(order, torch.arange(matrix.rows)):
        assert ordered.matrix.grid == matrix.grid
