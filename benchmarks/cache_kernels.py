"""What caches in 8 bits cost a GPU: rows coded, K and V rebuilt by products of codes and of numbers, chunks' attention.

python benchmarks/cache_kernels.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from hsrpc.model.activations import CodedActivations, KvProjection, RoundedActivations
from hsrpc.model.attention import Attention, HeadShape, PackedRows
from hsrpc.model.family import Weights
from hsrpc.model.formats.rows import CodedRows, Codes, Rows, RowShape, ValueRows
from hsrpc.model.layers import Affine, project_rows

QKV = Affine.named("qkv")
ROWS, PROMPT, CONTEXT = 4096, 1024, 1024
"""Tokens rebuilt; of a chunk, and cached before it."""
BLOCK_SIZE = 16


class Shape(NamedTuple):
    """A model's attention."""

    name: str
    heads: HeadShape
    hidden_size: int
    dtype: torch.dtype


SHAPES = (
    Shape("opt-13b", HeadShape(40, 40, 128, 128), 5120, torch.float16),
    Shape("llama-2-13b", HeadShape(40, 40, 128, 128), 5120, torch.bfloat16),
    Shape("llama-3-8b", HeadShape(32, 8, 128, 128), 4096, torch.bfloat16),
)


def seconds(work: Callable[[], object]) -> float:
    """Median of 20 calls, after three."""
    times: list[float] = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[3:])


def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, dtype=dtype, device="cuda")


def coding(shape: Shape, codes: Codes) -> None:
    """K and V of some tokens, from a GEMM's output to rows of a buffer."""
    rows = CodedRows(shape.heads.row_shape, shape.dtype, codes)
    values = random(ROWS, shape.heads.row_size, dtype=shape.dtype)
    target = torch.empty((ROWS, rows.columns), dtype=torch.uint8, device="cuda")
    numbers = torch.randperm(ROWS, device="cuda")
    spent = seconds(lambda: rows.put(target, numbers, values))
    moved = values.nbytes + target.nbytes
    print(
        f"{shape.name}: {ROWS} rows of K and V to {codes.value}: {spent * 1e6:.0f} us, {moved / spent / 1e9:.0f} GB/s"
    )


def rebuilding(shape: Shape) -> None:
    """One GEMM with [W_K W_V]: of numbers, of codes that are decoded first, and of codes."""
    heads, size = shape.heads, shape.hidden_size
    rows = CodedRows(RowShape(1, (size,)), shape.dtype, Codes.FP8)
    projection, x = KvProjection(QKV, heads.query_size), random(ROWS, size, dtype=shape.dtype)
    w: Weights = {QKV.weight: random(heads.query_size + heads.row_size, size, dtype=shape.dtype) / size**0.5}
    out = torch.empty((ROWS, heads.row_size), dtype=shape.dtype, device="cuda")
    flop = 2 * ROWS * size * heads.row_size
    coded = CodedActivations(rows, projection, heads.row_size)
    coded.compile(out.device)
    memory = torch.empty(coded.coded_weight_bytes, dtype=torch.uint8, device="cuda")
    w, (code,) = coded.prepared(w, memory)
    code()
    stored = rows.encode(x)
    cases = {
        "numbers": lambda: project_rows(w, QKV, x, slice(heads.query_size, None), out),
        "codes, decoded": lambda: RoundedActivations(rows, projection).keys_values(w, stored, out),
        "codes" if coded._multiplies else "codes, which this GPU decodes": lambda: coded.keys_values(w, stored, out),
    }
    for name, work in cases.items():
        spent = seconds(work)
        print(f"{shape.name}: {ROWS} tokens rebuilt of {name}: {spent * 1e6:.0f} us, {flop / spent / 1e12:.0f} TFLOP/s")
    print(f"{shape.name}: the weight coded: {seconds(code) * 1e6:.0f} us")


def prompts(shape: Shape, codes: Codes | None) -> None:
    """Attention of a chunk to itself and what is cached."""
    heads, keys = shape.heads, PROMPT + CONTEXT
    of_numbers = ValueRows(heads.row_shape, shape.dtype)
    rows: Rows = of_numbers if codes is None else CodedRows(heads.row_shape, shape.dtype, codes)
    device = torch.device("cuda")
    attention = Attention(heads, heads.key_dim**-0.5, BLOCK_SIZE, device, shape.dtype, rows=rows)
    queries = random(PROMPT, heads.query_size, dtype=shape.dtype)
    kv = rows.encode(random(keys, heads.row_size, dtype=shape.dtype))
    new, seen = (torch.tensor([0, count], dtype=torch.int32, device=device) for count in (PROMPT, keys))
    packed = PackedRows(new, seen, (0, PROMPT), (0, keys), PROMPT, keys)
    spent = seconds(lambda: attention.packed(queries, kv, packed, None))
    flop = 2 * (heads.query_size + heads.out_size) * PROMPT * (CONTEXT + PROMPT / 2)
    kind = "numbers" if codes is None else codes.value
    print(f"{shape.name}: a chunk attends to {kind}: {spent * 1e6:.0f} us, {flop / spent / 1e12:.0f} TFLOP/s")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with torch.inference_mode():
        for shape in SHAPES:
            for codes in Codes:
                coding(shape, codes)
            rebuilding(shape)
            for each in (None, *Codes):
                prompts(shape, each)


if __name__ == "__main__":
    main()
