"""The decode attention kernel on a GPU: its error against float64, and its share of the memory bandwidth.

python benchmarks/decode_kernel.py
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TypedDict

import torch

from hsrpc.model.attention import HeadShape
from hsrpc.model.kernels.decode_attention import decode_attention

BLOCK_SIZE = 16
SHAPES = ((32, 32, 64), (32, 32, 80), (32, 32, 128), (32, 8, 128), (56, 56, 128))
"""Query heads, KV heads, head size."""
LOADS = ((1, 4000), (8, 600), (24, 600), (64, 600), (128, 512))
"""Requests, tokens of each."""
COMPILED = ((1, 20), (1, 4000))
"""Loads in one part and in several: with these compiled, all others are to be ready."""
MAX_SECONDS = 0.05
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


def case(
    shape: tuple[int, int, int], load: tuple[int, int], share: float, dtype: torch.dtype, device: str = "cuda"
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
    return {
        "queries": torch.randn(requests, 2 * heads * head_dim, device=device, dtype=dtype)[:, : heads * head_dim],
        "pool": torch.randn(requests * blocks * BLOCK_SIZE, width, device=device, dtype=dtype),
        "buffer": torch.randn(front + int(buffered.sum()), width, device=device, dtype=dtype),
        "out": torch.full((requests, heads * head_dim), torch.nan, device=device, dtype=dtype),
        "tables": torch.randperm(requests * blocks, device=device).view(requests, blocks).int(),
        "in_place": torch.tensor(in_place, device=device).int(),
        "rebuilt_starts": rebuilt.cumsum(0).int().to(device),
        "key_starts": (front + buffered.cumsum(0)).int().to(device),
        "heads": HeadShape(heads, kv_heads, head_dim, head_dim),
        "block_size": BLOCK_SIZE,
        "scale": head_dim**-0.5,
        "max_keys": tokens,
    }


def reference(given: Given) -> torch.Tensor:
    """Attention in float64, request by request."""
    heads = given["heads"]
    front, starts, rows = given["rebuilt_starts"].tolist(), given["key_starts"].tolist(), []
    buffer = given["buffer"]
    for i, count in enumerate(given["in_place"].tolist()):
        token = torch.arange(count, device=buffer.device)
        slots = given["tables"][i][token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        parts = (given["pool"][slots], buffer[front[i] : front[i + 1]], buffer[starts[i] : starts[i + 1]])
        q = given["queries"][i].double().view(heads.num_heads, heads.key_dim)
        keys_values = heads.keys_values(torch.cat(parts).double())
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
    for dtype in (torch.float16, torch.float32):
        for shape in SHAPES:
            for load in COMPILED:
                decode_attention(**case(shape, load, 0.6, dtype))
            for load in LOADS:
                given = case(shape, load, 0.6, dtype)
                wanted = reference(given)
                start = time.perf_counter()
                decode_attention(**given)
                spent = time.perf_counter() - start
                assert spent < MAX_SECONDS, f"{shape} {load} {dtype}: {spent:.3f} s for the first call, compiled again?"
                error = ((given["out"].double() - wanted).norm() / wanted.norm()).item()
                assert error < (2e-3 if dtype is torch.float16 else 1e-5), f"{shape} {load} {dtype}: error {error:.1e}"
                spent = milliseconds(given)
                tokens = int(given["in_place"].sum()) + len(given["buffer"])
                rate = tokens * given["buffer"].shape[1] * dtype.itemsize / spent / 1e6
                print(f"{dtype} {shape} {load}: error {error:.1e}, {spent * 1e3:.0f} us, {rate:.0f} GB/s")


if __name__ == "__main__":
    main()
