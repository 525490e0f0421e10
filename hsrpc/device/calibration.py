"""What this machine can do: bus both ways, GEMM rate and memory bandwidth, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from hsrpc.core.plan import Hardware
from hsrpc.core.sizes import ModelSizes
from hsrpc.device.device import Device

_REPEATS = 5


def calibrate(device: Device, sizes: ModelSizes, dtype: torch.dtype) -> Hardware:
    """Rates for copies of one layer's size and GEMMs of the regeneration shape; medians of five after a warm-up."""
    on_cpu = device.torch_device.type == "cpu"
    copy_bytes = 8 * 1024**2 if on_cpu else 128 * 1024**2
    host = device.pinned(copy_bytes)
    target = device.empty((copy_bytes,), torch.uint8)
    other = device.empty((copy_bytes,), torch.uint8)
    rows = 128 if on_cpu else 4096
    x = torch.randn(rows, sizes.hidden_size, device=device.torch_device, dtype=dtype)
    weight = torch.randn(2 * sizes.kv_size, sizes.hidden_size, device=device.torch_device, dtype=dtype)
    load = _seconds(device, lambda: target.copy_(host, non_blocking=True))
    store = _seconds(device, lambda: host.copy_(target, non_blocking=True))
    memory = _seconds(device, lambda: other.copy_(target))
    gemm = _seconds(device, lambda: torch.nn.functional.linear(x, weight))
    device.release_pinned()
    return Hardware(
        load_bandwidth=copy_bytes / load,
        store_bandwidth=copy_bytes / store,
        gemm_rate=2 * rows * weight.numel() / gemm,
        memory_bandwidth=2 * copy_bytes / memory,
    )


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """Median seconds of `work` on the compute stream."""
    times = []
    with device.on(device.compute), torch.inference_mode():
        for _ in range(_REPEATS + 1):
            device.synchronize(device.record(device.compute))
            start = time.perf_counter()
            work()
            device.synchronize(device.record(device.compute))
            times.append(time.perf_counter() - start)
    return median(times[1:])
