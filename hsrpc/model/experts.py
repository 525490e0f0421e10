"""Mixtures of experts: an MLP of many, of which a router chooses a few for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch.nn import functional

from hsrpc.model.family import Routes, Weights
from hsrpc.model.layers import Affine, Gate, linear_tensors, project
from hsrpc.model.tensor import Neighbours, Stacked, TensorSpec

ROUTER = Affine.named("router")
CORRECTION = "router_correction"
SHARED_IN = Affine.named("shared_in")
SHARED_OUT = Affine.named("shared_out")
SHARED_GATE = Affine.named("shared_gate")
IN_TABLE, OUT_TABLE = "expert_in_table", "expert_out_table"
"""Addresses of all experts' weights on the device: int64 [E]."""
IN_BIAS, OUT_BIAS = "experts_in_bias", "experts_out_bias"
_LEAST_SUM = 1e-20
"""Keeps a sum of scores from being 0."""


def expert_in(expert: int) -> str:
    """Name of an expert's weight [2*f, h]: gate, then up."""
    return f"expert_{expert}_in"


def expert_out(expert: int) -> str:
    """Name of an expert's weight [h, f]."""
    return f"expert_{expert}_out"


class Scoring(Enum):
    """What of the router's logits says how much an expert counts."""

    SOFTMAX = "softmax"
    """The softmax of all."""
    CHOSEN_SOFTMAX = "chosen"
    """The softmax of those that are chosen."""
    SIGMOID = "sigmoid"
    """The sigmoid of each."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of neighbouring experts: those of the best groups alone are chosen from."""

    count: int
    chosen: int
    """Groups that are chosen from."""
    summed: int
    """A group's score is the sum of this many of its experts' scores, the best ones."""


class PlacedExperts(NamedTuple):
    """Where the weights of a layer's experts lie on a GPU, of width f and for hidden states of size h."""

    ins: torch.Tensor
    """int64 [E]: addresses of [gate|up] [2*f, h], multiples of 16 bytes."""
    outs: torch.Tensor
    """int64 [E]: addresses of [h, f], multiples of 16 bytes."""
    in_bias: torch.Tensor | None
    """[E, 2*f]"""
    out_bias: torch.Tensor | None
    """[E, h]"""
    width: int
    """f"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a router chooses."""

    scoring: Scoring = Scoring.SOFTMAX
    groups: Groups | None = None
    renormalised: bool = False
    """The weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    bias: bool = False
    """The router's logits have a bias."""
    corrected: bool = False
    """A bias is added to the scores where experts are chosen, and not where they are weighted."""
    in_float32: bool = False
    """The logits are computed in float32, whatever the type of the weights."""

    def of(self, w: Weights, x: torch.Tensor, k: int) -> Routes:
        """The `k` experts of each row of x [n, h]."""
        logits = self._logits(w, x)
        if logits.is_cuda and self.groups is None:
            from hsrpc.model.kernels import experts as kernels  # loads Triton

            return kernels.route(logits, w[CORRECTION] if self.corrected else None, self, k)
        if self.scoring is Scoring.CHOSEN_SOFTMAX:
            best, chosen = logits.topk(k, dim=-1)
            return Routes(best.softmax(-1, torch.float32), chosen)
        scores = logits.float().sigmoid() if self.scoring is Scoring.SIGMOID else logits.softmax(-1, torch.float32)
        ranks = self._ranks(scores + w[CORRECTION] if self.corrected else scores)
        best, chosen = ranks.topk(k, dim=-1)
        weights = scores.gather(1, chosen) if self.corrected else best
        if self.renormalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
        return Routes(weights if self.scale == 1.0 else weights * self.scale, chosen)

    def _logits(self, w: Weights, x: torch.Tensor) -> torch.Tensor:
        if self.in_float32:
            return functional.linear(x.float(), w[ROUTER.weight].float())
        return project(w, ROUTER, x)

    def _ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """By what experts are chosen [n, E]: their scores, where their group is one of the best."""
        if self.groups is None:
            return scores
        grouped = scores.unflatten(1, (self.groups.count, -1))
        of_groups = grouped.topk(self.groups.summed, dim=-1).values.sum(-1)
        best = of_groups.topk(self.groups.chosen, dim=-1).indices
        hidden = torch.ones_like(of_groups, dtype=torch.bool).scatter_(1, best, False)
        ranks: torch.Tensor = grouped.masked_fill(hidden[:, :, None], float("-inf"))
        return ranks.flatten(1)


@dataclass(frozen=True, slots=True)
class Shared:
    """An expert that all tokens take, with the names of its tensors in the checkpoint."""

    width: int
    inputs: tuple[str, ...]
    """Gate and up; one name: both are one tensor."""
    output: str
    gate: str | None = None
    """The weight [1, h] by the sigmoid of whose product it is multiplied; None: there is none."""

    @classmethod
    def gated_mlp(cls, name: str, width: int) -> Shared:
        """One whose tensors are called as those of a dense MLP of that `name`."""
        return cls(width, (f"{name}.gate_proj", f"{name}.up_proj"), f"{name}.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of tensors in the checkpoint; those of a layer follow after its number."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    """Each has `{experts}.{e}.gate_proj`, `up_proj` and `down_proj`; or all, stacked, `gate_up_proj`, `down_proj`."""
    transposed: bool = False
    """The stacked weights are [E, h, 2*f] and [E, f, h], and rows of gate and up are neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts that a layer has for an MLP, with E experts of width f and `k` of them for a token."""

    count: int
    k: int
    width: int
    gate: Gate
    routing: Routing = Routing()
    shared: Shared | None = None
    bias: bool = False
    """Both products of an expert have a bias."""
    names: ExpertNames = ExpertNames()

    @property
    def inner_size(self) -> int:
        """Width of what a token has between the products, of all experts that it takes."""
        return self.k * self.width + (self.shared.width if self.shared else 0)

    def tensors(self, prefix: str, size: int) -> Iterator[TensorSpec]:
        """Those of the layer whose tensors are called `prefix` and more, for hidden states of `size`."""
        router = f"{prefix}.{self.names.router}"
        yield from linear_tensors(ROUTER, (router,), (self.count,), size, bias=self.routing.bias)
        if self.routing.corrected:
            yield TensorSpec(CORRECTION, (self.count,), (f"{router}.e_score_correction_bias",), exact=True)
        yield from self._shared_tensors(prefix, size)
        experts = f"{prefix}.{self.names.experts}"
        yield from self._bias_tensors(experts, size)
        for expert in range(self.count):
            yield from self._expert_tensors(experts, expert, size)

    def _shared_tensors(self, prefix: str, size: int) -> Iterator[TensorSpec]:
        if self.shared is None:
            return
        width, output = self.shared.width, f"{prefix}.{self.shared.output}"
        inputs = tuple(f"{prefix}.{name}" for name in self.shared.inputs)
        yield from linear_tensors(SHARED_IN, inputs, (width, width), size, bias=False)
        yield from linear_tensors(SHARED_OUT, (output,), (size,), width, bias=False)
        if self.shared.gate is not None:
            yield from linear_tensors(SHARED_GATE, (f"{prefix}.{self.shared.gate}",), (1,), size, bias=False)

    def _bias_tensors(self, experts: str, size: int) -> Iterator[TensorSpec]:
        """Biases of all experts together: they are small."""
        if self.bias:
            order = Neighbours(self.width, self.count) if self.names.transposed else None
            yield TensorSpec(IN_BIAS, (self.count, 2 * self.width), (f"{experts}.gate_up_proj_bias",), order=order)
            yield TensorSpec(OUT_BIAS, (self.count, size), (f"{experts}.down_proj_bias",))

    def _expert_tensors(self, experts: str, expert: int, size: int) -> Iterator[TensorSpec]:
        own, transposed = f"{experts}.{expert}", self.names.transposed
        order = Neighbours(self.width) if transposed else None
        yield TensorSpec(
            expert_in(expert),
            (2 * self.width, size),
            (f"{own}.gate_proj.weight", f"{own}.up_proj.weight"),
            stacked=Stacked(f"{experts}.gate_up_proj", expert, self.count, transposed, order),
        )
        yield TensorSpec(
            expert_out(expert),
            (size, self.width),
            (f"{own}.down_proj.weight",),
            stacked=Stacked(f"{experts}.down_proj", expert, self.count, transposed),
        )

    @property
    def expert_names(self) -> tuple[tuple[str, ...], ...]:
        """Names of each expert's tensors."""
        return tuple((expert_in(expert), expert_out(expert)) for expert in range(self.count))

    def tables(self, w: Weights) -> dict[str, torch.Tensor]:
        """Tables of the addresses at which the experts' weights in `w` lie, on their device."""
        device = w[expert_in(0)].device

        def addresses(name: Callable[[int], str]) -> torch.Tensor:
            return torch.tensor([w[name(expert)].data_ptr() for expert in range(self.count)], device=device)

        return {IN_TABLE: addresses(expert_in), OUT_TABLE: addresses(expert_out)}

    def opened(self, w: Weights) -> Weights:
        """What the MLP is computed with: `w`, and the tables where it lies on a GPU. The first time kernels compile.

        `w` may have tables, of experts that come on demand, in place of their weights.
        """
        if not w[ROUTER.weight].is_cuda:
            return w
        from hsrpc.model.kernels import experts as kernels  # loads Triton

        with_tables = w if IN_TABLE in w else {**w, **self.tables(w)}
        row = w[ROUTER.weight].new_zeros((1, w[ROUTER.weight].shape[1]))
        kernels.compile_products(row, self._placed(with_tables), self.k, self.gate.gating)
        return with_tables

    def routes(self, w: Weights, x: torch.Tensor) -> Routes:
        """The experts of each row of x [n, h]."""
        return self.routing.of(w, x, self.k)

    def of(self, w: Weights, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Output [n, h] of the MLP for x [n, h]; `w` is `opened`, and has the experts that are chosen."""
        routed = self.on_gpu(w, x, routes) if x.is_cuda else self.one_by_one(w, x, routes)
        return routed if self.shared is None else routed + self._shared(w, x, self.shared)

    def on_gpu(self, w: Weights, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        """The sum of each token's experts [n, h], weighted: all experts at once, found by the tables."""
        from hsrpc.model.kernels import experts as kernels  # loads Triton

        return kernels.expert_mlps(x, routes.weights, routes.chosen, self._placed(w), self.gate.gating)

    def _placed(self, w: Weights) -> PlacedExperts:
        return PlacedExperts(w[IN_TABLE], w[OUT_TABLE], w.get(IN_BIAS), w.get(OUT_BIAS), self.width)

    def one_by_one(self, w: Weights, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        """The sum of each token's experts [n, h], weighted: one expert after the other."""
        out = torch.zeros_like(x)
        for expert in routes.chosen.unique().tolist():
            rows, place = (routes.chosen == expert).nonzero(as_tuple=True)
            inner = functional.linear(x[rows], w[expert_in(expert)], self._bias(w, IN_BIAS, expert))
            added = functional.linear(self.gate.gated(inner), w[expert_out(expert)], self._bias(w, OUT_BIAS, expert))
            out.index_add_(0, rows, (added * routes.weights[rows, place, None]).to(x.dtype))
        return out

    def _bias(self, w: Weights, name: str, expert: int) -> torch.Tensor | None:
        return w[name][expert] if self.bias else None

    def _shared(self, w: Weights, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        added = project(w, SHARED_OUT, self.gate.gated(project(w, SHARED_IN, x)))
        return added if shared.gate is None else added * project(w, SHARED_GATE, x).sigmoid()
