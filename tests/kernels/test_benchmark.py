"""What benchmarks/decode_kernel.py measures on a GPU: the same cases, smaller, and its reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_kernel import case, reference
from hsrpc.model.kernels.decode_attention import decode_attention


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_its_reference_agrees_with_the_kernel(share: float) -> None:
    """Whatever share of the rows is in place, with several query heads to a KV head."""
    given = case((4, 2, 16), (3, 80), share, torch.float32, "cpu")
    wanted = reference(given)
    decode_attention(**given)
    assert (given["out"] - wanted).norm() < 1e-5 * wanted.norm()
