"""Activations in 8 bits: the product of codes that GPUs compute, as the CPU's torch computes it."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.activations import CodedActivations, KvProjection
from hsrpc.model.formats.rows import CodedRows, Codes, RowShape
from hsrpc.model.layers import Affine

QKV = Affine.named("qkv")
WIDTH, QUERIES, CHANNELS = 96, 32, 48


def make(dtype: torch.dtype) -> CodedActivations:
    rows = CodedRows(RowShape(1, (WIDTH,)), dtype, Codes.FP8)
    return CodedActivations(rows, KvProjection(QKV, QUERIES), CHANNELS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_codes_are_those_of_what_they_mean(dtype: torch.dtype, bias: bool) -> None:
    """Rows that lie apart, output between others, and a bias of K and V alone."""
    activations, x = make(dtype), torch.randn(7, WIDTH).to(dtype)
    w = {QKV.weight: torch.randn(QUERIES + CHANNELS, WIDTH).to(dtype)}
    w |= {QKV.bias: torch.randn(QUERIES + CHANNELS).to(dtype)} if bias else {}
    memory = torch.empty(activations.coded_weight_bytes, dtype=torch.uint8)
    w, (code,) = activations.prepared(w, memory)
    code()
    rows, decoded = activations.project(w, x)
    multiplied = torch.zeros_like(decoded)
    activations._multiply(w, rows, multiplied[:, QUERIES:])
    torch.testing.assert_close(multiplied[:, QUERIES:], decoded[:, QUERIES:], rtol=0.02, atol=0.15)
    assert not multiplied[:, :QUERIES].any()
    exact = torch.nn.functional.linear(x.float(), w[QKV.weight].float(), w[QKV.bias].float() if bias else None)
    torch.testing.assert_close(decoded[:, :QUERIES].float(), exact[:, :QUERIES], rtol=0.02, atol=0.1)
    error = (decoded.float() - exact)[:, QUERIES:].norm() / exact[:, QUERIES:].norm()
    assert 0.005 < error < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_device_is_asked_whether_it_multiplies_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is believed if its product is right; one that is wrong, or is refused, is not used."""
    activations, cpu = make(dtype), torch.device("cpu")
    assert activations._is_right(cpu)
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, out, **named: product(*args, **named) * 1.1)
    assert not activations._is_right(cpu)
