"""Pieces that families share: projections, norms and the declarations of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from hsrpc.model.family import Weights
from hsrpc.model.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class Affine:
    """A projection or a norm of a family, by the names of its packed tensors."""

    weight: str
    bias: str

    @classmethod
    def named(cls, name: str) -> Affine:
        """Tensors `{name}_weight` and `{name}_bias`."""
        return cls(f"{name}_weight", f"{name}_bias")


def project(w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
    """x [n, in] times the weight [out, in], plus the bias where there is one."""
    return functional.linear(x, w[of.weight], w.get(of.bias))


def project_relu(w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
    """`project`, and what is negative set to 0; with a bias that is one kernel on CUDA, where it saves a pass."""
    weight, bias = w[of.weight], w.get(of.bias)
    if bias is None:
        return functional.linear(x, weight).relu_()
    return torch._addmm_activation(bias, x, weight.t())


def project_rows(w: Weights, of: Affine, x: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """As `project`, with the weight's rows from `start` on, into `out` [n, out]."""
    weight, bias = w[of.weight][start:].t(), w.get(of.bias)
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias[start:], x, weight, out=out)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [n, f] of [gate|up] [n, 2*f]."""
    if gate_up.is_cuda:
        from hsrpc.model.kernels import fused as fused_kernels  # loads Triton

        return fused_kernels.gate(gate_up)
    left, right = gate_up.chunk(2, dim=-1)
    return functional.silu(left) * right


def layer_norm(w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
    """Layer norm over the last dimension, with epsilon 1e-5, affine where the tensors are there."""
    return functional.layer_norm(x, x.shape[-1:], w.get(of.weight), w.get(of.bias))


def rms_norm(w: Weights, of: Affine, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm over the last dimension, computed in float32 and scaled."""
    return functional.rms_norm(x, x.shape[-1:], w[of.weight], epsilon)


def linear_tensors(
    of: Affine, sources: tuple[str, ...], rows: tuple[int, ...], columns: int, *, bias: bool
) -> list[TensorSpec]:
    """Weight [sum(rows), columns], and bias [sum(rows)], of projections fused along their outputs."""
    total = sum(rows)
    weight = TensorSpec(of.weight, (total, columns), tuple(f"{s}.weight" for s in sources), rows)
    if not bias:
        return [weight]
    return [weight, TensorSpec(of.bias, (total,), tuple(f"{s}.bias" for s in sources), rows)]


def norm_tensors(of: Affine, source: str, size: int, *, weight: bool = True, bias: bool = False) -> list[TensorSpec]:
    """Weight and bias [size] of a norm, those it has."""
    parts = [(of.weight, "weight", weight), (of.bias, "bias", bias)]
    return [TensorSpec(name, (size,), (f"{source}.{part}",)) for name, part, present in parts if present]
