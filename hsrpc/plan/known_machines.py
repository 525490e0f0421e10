"""Machines that a plan can be made for without sitting at one.

The rates of `h100` and `h200` were measured, by this project's calibration in 16 bits, on servers with PCIe 5:
`benchmarks/results/planner/grid-opt-1.3b-76GiB.json`, its second cell, and `benchmarks/results/guard/nvidia-h200.json`,
its case planned-24gib. **Those of `a100`, `rtx4090` and `rtx3090` were not**: they are the figures of their
datasheets, times the shares of its datasheet that the H100 was measured to reach; the host is taken to be the same one.

Products of float8 by rows took an H100 and an H200 1/1.7 of those in 16 bits, at the shapes that rebuild K and V, where
they were measured by themselves; calibration measures them with the others now.

What a GPU gets from others over NVLink is the same for both, `fitted.GATHER_BANDWIDTH`; desktop cards are taken to have
none, and to get it through the host at half of the bus's rate.

Device memory is what is free where nothing else runs. The host's is an assumption, for a GPU's part of a common
machine: 256 GiB in a server of H100 or H200, 128 GiB in one of A100, 64 GiB in a desktop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hsrpc.config import DeviceKind
from hsrpc.errors import ConfigError
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.machine import CALIBRATE, Machine, read_machine

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class _Datasheet:
    """What a maker says of a GPU."""

    products: float
    """FLOP/s of dense products in 16 bits, summed in 32 bits."""
    memory: float
    """Bytes/s."""
    bus: float
    """Bytes/s in one direction."""
    peers: float = 0.0
    """Bytes/s from other GPUs in one direction, over links of their own; 0: they reach each other through the host."""
    has_fp8: bool = False
    """Products of float8 are twice as fast."""


_PCIE_4, _PCIE_5 = 32e9, 64e9
"""Bytes/s in one direction of 16 lanes, before any coding and headers."""
_H100 = Hardware(
    load_bandwidth=55.1e9,
    store_bandwidth=55.1e9,
    contended_share=0.998,
    gemm_rate=751e12,
    fp8_gemm_share=1.7,
    memory_bandwidth=2.95e12,
    duplex_share=0.839,
    prompt_rate_share=0.9,
    gemm_overhead=7.62e-6,
    weight_read_share=0.783,
    attention_read_share=0.944,
    small_kernel_time=3.92e-6,
    launch_time=182e-6,
    prompt_launch_time=546e-6,
    hop_time=250e-6,
    handover_time=80e-6,
    boundary_time=1e-3,
    request_time=20e-6,
)
_H200 = Hardware(
    load_bandwidth=55.2e9,
    store_bandwidth=54.6e9,
    contended_share=1.0,
    gemm_rate=685e12,
    fp8_gemm_share=1.7,
    memory_bandwidth=4.09e12,
    duplex_share=0.907,
    prompt_rate_share=0.9,
    gemm_overhead=0.0,
    weight_read_share=0.858,
    attention_read_share=0.923,
    small_kernel_time=6.14e-6,
    launch_time=189e-6,
    prompt_launch_time=567e-6,
    hop_time=250e-6,
    handover_time=80e-6,
    boundary_time=1e-3,
    request_time=20e-6,
)
_H100_SHEET = _Datasheet(products=989e12, memory=3.35e12, bus=_PCIE_5, peers=450e9)
_THROUGH_HOST = 0.5
"""Part of the bus's rate at which a GPU gets what others have to send to the host first."""


def _estimated(sheet: _Datasheet) -> Hardware:
    """Rates that reach the same part of their datasheet as those of the H100."""
    bus = sheet.bus / _H100_SHEET.bus
    through_host = _THROUGH_HOST * _H100.load_bandwidth * bus
    return replace(
        _H100,
        load_bandwidth=_H100.load_bandwidth * bus,
        store_bandwidth=_H100.store_bandwidth * bus,
        gather_bandwidth=_H100.gather_bandwidth * sheet.peers / _H100_SHEET.peers if sheet.peers else through_host,
        gemm_rate=_H100.gemm_rate * sheet.products / _H100_SHEET.products,
        fp8_gemm_share=_H100.fp8_gemm_share if sheet.has_fp8 else 1.0,
        memory_bandwidth=_H100.memory_bandwidth * sheet.memory / _H100_SHEET.memory,
    )


def _machine(name: str, *, device: int, host: int, hardware: Hardware) -> Machine:
    """Memory in GiB."""
    return Machine(
        name=name,
        kind=DeviceKind.CUDA,
        device_memory=device * _GIB,
        host_memory=host * _GIB,
        dtype="float16",
        hardware=hardware,
    )


_NOT_MEASURED = "by its datasheet, not measured"
KNOWN_MACHINES = {
    "h100": _machine("NVIDIA H100 80GB", device=78, host=256, hardware=_H100),
    "h200": _machine("NVIDIA H200 141GB", device=139, host=256, hardware=_H200),
    "a100": _machine(
        f"NVIDIA A100 80GB ({_NOT_MEASURED})",
        device=78,
        host=128,
        hardware=_estimated(_Datasheet(products=312e12, memory=2.039e12, bus=_PCIE_4, peers=300e9)),
    ),
    "rtx4090": _machine(
        f"NVIDIA RTX 4090 ({_NOT_MEASURED})",
        device=23,
        host=64,
        hardware=_estimated(_Datasheet(products=165e12, memory=1.008e12, bus=_PCIE_4, has_fp8=True)),
    ),
    "rtx3090": _machine(
        f"NVIDIA RTX 3090 ({_NOT_MEASURED})",
        device=23,
        host=64,
        hardware=_estimated(_Datasheet(products=71e12, memory=0.936e12, bus=_PCIE_4)),
    ),
}


def find_machine(name_or_file: str) -> Machine:
    """A machine that is known by its name, or one whose rates were saved in a file.

    Raises:
        ConfigError: it is neither, or the file is not right.
    """
    if name_or_file in KNOWN_MACHINES:
        return KNOWN_MACHINES[name_or_file]
    file = Path(name_or_file)
    if not file.exists():
        problem, known = "neither a machine known here nor a file", ", ".join(KNOWN_MACHINES)
        raise ConfigError("hardware", name_or_file, problem, f"use one of {known}, or a file that {CALIBRATE} wrote")
    return read_machine(file)
