"""How fast the bus is alone and beside GEMMs, for copies like the engine's.

    python benchmarks/bus.py --shape opt-13b --json bus.json

Copies fill a buffer again and again: from one piece of host memory that fits the host's caches, from pieces that lie
behind each other in more memory than those hold, and from runs of blocks scattered over it, in batched copies of one
mini-batch each. Each is timed alone, beside GEMMs at the regeneration shape, and beside such that fill a buffer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hsrpc.config import DeviceKind, parse_bytes
from hsrpc.device.device import Device, open_device
from hsrpc.model.spec import named_spec
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.step import Ints, Runs

Copy = Callable[[], int]
"""Launches copies on the current stream, and tells how many bytes."""


def copies(device: Device, options: argparse.Namespace, width: int, dtype: torch.dtype) -> Iterator[tuple[str, Copy]]:
    """Copies of rows of `width` elements, by name."""
    row_bytes = width * dtype.itemsize
    rows, run = int(options.buffer) // row_bytes, int(options.run) // row_bytes
    num_buffers = options.memory // (rows * row_bytes)
    host = device.pinned(num_buffers * rows * row_bytes, HostUse.MEASUREMENT).view(dtype).view(-1, width)
    target = device.empty((rows, width), dtype, DeviceUse.MEASUREMENT)
    order = np.random.default_rng(0).permutation(len(host) // run)
    scattered = order[: len(order) // (rows // run) * (rows // run)].reshape(-1, rows // run) * run

    def copy_pieces(starts: Iterator[int]) -> Copy:
        def copy() -> int:
            start = next(starts)
            target.copy_(host[start : start + rows], non_blocking=True)
            return rows * row_bytes

        return copy

    def copy_runs(all_starts: Iterator[Ints]) -> Copy:
        def copy() -> int:
            starts = next(all_starts)
            count = np.full(len(starts), run, dtype=np.int64)
            device.copy_runs(target, host, Runs(starts, np.arange(len(starts)) * run, count))
            return len(starts) * run * row_bytes

        return copy

    yield "one piece", copy_pieces(cycle([0]))
    yield "many pieces", copy_pieces(cycle(range(0, len(host), rows)))
    yield "runs", copy_runs(cycle(scattered))


def gemms(device: Device, rows: int, sizes: ModelSizes, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Products at the regeneration shape, by name."""
    x, weight = (
        torch.randn(size, sizes.hidden_size, device=device.torch_device, dtype=dtype)
        for size in (rows, 2 * sizes.num_kv_heads * sizes.head_dim)
    )
    bias = torch.zeros(2 * sizes.num_kv_heads * sizes.head_dim, device=device.torch_device, dtype=dtype)
    out = device.empty((rows, 2 * sizes.num_kv_heads * sizes.head_dim), dtype, DeviceUse.MEASUREMENT)
    return {
        "alone": lambda: None,
        "beside GEMMs": lambda: functional.linear(x, weight),
        "beside GEMMs into a buffer": lambda: torch.addmm(bias, x, weight.t(), out=out),
    }


def rate(device: Device, copy: Copy, product: Callable[[], object], count: int, repeats: int) -> float:
    """Median bytes/s of a copy that begins with the first of `count` products."""
    rates = []
    for _ in range(repeats + 1):
        device.drain()
        with device.on(device.compute), torch.inference_mode():
            for _ in range(count):
                product()
        start = time.perf_counter()
        with device.on(device.load), torch.inference_mode():
            size = copy()
        device.synchronize(device.record(device.load))
        rates.append(size / (time.perf_counter() - start))
    device.drain()
    return median(rates[1:])


def seconds_of(device: Device, product: Callable[[], object]) -> float:
    """Seconds that one product takes, among many."""
    with device.on(device.compute), torch.inference_mode():
        product()
        device.drain()
        start = time.perf_counter()
        for _ in range(10):
            product()
        device.drain()
    return (time.perf_counter() - start) / 10


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rates in GB/s, by copy and by what runs beside it."""
    device = open_device(DeviceKind(options.device))
    dtype = torch.float32 if device.torch_device.type == "cpu" else torch.float16
    sizes = named_spec(options.shape, dtype).sizes
    products = gemms(device, options.rows, sizes, dtype)
    found: dict[str, dict[str, float]] = {}
    for name, copy in copies(device, options, sizes.hidden_size, dtype):
        alone = rate(device, copy, products["alone"], 0, options.repeats)
        counts = {
            other: math.ceil(1.5 * options.buffer / alone / seconds_of(device, p)) for other, p in products.items()
        }
        counts["alone"] = 0
        found[name] = {
            other: rate(device, copy, product, counts[other], options.repeats) / 1e9
            for other, product in products.items()
        }
        print(f"{name:12}", *(f"{other}: {value:.1f} GB/s" for other, value in found[name].items()), sep="  ")
    device.release_pinned()
    return {"model": options.shape, "device": device.name, "rates": found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-13b", help="a name, or a config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=4096, help="of a GEMM")
    parser.add_argument(
        "--buffer", type=_bytes, default=_bytes("240MiB"), help="bytes of a copy, or of a batch of them"
    )
    parser.add_argument("--run", type=_bytes, default=_bytes("5MiB"), help="bytes of a run of blocks")
    parser.add_argument("--memory", type=_bytes, default=_bytes("8GiB"), help="on the host that the copies come from")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="save the rates here")
    options = parser.parse_args(arguments)
    found = measure(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def _bytes(text: str) -> int:
    return parse_bytes(text, "size")


if __name__ == "__main__":
    main()
