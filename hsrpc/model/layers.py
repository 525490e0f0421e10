"""Pieces that families share: projections, norms and the declarations of their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch.nn import functional

from hsrpc.model.tensor import RowOrder, TensorSpec

if TYPE_CHECKING:
    from hsrpc.model.family import Weights


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


def project_rows(w: Weights, of: Affine, x: torch.Tensor, rows: slice, out: torch.Tensor) -> None:
    """As `project`, with these rows of the weight, into `out` [n, rows]."""
    weight, bias = w[of.weight][rows].t(), w.get(of.bias)
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias[rows], x, weight, out=out)


class Gating(NamedTuple):
    """A gate as the kernels are told of it."""

    name: str
    limit: float = 0.0
    alpha: float = 0.0


class Activation(Enum):
    """A function between the products of an MLP."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The function of each element of x [n, f]."""
        match self:
            case Activation.SILU:
                return functional.silu(x)
            case Activation.GELU:
                return functional.gelu(x)
            case Activation.GELU_TANH:
                return functional.gelu(x, approximate="tanh")
            case Activation.RELU:
                return functional.relu(x)
            case Activation.RELU2:
                return functional.relu(x).square_()

    @property
    def gating(self) -> Gating:
        return Gating(self.value)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The function of gate, times up: [n, f] of [gate|up] [n, 2*f]."""
        if gate_up.is_cuda:
            from hsrpc.model.kernels import fused  # loads Triton

            return fused.gate(gate_up, self.gating)
        left, right = gate_up.chunk(2, dim=-1)
        return self.of(left) * right


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """A gate like SiLU, of values that are bounded (gpt-oss)."""

    limit: float
    """Most of gate, and of the magnitude of up."""
    alpha: float
    """Factor in the sigmoid."""

    @property
    def gating(self) -> Gating:
        return Gating("clamped", self.limit, self.alpha)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate * sigmoid(alpha * gate) * (up + 1): [n, f] of [gate|up] [n, 2*f]."""
        if gate_up.is_cuda:
            from hsrpc.model.kernels import fused  # loads Triton

            return fused.gate(gate_up, self.gating)
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


Gate: TypeAlias = Activation | ClampedGate
"""What a gated MLP makes of its first product: `gated` [n, f] of [gate|up] [n, 2*f]."""

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}
"""Names in config.json; several are one function, written differently."""


class NormKind(Enum):
    """How a norm scales."""

    RMS = "rms"
    RMS_FROM_ONE = "rms from one"
    """By 1 + weight, in float32 (Gemma)."""
    LAYER = "layer"
    """The mean is subtracted first."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last dimension."""

    kind: NormKind
    epsilon: float
    bias: bool = False

    def tensors(self, of: Affine, source: str, size: int) -> list[TensorSpec]:
        """Its weight, and bias, [size]."""
        bias = [TensorSpec(of.bias, (size,), (f"{source}.bias",))] if self.bias else []
        return [self.tensor(of, source, (size,)), *bias]

    def tensor(self, of: Affine, source: str, shape: tuple[int, ...], order: RowOrder | None = None) -> TensorSpec:
        """Its weight alone."""
        return TensorSpec(of.weight, shape, (f"{source}.weight",), order=order, mean=1.0 - self.offset)

    @property
    def offset(self) -> float:
        """Added to the weight."""
        return 1.0 if self.kind is NormKind.RMS_FROM_ONE else 0.0

    def of(self, w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] normed; the weight is [n], or [heads, n] for x [..., heads, n]."""
        weight, size = w[of.weight], x.shape[-1:]
        match self.kind:
            case NormKind.RMS:
                return functional.rms_norm(x, size, weight, self.epsilon)
            case NormKind.RMS_FROM_ONE:
                return functional.rms_norm(x.float(), size, 1 + weight.float(), self.epsilon).to(x.dtype)
            case NormKind.LAYER if weight.dim() > 1:
                return (functional.layer_norm(x.float(), size, None, None, self.epsilon) * weight).to(x.dtype)
            case NormKind.LAYER:
                return functional.layer_norm(x, size, weight, w.get(of.bias), self.epsilon)


def layer_norm(w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
    """Layer norm over the last dimension, with epsilon 1e-5, affine where the tensors are there."""
    return functional.layer_norm(x, x.shape[-1:], w.get(of.weight), w.get(of.bias))


def linear_tensors(
    of: Affine,
    sources: tuple[str, ...],
    rows: tuple[int, ...],
    columns: int,
    *,
    bias: bool,
    order: RowOrder | None = None,
) -> list[TensorSpec]:
    """Weight [sum(rows), columns], and bias [sum(rows)], of projections fused along their outputs.

    A single source has all the rows.
    """
    total = sum(rows)
    each = rows if len(sources) > 1 else (total,)
    weight = TensorSpec(of.weight, (total, columns), tuple(f"{s}.weight" for s in sources), each, order)
    if not bias:
        return [weight]
    return [weight, TensorSpec(of.bias, (total,), tuple(f"{s}.bias" for s in sources), each, order)]


def norm_tensors(of: Affine, source: str, size: int, *, weight: bool = True, bias: bool = False) -> list[TensorSpec]:
    """Weight and bias [size] of a norm, those it has."""
    parts = [(of.weight, "weight", 1.0, weight), (of.bias, "bias", 0.0, bias)]
    return [TensorSpec(name, (size,), (f"{source}.{part}",), mean=mean) for name, part, mean, there in parts if there]
