"""A layer's products over rows: reading weights, computing, and what is between, where both take equally long.

    python -m benchmarks.products --shape qwen3-8b --shape opt-1.3b --json products.json
    python -m benchmarks.products --shape qwen3-8b --shape gpt-oss-20b --format w4a16 --format mxfp4 --json fused.json
    python -m benchmarks.products --shape qwen3-8b --format w4a16 --share 1,4,128 --share 1,8,64 --json shares.json

Times are of CUDA graphs of several layers, lower quartiles. Rates are those of the fewest rows and of the most; a line
has the time beside that of reading and that of computing, and the exponent `p` of time**p = read**p + compute**p.

With formats, of the tensors that are quantised in the last layer: products with codes as they lie (`fused`, and the
codes' bytes over that time), decoding and then multiplying (`decoded`), and multiplying alone (`plain`). `--share`
compares what a program takes: rows, channels, threads; else it is as served.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as product_of
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.code_kernels import FORMATS, layer
from benchmarks.record import header, write_json
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking
from hsrpc.model.kernels.products import SHARES, Share, product
from hsrpc.model.kernels.scaled import decoding
from hsrpc.model.random_codes import RandomFormat
from hsrpc.model.spec import named_spec

PROGRAM = "python -m benchmarks.products"
ROWS = (8, 32, 64, 96, 128, 160, 192, 219, 256, 320, 438, 512, 1024, 2048, 8192)
FEW_ROWS = (1, 2, 4, 8, 16, 64)
"""Rows with formats."""
_NEAR = 1e-2
"""Relative error of a product, at most: sums of float32 are added in other orders, and rounded."""
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


def measure_format(shape: str, form: RandomFormat, shares: Sequence[Share]) -> list[dict[str, Any]]:
    """Time the products with the quantised tensors of a shape's last layer, for each number of rows."""
    first = list(layer(shape, form, torch.bfloat16, "cuda"))
    layers = [[each._replace(data=each.data.clone()) for each in first] for _ in range(_LAYERS)]
    packed = sum(len(each.data) for each in first)
    products = [[product(each.packing, each.data, shares) for each in tensors] for tensors in layers]
    decodings = [decoding(tensors) for tensors in layers]
    decodings[0]()
    found = []
    for rows in FEW_ROWS:
        inputs = {size: torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in _columns(first)}
        given = [inputs[each.packing.shape[1]] for each in first]
        for x, each, multiply in zip(given, first, products[0], strict=True):
            wanted = functional.linear(x, each.operand)
            assert (multiply(x, None) - wanted).norm() < _NEAR * wanted.norm(), f"{shape}, {form.name}, {rows} rows"

        def fused(given: Sequence[torch.Tensor] = given) -> None:
            for each in products:
                for x, multiply in zip(given, each, strict=True):
                    multiply(x, None)

        def plain(given: Sequence[torch.Tensor] = given) -> None:
            for tensors in layers:
                for x, each in zip(given, tensors, strict=True):
                    functional.linear(x, each.operand)

        def decoded(given: Sequence[torch.Tensor] = given) -> None:
            for decode, tensors in zip(decodings, layers, strict=True):
                decode()
                for x, each in zip(given, tensors, strict=True):
                    functional.linear(x, each.operand)

        seconds = {work.__name__: _seconds(work) / _LAYERS for work in (fused, decoded, plain)}
        found.append({"rows": rows, **seconds, "bytes_per_second": packed / seconds["fused"]})
    return found


def _columns(tensors: Sequence[Encoded[ScaledPacking]]) -> set[int]:
    return {each.packing.shape[1] for each in tensors}


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
    parser.add_argument("--format", action="append", choices=tuple(FORMATS), help="of codes; may be repeated")
    parser.add_argument("--share", action="append", help="rows,channels,threads; several are compared")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; run it on a machine with one")
    found = list(_fused(options) if options.format else _products(options.shape))
    write_json(options.json, {"header": header([*PROGRAM.split(), *words], commit=options.commit), "result": found})
    return 0


def _products(shapes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        products = measure(shape)
        yield {"model": shape, "weight_bytes": products.weight_bytes, "rows": products.lines}
        for line in products.lines:
            numbers = [f"{line[name] or math.nan:.4g}" for name in ("rows", "seconds", "read", "compute", "exponent")]
            print(shape, *numbers, flush=True)


def _fused(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    given = [(Share(*map(int, each.split(","))),) for each in options.share or ()]
    choices: Sequence[Sequence[Share]] = given or [SHARES]
    for form, shape, shares in product_of(options.format, options.shape, choices):
        lines = measure_format(shape, FORMATS[form], shares)
        yield {"model": shape, "format": form, "shares": shares, "rows": lines}
        for line in lines:
            times = ", ".join(f"{name} {line[name] * 1e6:.1f} us" for name in ("fused", "decoded", "plain"))
            rate = f"{line['bytes_per_second'] / 1e9:.0f} GB/s"
            print(shape, form, *(shares if options.share else ()), f"{line['rows']} rows: {times}, {rate}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
