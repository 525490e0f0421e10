"""The kernel that decodes codes with scales, held against the host's decoder."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.formats.codes import Code, CodedMatrix, Factor
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking, decode_each
from hsrpc.model.kernels import scaled

E8M0, E4M3, HALF = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float16
TENSORS: dict[str, tuple[CodedMatrix, ...]] = {
    "fp8": (
        CodedMatrix(rows=150, columns=272, code=Code.E4M3, block=(128, 128)),
        CodedMatrix(rows=20, columns=272, code=Code.E4M3, block=(128, 128)),
    ),
    "fp8-rows": (
        CodedMatrix(rows=3, columns=40, code=Code.E4M3, block=(1, 40), scale=torch.bfloat16),
        CodedMatrix(rows=2, columns=40, code=Code.E4M3, block=(2, 40)),
    ),
    "fp8-odd": (CodedMatrix(rows=33, columns=259, code=Code.E4M3, block=(24, 50)),),
    "mxfp4": (CodedMatrix(rows=70, columns=288, code=Code.E2M1, block=(1, 32), scale=E8M0),),
    "nvfp4": (
        CodedMatrix(rows=5, columns=48, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.MULTIPLIES),
        CodedMatrix(rows=5, columns=48, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.DIVIDES),
    ),
    "w4": (CodedMatrix(rows=9, columns=256, code=Code.UINT4, block=(1, 128), scale=HALF, zero=8),),
    "w4-zeros": (CodedMatrix(rows=9, columns=100, code=Code.UINT4, block=(1, 32), scale=HALF, zero=None),),
    "w4-odd": (CodedMatrix(rows=9, columns=61, code=Code.UINT4, block=(1, 12), scale=HALF, zero=None),),
    "w4-groups": (
        CodedMatrix(rows=9, columns=64, code=Code.UINT4, block=(1, 16), scale=HALF, zero=None, has_groups=True),
    ),
    "w8": (CodedMatrix(rows=9, columns=64, code=Code.UINT8, block=(1, 32), scale=torch.bfloat16, zero=128),),
}
"""Rows beyond a program's, several matrices in one tensor, columns that fill no unit."""


def packed(kind: str, dtype: torch.dtype, *, exact: bool) -> Encoded[ScaledPacking]:
    """All codes; with scales that are powers of two where products are to be `exact`."""
    sources = TENSORS[kind]
    shape = (sum(source.rows for source in sources), sources[0].columns)
    packing = ScaledPacking(shape, dtype, sources)
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for parts in packing.parts(data):
        matrix = parts.matrix
        parts.codes.copy_(torch.arange(parts.codes.numel()).view(parts.codes.shape) * 7 % 256)
        if matrix.scale is E8M0:
            exponents = torch.randint(117, 139, parts.scales.shape, dtype=torch.uint8)
            if dtype is torch.float32:
                exponents.view(-1)[:4] = torch.tensor([0, 1, 252, 255])  # the least two, one of the largest, NaN
            parts.scales.view(torch.uint8).copy_(exponents)
        else:
            powers = 2.0 ** torch.randint(-6, 3, parts.scales.shape)
            parts.scales.copy_(powers if exact else torch.rand(parts.scales.shape) + 0.01)
        if parts.zeros is not None:
            parts.zeros.random_(0, 17)
        if parts.groups is not None:
            parts.groups.copy_(torch.randperm(matrix.columns) % matrix.grid[1])
        if parts.factor is not None:
            parts.factor.fill_(0.25 if exact else 0.37)
    return Encoded(packing, data, torch.full(shape, 3.0, dtype=dtype))


@pytest.mark.parametrize("kinds", [*((kind,) for kind in TENSORS), ("fp8", "w4", "fp8-rows", "fp8-odd", "mxfp4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode(dtype: torch.dtype, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, NaN where there is one, also for several tensors at once.

    The interpreter truncates to bfloat16, so that products must be exact there.
    """
    monkeypatch.setattr(scaled, "_GROUP", 2)
    encoded = [packed(kind, dtype, exact=dtype is torch.bfloat16) for kind in kinds]
    scaled.decoding(encoded)()
    for each in encoded:
        wanted = torch.full_like(each.operand, 5.0)
        decode_each([each._replace(operand=wanted)])
        torch.testing.assert_close(each.operand, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(each.operand.signbit() & (each.operand == 0), wanted.signbit() & (wanted == 0))


@pytest.mark.parametrize("kind", ["fp8-rows", "nvfp4", "w4-zeros", "w4-groups"])
def test_tensors_are_decoded_from_where_they_were_moved_to(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it lay in the first row; those that are left out are not touched."""
    monkeypatch.setattr(scaled, "_GROUP", 2)
    each = [packed(kind, torch.float32, exact=False) for _ in range(3)]
    rows = torch.stack([one.data for one in each])
    operands = [torch.full_like(one.operand, 3.0) for one in each]
    numbered = [
        Encoded(one.packing, rows[0], operand, number)
        for number, (one, operand) in enumerate(zip(each, operands, strict=True))
    ]
    moves = torch.tensor([2 * rows.shape[1], -1, 0])
    decode = scaled.decoding(numbered, moves)
    for last in (0, rows.shape[1]):
        moves[2] = last
        decode()
    for operand, row in zip(operands[::2], (2, 1), strict=True):
        wanted = each[row].operand.clone()
        decode_each([each[row]._replace(operand=wanted)])
        torch.testing.assert_close(operand, wanted, rtol=0, atol=0, equal_nan=True)
    assert (operands[1] == 3.0).all()


@pytest.mark.parametrize(("kind", "launches"), [("fp8", 1), ("fp8-rows", 2), ("nvfp4", 2)])
def test_matrices_that_lie_alike_are_decoded_in_one_launch(
    kind: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for the matrices of all tensors."""
    launched: list[int] = []
    monkeypatch.setattr(scaled.ScaledDecoder, "run", lambda decoder: launched.append(len(decoder.matrices)))
    scaled.decoding([packed(kind, torch.float16, exact=True) for _ in range(3)])()
    assert launched == [3 * len(TENSORS[kind]) // launches] * launches


def test_weights_of_two_types_are_not_decoded_together() -> None:
    """They have kernels of their own."""
    types = (torch.float16, torch.bfloat16)
    with pytest.raises(ValueError, match="unpack"):
        scaled.decoding([packed("fp8", dtype, exact=True) for dtype in types])
