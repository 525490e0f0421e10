"""fp8 weights decoded and multiplied in bfloat16, beside products of codes with codes: a layer's time and error.

    python -m benchmarks.fp8_products --shape llama-3.3-70b --shape qwen3-32b --json fp8.json

For products of codes the inputs are rounded to fp8 as well, a scale for each row (of weights with a scale for each row)
or for 128 columns of a row (of weights with blocks of 128 x 128). Times are of all products of a layer, the rounding of
inputs by torch's operations apart from them; errors are relative, beside exact inputs and the weights that the codes
mean, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.code_kernels import FORMATS, layer
from benchmarks.expert_kernels import milliseconds
from benchmarks.record import header, write_json
from hsrpc.model.formats.codes import CodedParts
from hsrpc.model.kernels.scaled import decoding

PROGRAM = "python -m benchmarks.fp8_products"
ROWS = (16, 64, 256, 1024, 4096)
WEIGHTS = ("fp8", "fp8-rows")
"""Blocks of 128 x 128, and a scale for each row."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Coded(NamedTuple):
    """A matrix of codes and the weights that they mean, bfloat16 [rows, columns]."""

    parts: CodedParts
    weight: torch.Tensor


class Rounded(NamedTuple):
    """Inputs in fp8 with their scales, float32, the rows next to each other in memory."""

    codes: torch.Tensor
    scales: torch.Tensor


def matrices(shape: str, weights: str) -> tuple[list[Coded], Callable[[], None]]:
    """Those of a shape's last layer, and what decodes them."""
    tensors = list(layer(shape, FORMATS[weights], torch.bfloat16, "cuda"))
    decode = decoding(tensors)
    decode()
    found: list[Coded] = []
    for each in tensors:
        sizes = [source.rows for source in each.packing.sources]
        parts = each.packing.parts(each.data)
        found += [Coded(*pair) for pair in zip(parts, each.operand.split(sizes), strict=True)]
    return found, decode


def round_inputs(x: torch.Tensor, width: int) -> Rounded:
    """x [n, columns] with a scale for `width` columns of a row."""
    groups = x.float().unflatten(1, (-1, width))
    scales = groups.abs().amax(dim=2) / _LARGEST
    codes = (groups / scales.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1)
    return Rounded(codes, scales.t().contiguous().t())


def multiply(x: Rounded, parts: CodedParts) -> torch.Tensor:
    """The product of codes with codes, bfloat16 [n, rows]."""
    return torch._scaled_mm(
        x.codes,
        parts.codes.view(torch.float8_e4m3fn).t(),
        scale_a=x.scales,
        scale_b=parts.scales.float().t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=parts.matrix.block[0] == 1,  # cuBLAS sums products of blocks in float32 anyway
    )


def measure(shape: str, weights: str) -> Iterator[dict[str, Any]]:
    """A line for each number of rows."""
    coded, decode = matrices(shape, weights)
    decoding_time = milliseconds(decode)
    widths = {each.parts.matrix.columns: each.parts.matrix.block[1] for each in coded}
    for rows in ROWS:
        yield {"model": shape, "weights": weights, "rows": rows, "decode": decoding_time} | _line(coded, widths, rows)


def _line(coded: Sequence[Coded], widths: Mapping[int, int], rows: int) -> dict[str, float]:
    """Seconds and errors of products with so many rows; `widths`: columns that share a scale, by the columns in all."""
    inputs = {size: torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in widths}
    rounded = {size: round_inputs(x, widths[size]) for size, x in inputs.items()}

    def exactly() -> list[torch.Tensor]:
        return [functional.linear(inputs[each.weight.shape[1]], each.weight) for each in coded]

    def by_codes() -> list[torch.Tensor]:
        return [multiply(rounded[each.weight.shape[1]], each.parts) for each in coded]

    def rounding() -> list[Rounded]:
        return [round_inputs(x, widths[size]) for size, x in inputs.items()]

    wanted = [functional.linear(inputs[each.weight.shape[1]].float(), each.weight.float()) for each in coded]
    return {
        "products": milliseconds(exactly),
        "products_error": _error(exactly(), wanted),
        "codes": milliseconds(by_codes),
        "codes_error": _error(by_codes(), wanted),
        "rounding": milliseconds(rounding),
    }


def _error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest relative error of a product."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="products of fp8 weights, on a GPU")
    parser.add_argument("--shape", action="append", required=True, help="well-known shape; may be repeated")
    parser.add_argument("--weights", action="append", choices=WEIGHTS, help="default: both")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--commit", help="of a copy of the sources without their history")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; run it on a machine with one")
    torch.set_float32_matmul_precision("highest")
    found: list[dict[str, Any]] = []
    about = header([*PROGRAM.split(), *words], commit=options.commit)
    for shape in options.shape:
        for weights in options.weights or WEIGHTS:
            for line in measure(shape, weights):
                found.append(line)
                times = " ".join(f"{name} {line[name]:.3f}" for name in ("decode", "products", "codes", "rounding"))
                errors = f"{line['products_error']:.1e} and {line['codes_error']:.1e}"
                print(f"{shape} {weights} {line['rows']}: {times} ms, errors {errors}", flush=True)
                write_json(options.json, {"header": about, "result": found})
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
