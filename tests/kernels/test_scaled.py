"""The kernel that decodes weights with scales, held against the host's decoder."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking, ScaledSource, decode_each
from hsrpc.model.kernels import scaled
from hsrpc.model.kernels.scaled import ScaledDecoder

SOURCES = [
    (ScaledSource(150, 272, (128, 128), "", (2, 3)), ScaledSource(20, 272, (128, 128), "", (1, 3))),
    (ScaledSource(3, 40, (1, 40), "", (3,)), ScaledSource(2, 40, (2, 40), "", ())),
    (ScaledSource(33, 259, (33, 259), "", ()),),
]
"""Tiles that reach over edges, several matrices in one tensor; columns that are no multiple of 16."""


def packed(sources: tuple[ScaledSource, ...], dtype: torch.dtype, *, exact: bool) -> Encoded[ScaledPacking]:
    """All codes; with scales that are powers of two where products are to be `exact`."""
    shape = (sum(source.rows for source in sources), sources[0].columns)
    packing = ScaledPacking(shape, dtype, sources)
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    numbers = torch.arange(shape[0] * shape[1]).view(shape)
    packing.codes(data).view(torch.uint8).copy_(numbers * 7 % 256)
    for scales in packing.scales(data):
        scales.copy_(2.0 ** torch.randint(-9, 3, scales.shape) if exact else torch.rand(scales.shape) + 0.01)
    return Encoded(packing, data, torch.full(shape, 3.0, dtype=dtype))


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode(dtype: torch.dtype, kept: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, NaN where there is one, in one launch for several tensors, aligned and not.

    The interpreter truncates to bfloat16, so that products must be exact there.
    """
    monkeypatch.setattr(scaled, "_GROUP", 2)
    exact = dtype is torch.bfloat16
    encoded = [packed(sources, dtype, exact=exact) for sources in SOURCES[kept]]
    decoder = ScaledDecoder.of(encoded)
    assert decoder.aligned == (16 if len(encoded) == 1 else 1)
    decoder.run()
    for each in encoded:
        wanted = torch.full_like(each.operand, 5.0)
        decode_each([each._replace(operand=wanted)])
        torch.testing.assert_close(each.operand, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(each.operand.signbit() & (each.operand == 0), wanted.signbit() & (wanted == 0))


def test_weights_of_two_types_are_not_decoded_together() -> None:
    """They have kernels of their own."""
    types = (torch.float16, torch.bfloat16)
    with pytest.raises(ValueError, match="unpack"):
        ScaledDecoder.of([packed(SOURCES[1], dtype, exact=True) for dtype in types])
