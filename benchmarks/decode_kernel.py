"""The decode attention kernel on a GPU: its error against float64, and the bytes/s at which it reads K and V.

As they are computed, and as codes of 8 bits with scales.

python benchmarks/decode_kernel.py
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TypedDict

import torch

from hsrpc.model.attention import HeadShape
from hsrpc.model.formats.rows import CodedRows, Codes, Rows, ValueRows
from hsrpc.model.kernels.decode_attention import decode_attention
from hsrpc.model.kernels.rows import Coding, coding_of

BLOCK_SIZE = 16
SHAPES = ((32, 32, 64), (32, 32, 80), (32, 32, 128), (32, 8, 128), (56, 56, 128))
"""Query heads, KV heads, head size."""
LOADS = ((1, 4000), (8, 600), (24, 600), (64, 600), (128, 512))
"""Requests, tokens of each."""
COMPILED = ((1, 20), (1, 4000))
"""Loads in one part and in several: with these compiled, all others are to be ready."""
MAX_SECONDS = 0.05
FORMATS = (
    (torch.float16, None),
    (torch.float32, None),
    (torch.float16, Codes.FP8),
    (torch.bfloat16, Codes.FP8),
    (torch.float16, Codes.INT8),
    (torch.bfloat16, Codes.INT8),
)
"""Type that is computed in, and codes; None: rows are numbers of that type."""
MAX_ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CALLS = 10


class Given(TypedDict):
    """Arguments of the kernel."""

    queries: torch.Tensor
    pool: torch.Tensor
    buffer: torch.Tensor
    out: torch.Tensor
    tables: torch.Tensor
    in_place: torch.Tensor
    rebuilt_starts: torch.Tensor
    key_starts: torch.Tensor
    heads: HeadShape
    block_size: int
    scale: float
    max_keys: int
    coding: Coding


def rows_of(heads: HeadShape, dtype: torch.dtype, codes: Codes | None) -> Rows:
    """Rows of those heads' K and V."""
    return ValueRows(heads.row_shape, dtype) if codes is None else CodedRows(heads.row_shape, dtype, codes)


def case(
    shape: tuple[int, int, int],
    load: tuple[int, int],
    share: float,
    dtype: torch.dtype,
    codes: Codes | None = None,
    *,
    device: str = "cuda",
) -> Given:
    """Random rows; of each request's tokens `share` in place, half of the rest rebuilt; lengths differ a little."""
    (heads, kv_heads, head_dim), (requests, tokens) = shape, load
    width = 2 * kv_heads * head_dim
    lengths = [tokens - 3 * i % 50 for i in range(requests)]
    in_place = [int(length * share) for length in lengths]
    blocks = -(-tokens // BLOCK_SIZE)
    rebuilt = torch.tensor([0] + [(n - m) // 2 for n, m in zip(lengths, in_place, strict=True)])
    buffered = torch.tensor([0] + [n - m - (n - m) // 2 for n, m in zip(lengths, in_place, strict=True)])
    front = int(rebuilt.sum())
    of_heads = HeadShape(heads, kv_heads, head_dim, head_dim)
    rows = rows_of(of_heads, dtype, codes)

    def random(count: int) -> torch.Tensor:
        return rows.encode(torch.randn(count, width, device=device, dtype=dtype))

    return {
        "queries": torch.randn(requests, 2 * heads * head_dim, device=device, dtype=dtype)[:, : heads * head_dim],
        "pool": random(requests * blocks * BLOCK_SIZE),
        "buffer": random(front + int(buffered.sum())),
        "out": torch.full((requests, heads * head_dim), torch.nan, device=device, dtype=dtype),
        "tables": torch.randperm(requests * blocks, device=device).view(requests, blocks).int(),
        "in_place": torch.tensor(in_place, device=device).int(),
        "rebuilt_starts": rebuilt.cumsum(0).int().to(device),
        "key_starts": (front + buffered.cumsum(0)).int().to(device),
        "heads": of_heads,
        "block_size": BLOCK_SIZE,
        "scale": head_dim**-0.5,
        "max_keys": tokens,
        "coding": coding_of(rows, torch.device(device)),
    }


def reference(given: Given, codes: Codes | None = None) -> torch.Tensor:
    """Attention in float64, request by request, to what the rows mean."""
    heads = given["heads"]
    rows_read = rows_of(heads, given["queries"].dtype, codes)
    front, starts, rows = given["rebuilt_starts"].tolist(), given["key_starts"].tolist(), []
    buffer = given["buffer"]
    for i, count in enumerate(given["in_place"].tolist()):
        token = torch.arange(count, device=buffer.device)
        slots = given["tables"][i][token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        parts = (given["pool"][slots], buffer[front[i] : front[i + 1]], buffer[starts[i] : starts[i + 1]])
        q = given["queries"][i].double().view(heads.num_heads, heads.key_dim)
        keys_values = heads.keys_values(rows_read.decode(torch.cat(parts)).double())
        k, v = (p.repeat_interleave(heads.num_heads // heads.num_kv_heads, 1) for p in keys_values)
        weights = (torch.einsum("hd,khd->hk", q, k) * given["scale"]).softmax(-1)
        rows.append(torch.einsum("hk,khd->hd", weights, v).flatten())
    return torch.stack(rows)


def milliseconds(given: Given) -> float:
    """Median of 20, of a call in a graph of ten: launched one by one, short kernels would wait for the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            decode_attention(**given)
    times: list[float] = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return median(times[3:])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for dtype, codes in FORMATS:
        kind = f"{dtype}" if codes is None else f"{codes.value} for {dtype}"
        for shape in SHAPES:
            for load in COMPILED:
                decode_attention(**case(shape, load, 0.6, dtype, codes))
            for load in LOADS:
                given = case(shape, load, 0.6, dtype, codes)
                wanted = reference(given, codes)
                start = time.perf_counter()
                decode_attention(**given)
                spent = time.perf_counter() - start
                assert spent < MAX_SECONDS, f"{shape} {load} {kind}: {spent:.3f} s for the first call, compiled again?"
                error = ((given["out"].double() - wanted).norm() / wanted.norm()).item()
                assert error < MAX_ERRORS[dtype], f"{shape} {load} {kind}: error {error:.1e}"
                spent = milliseconds(given)
                tokens = int(given["in_place"].sum()) + len(given["buffer"])
                buffer = given["buffer"]
                rate = tokens * buffer.shape[1] * buffer.itemsize / spent / 1e6
                print(f"{kind} {shape} {load}: error {error:.1e}, {spent * 1e3:.0f} us, {rate:.0f} GB/s")


if __name__ == "__main__":
    main()
