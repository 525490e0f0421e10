"""What benchmarks/decode_kernel.py and expert_kernels.py measure on a GPU: the same cases, smaller."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_kernel import case, reference
from benchmarks.expert_kernels import Case, Mixture
from hsrpc.model.formats.rows import Codes
from hsrpc.model.kernels.decode_attention import decode_attention
from hsrpc.model.kernels.experts import FEW
from hsrpc.model.layers import ClampedGate


@pytest.mark.parametrize(("share", "codes"), [(0.0, None), (0.6, None), (1.0, None), (0.6, Codes.FP8)])
def test_its_reference_agrees_with_the_kernel(share: float, codes: Codes | None) -> None:
    """Whatever share of the rows is in place, with several query heads to a KV head; codes too."""
    given = case((4, 2, 16), (3, 80), share, torch.float32, codes, device="cpu")
    wanted = reference(given, codes)
    decode_attention(**given)
    assert (given["out"] - wanted).norm() < 1e-5 * wanted.norm()


def test_the_references_of_experts_agree_with_the_kernels() -> None:
    """The loop with all of it, and torch's products with each of ours where it has them."""
    torch.manual_seed(0)
    case = Case.make(Mixture(4, 2, 32, 16, ClampedGate(7.0, 1.702), bias=True), 9, torch.float32, "cpu")
    torch.testing.assert_close(case.run(), case.reference(), atol=1e-5, rtol=1e-5)
    plain = Case.make(Mixture(4, 2, 32, 16), 9, torch.float32, "cpu")
    (ours, _), (torchs, _) = plain.products(FEW), plain.grouped()
    torch.testing.assert_close(ours(), plain.of.gate.gated(torchs()), atol=1e-5, rtol=1e-5)
