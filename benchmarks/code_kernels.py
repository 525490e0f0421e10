"""How fast the kernel decodes weights of quantised formats on a GPU, a layer at once, beside its memory bandwidth.

    python benchmarks/code_kernels.py
    python benchmarks/code_kernels.py --shape gpt-oss-120b --format mxfp4 --tiles 128,4 --tiles 256,8 --json rates.json

The same bits as torch's, on the same device. Rates are of the bytes that are read and written; a plain copy of a
gigabyte, read and written, is the bandwidth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.expert_kernels import milliseconds
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.codes import Code, CodedMatrix
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking, decode_each
from hsrpc.model.kernels.scaled import Tiles, decoding
from hsrpc.model.random_codes import RANDOM_FORMATS, RandomFormat
from hsrpc.model.spec import named_spec

SHAPES = ("llama-3.3-70b", "gpt-oss-120b")


def _w4(**settings: Any) -> RandomFormat:
    def matrix(rows: int, columns: int) -> CodedMatrix:
        usual = CodedMatrix(rows=rows, columns=columns, code=Code.UINT4, block=(1, 128), scale=torch.float16)
        return replace(usual, **settings)

    return RandomFormat("w4", matrix)


FORMATS = {
    **RANDOM_FORMATS,
    "fp8-rows": RandomFormat(
        "fp8",
        lambda rows, columns: CodedMatrix(
            rows=rows, columns=columns, code=Code.E4M3, block=(1, columns), scale=torch.bfloat16
        ),
    ),
    "w4-zeros": _w4(zero=None),
    "w4-order": _w4(zero=None, has_groups=True),
    "w4-odd": _w4(zero=None, block=(1, 96)),
}
"""Those of random weights, others of fp8 and of 4 bits, columns in any order, and groups that are no power of two."""


def layer(shape: str, form: RandomFormat, dtype: torch.dtype, device: str) -> Iterator[Encoded[ScaledPacking]]:
    """The quantised tensors of the last layer, of random codes."""
    family, source = create_family(named_spec(shape, dtype)), RandomWeights(0)
    formats = form.formats(family)
    for tensor in family.layer_tensors(family.num_layers - 1):
        if tensor in formats:
            packing = formats[tensor].packing(tensor)
            data = torch.zeros(packing.num_bytes, dtype=torch.uint8, device=device)
            packing.fill(source, tensor, data)
            for parts in packing.parts(data):
                if parts.zeros is not None:
                    parts.zeros.random_(0, 16)
                if parts.groups is not None:
                    groups = torch.randperm(parts.matrix.columns) % parts.matrix.grid[1]
                    parts.groups.copy_(groups)
            yield Encoded(packing, data, torch.empty(tensor.shape, dtype=dtype, device=device))


def check(tensors: Sequence[Encoded[ScaledPacking]]) -> None:
    """Hold what was decoded to torch's, bit for bit."""
    for each in tensors:
        wanted = torch.empty_like(each.operand)
        decode_each([each._replace(operand=wanted)])
        assert torch.equal(each.operand.view(torch.int16), wanted.view(torch.int16)), f"{each.packing}: other bits"


def copy_rate(device: str) -> float:
    """Bytes/s that are read and written."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--format", action="append", choices=tuple(FORMATS), help="default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--tiles", action="append", help="threads,units; several are compared (default: as served)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures here")
    options = parser.parse_args(arguments)
    tiles: list[Tiles | None] = [Tiles(*map(int, each.split(","))) for each in options.tiles or ()]
    bandwidth, found = copy_rate("cuda"), []
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    for shape in options.shape or SHAPES:
        for name in options.format or FORMATS:
            tensors = list(layer(shape, FORMATS[name], getattr(torch, options.dtype), "cuda"))
            size = sum(len(each.data) + each.operand.nbytes for each in tensors)
            for each in tiles or [None]:
                decode = decoding(tensors, tiles=each)
                time = milliseconds(decode)
                check(tensors)
                rate = size / time * 1e3
                found.append({"shape": shape, "format": name, "tiles": each, "milliseconds": time, "rate": rate})
                found[-1]["share"] = rate / bandwidth
                print(
                    f"{shape} {name} {each or ''}: {len(tensors)} tensors, {time:.3f} ms, {rate / 1e9:.0f} GB/s, "
                    f"{rate / bandwidth:.2f} of a copy",
                    flush=True,
                )
            del tensors
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"copy": bandwidth, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
