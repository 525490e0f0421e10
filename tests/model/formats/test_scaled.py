"""Weights of float8 codes with scales: every code, blocks at the edges, tensors of several sources."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.formats import scaled
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import CODES, Scaled, ScaledPacking, ScaledSource
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import align

SHAPE = (9, 40)
SOURCES = (
    ScaledSource(4, 40, (3, 16), "", (2, 3)),
    ScaledSource(3, 40, (1, 40), "", (3,)),
    ScaledSource(2, 40, (2, 40), "", ()),
)


def value(code: int) -> float:
    """What an e4m3 code means, by its definition."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def packed(dtype: torch.dtype) -> tuple[Encoded[ScaledPacking], torch.Tensor]:
    """All codes, with scales in blocks, of rows and of a whole matrix; and the values that they mean."""
    packing = ScaledPacking(SHAPE, dtype, SOURCES)
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    codes = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) * 7 % 256
    packing.codes(data).view(torch.uint8).copy_(codes)
    wanted = torch.tensor([[value(code) for code in row] for row in codes.tolist()])
    first = 0
    for source, scales in zip(SOURCES, packing.scales(data), strict=True):
        scales.copy_(torch.rand(scales.shape) + 0.01)
        for row in range(source.rows):
            for column in range(source.columns):
                wanted[first + row, column] *= scales[row // source.block[0], column // source.block[1]]
        first += source.rows
    return Encoded(packing, data, torch.empty(SHAPE, dtype=dtype)), wanted.to(dtype)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_mean_what_they_are_defined_to(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each times its block's scale, however many rows are decoded at once."""
    monkeypatch.setattr(scaled, "_DECODED_AT_ONCE", at_once)
    encoded, wanted = packed(dtype)
    encoded.packing.decoding([encoded])()
    torch.testing.assert_close(encoded.operand, wanted, rtol=0, atol=0, equal_nan=True)


def test_sizes_are_those_of_codes_and_scales() -> None:
    """On the bus and on the host; decoded ones where they stay."""
    tensor, form = TensorSpec("w", SHAPE, ("a", "b", "c"), (4, 3, 2)), Scaled(torch.bfloat16, SOURCES)
    packing, sizes = form.packing(tensor), form.sizes(tensor)
    assert packing.num_bytes == 368 + 4 * (6 + 3 + 1)
    assert sizes.bus_bytes == sizes.host_bytes == sizes.buffer_bytes == align(packing.num_bytes)
    assert sizes.resident_bytes == packing.decoded_bytes == 2 * 9 * 40
    assert sizes.device_bytes == sizes.decoded_bytes == align(720)
    assert sizes.decode_traffic > sizes.bus_bytes + sizes.decoded_bytes


def test_contents_are_what_the_checkpoint_has() -> None:
    """Codes of all sources at once, then the scales of each in its own shape."""
    tensor = TensorSpec("w", SHAPE, ("a", "b", "c"), (4, 3, 2))
    packing = ScaledPacking(SHAPE, torch.float32, SOURCES)
    contents = list(packing.contents(tensor, torch.zeros(packing.num_bytes, dtype=torch.uint8)))
    assert contents[0][0] == tensor
    assert [(out.dtype, tuple(out.shape)) for _, out in contents] == [
        (CODES, SHAPE),
        *((torch.float32, source.scales_shape) for source in SOURCES),
    ]
