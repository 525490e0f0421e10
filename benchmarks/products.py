"""A layer's products over rows: reading weights, computing, and what is between, where both take equally long.

    python -m benchmarks.products --shape qwen3-8b --shape opt-1.3b --json products.json

Times are of CUDA graphs of several layers, lower quartiles. Rates are those of the fewest rows and of the most; a line
has the time beside that of reading and that of computing, and the exponent `p` of time**p = read**p + compute**p.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.record import header, write_json
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import named_spec

PROGRAM = "python -m benchmarks.products"
ROWS = (8, 32, 64, 96, 128, 160, 192, 219, 256, 320, 438, 512, 1024, 2048, 8192)
_LAYERS = 6
"""Layers of random weights: so many that none stays in the device's caches."""
_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Products:
    """The seconds of a layer's products, over rows."""

    weight_bytes: int
    seconds: dict[int, float]

    @property
    def lines(self) -> list[dict[str, float | None]]:
        """For each number of rows: seconds, those of reading and computing at their best rates, and the exponent."""
        read, rate = self.seconds[ROWS[0]], min(seconds / rows for rows, seconds in self.seconds.items())
        return [
            {"rows": rows, "seconds": seconds, "read": read, "compute": rows * rate, "exponent": None}
            | ({"exponent": exponent(read, rows * rate, seconds)} if rows * rate > read / 3 else {})
            for rows, seconds in self.seconds.items()
        ]


def exponent(one: float, other: float, together: float) -> float | None:
    """The p of together**p = one**p + other**p, by bisection; None: it is no longer than the longer of both."""
    if together <= max(one, other) * 1.001 or together >= one + other:
        return None
    low, high = 1.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        found = (one**middle + other**middle) ** (1 / middle)
        low, high = (middle, high) if found > together else (low, middle)
    return low


def measure(shape: str) -> Products:
    """Time the products of a shape's first layer."""
    spec = named_spec(shape, torch.bfloat16)
    matrices = [tensor.shape for tensor in create_family(spec).layer_tensors(0) if len(tensor.shape) == 2]
    layers = [[torch.randn(*each, device="cuda", dtype=spec.dtype) for each in matrices] for _ in range(_LAYERS)]
    seconds = {}
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size, device="cuda", dtype=spec.dtype) for _, size in matrices}
        seconds[rows] = _seconds(partial(_compute, layers, inputs)) / _LAYERS
    return Products(sum(math.prod(each) for each in matrices) * spec.dtype.itemsize, seconds)


def _compute(layers: Sequence[Sequence[torch.Tensor]], inputs: dict[int, torch.Tensor]) -> None:
    for weights in layers:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)


def _seconds(work: Callable[[], object]) -> float:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[_REPEATS // 4]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="products of a layer over rows, on a GPU")
    parser.add_argument("--shape", action="append", required=True, help="well-known shape; may be repeated")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--commit", help="of a copy of the sources without their history")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; run it on a machine with one")
    found: list[dict[str, Any]] = []
    for shape in options.shape:
        products = measure(shape)
        found.append({"model": shape, "weight_bytes": products.weight_bytes, "rows": products.lines})
        for line in products.lines:
            numbers = [f"{line[name] or math.nan:.4g}" for name in ("rows", "seconds", "read", "compute", "exponent")]
            print(shape, *numbers, flush=True)
    write_json(options.json, {"header": header([*PROGRAM.split(), *words], commit=options.commit), "result": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
