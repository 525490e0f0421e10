"""The kernels of mixtures of experts on a GPU: their error, their time and rates, beside torch's grouped_mm.

    python benchmarks/expert_kernels.py
    python benchmarks/expert_kernels.py --shape qwen3-30b-a3b --tokens 64 --tiles 16,32,128,4,4 --tiles 32,64,64,4,4

Rows are sorted and gathered for grouped_mm before it is timed; its gate and weights are not timed either.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch.nn import functional

from hsrpc.model.experts import PlacedExperts
from hsrpc.model.kernels.experts import Products, Tiles, choose_tiles, expert_mlps, sort_choices
from hsrpc.model.layers import Activation, ClampedGate, Gate

TOKENS = (1, 64, 256, 1024, 8192)
CALLS = 10


class Mixture(NamedTuple):
    """A layer of a model."""

    num_experts: int
    k: int
    size: int
    width: int
    gate: Gate = Activation.SILU
    bias: bool = False


SHAPES = {
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "mixtral-8x7b": Mixture(8, 2, 4096, 14336),
    "gpt-oss-120b": Mixture(128, 4, 2880, 2880, ClampedGate(7.0, 1.702), bias=True),
}


@dataclass(frozen=True)
class Case:
    """Random weights, rows and choices."""

    of: Mixture
    ins: torch.Tensor
    """[E, 2*f, h]"""
    outs: torch.Tensor
    """[E, h, f]"""
    placed: PlacedExperts
    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor

    @classmethod
    def make(cls, of: Mixture, tokens: int, dtype: torch.dtype, device: str = "cuda") -> Case:
        """Each token's experts are drawn at random, all as likely."""

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device).mul_(shape[-1] ** -0.5)

        ins, outs = random(of.num_experts, 2 * of.width, of.size), random(of.num_experts, of.size, of.width)
        placed = PlacedExperts(
            ins=torch.tensor([each.data_ptr() for each in ins], device=device),
            outs=torch.tensor([each.data_ptr() for each in outs], device=device),
            in_bias=random(of.num_experts, 2 * of.width) if of.bias else None,
            out_bias=random(of.num_experts, of.size) if of.bias else None,
            width=of.width,
        )
        scores = torch.rand(tokens, of.num_experts, device=device)
        weights, chosen = scores.topk(of.k)
        return cls(of, ins, outs, placed, random(tokens, of.size), weights.contiguous(), chosen.contiguous())

    def run(self) -> torch.Tensor:
        """All of it: sorting, both products, the sum."""
        return expert_mlps(self.x, self.weights, self.chosen, self.placed, self.of.gate.gating)

    def reference(self) -> torch.Tensor:
        """The same in float32, expert by expert."""
        out = torch.zeros_like(self.x, dtype=torch.float32)
        in_bias, out_bias = self.placed.in_bias, self.placed.out_bias
        for expert in self.chosen.unique().tolist():
            rows, place = (self.chosen == expert).nonzero(as_tuple=True)
            inner = functional.linear(self.x[rows], self.ins[expert], None if in_bias is None else in_bias[expert])
            bias = None if out_bias is None else out_bias[expert]
            added = functional.linear(self.of.gate.gated(inner), self.outs[expert], bias)
            out.index_add_(0, rows, added * self.weights[rows, place, None])
        return out

    def products(self, tiles: Tiles) -> tuple[Callable[[], object], Callable[[], object]]:
        """Both products, each to be called by itself."""
        products = Products(sort_choices(self.chosen, self.of.num_experts), self.placed, self.of.k, tiles)
        inner = products.gated(self.x, self.of.gate.gating)
        return (
            partial(products.gated, self.x, self.of.gate.gating),
            partial(products.weighted, inner, self.weights, self.of.size),
        )

    def grouped(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """The same products by torch."""
        given = sort_choices(self.chosen, self.of.num_experts)
        ends = given.counts.cumsum(0).int()
        rows = self.x[given.rows.long() // self.of.k]
        inner = rows.new_zeros((len(rows), self.of.width))
        return (
            partial(functional.grouped_mm, rows, self.ins.transpose(1, 2), offs=ends),
            partial(functional.grouped_mm, inner, self.outs.transpose(1, 2), offs=ends),
        )


def milliseconds(work: Callable[[], object]) -> float:
    """Median of 20, of a call in a graph of ten: launched one by one, short kernels would wait for the host."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    times: list[float] = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return median(times[3:])


def report(name: str, case: Case, tiles: Tiles) -> str:
    """A line: times of both products by these tiles and by torch, and the rates of ours."""
    of, touched = case.of, len(case.chosen.unique())
    ours = [milliseconds(each) for each in case.products(tiles)]
    torchs = [milliseconds(each) for each in case.grouped()] if hasattr(functional, "grouped_mm") else []
    flop = [2 * case.chosen.numel() * of.size * width for width in (2 * of.width, of.width)]
    read = [touched * each[0].nbytes for each in (case.ins, case.outs)]
    rates = [f"{f / t / 1e9:.0f} TFLOP/s {b / t / 1e6:.0f} GB/s" for f, b, t in zip(flop, read, ours, strict=True)]
    parts = [f"{label} {t * 1e3:.0f} us ({rate})" for label, t, rate in zip(("in", "out"), ours, rates, strict=True)]
    beside = " + ".join(f"{t * 1e3:.0f}" for t in torchs) or "none"
    return f"{name} {len(case.x)} tokens {tuple(tiles)}: {', '.join(parts)}; grouped_mm {beside} us"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES))
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--tiles", action="append", help="rows,columns,inner,warps,stages; several are compared")
    options = parser.parse_args(arguments)
    given = [Tiles(*map(int, each.split(","))) for each in options.tiles or ()]
    for name in options.shape or SHAPES:
        for tokens in options.tokens or TOKENS:
            case = Case.make(SHAPES[name], tokens, torch.bfloat16)
            wanted = case.reference()
            error = ((case.run().float() - wanted).norm() / wanted.norm()).item()
            assert error < 1e-2, f"{name} {tokens}: error {error:.1e}"
            for tiles in given or [choose_tiles(case.chosen.numel(), case.of.num_experts)]:
                print(report(name, case, tiles), flush=True)
            total = milliseconds(case.run) * 1e3
            print(f"{name} {tokens} tokens: {total:.0f} us in all, error {error:.1e}", flush=True)
            del case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
