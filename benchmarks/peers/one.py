"""One setup in this process, which ends with it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.cases import Setup, System, sizes_of
from benchmarks.peers.limits import calibrate, limit_seconds, median_hardware
from benchmarks.peers.record import Outcome, PeerRun, setup_from
from hsrpc.plan.hardware import Hardware

_ACCELERATE = ("accelerate", "transformers", "torch")
_LIBRARIES = {
    System.HSRPC: ("torch",),
    System.FLEXGEN: ("flexgen", "torch"),
    System.ACCELERATE: _ACCELERATE,
    System.ACCELERATE_PINNED: _ACCELERATE,
    System.TRANSFORMERS: ("transformers", "torch"),
}


def run_one(setup: str, file: Path) -> None:
    """Measure the setup that is written in JSON, and write its outcome."""
    wanted = setup_from(json.loads(setup))
    software = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES[wanted.system])
    outcome = replace(measure(wanted), software=software)
    file.write_text(json.dumps(asdict(outcome)))


def measure(setup: Setup) -> Outcome:
    """Run a setup. What goes wrong is raised."""
    if setup.system is System.HSRPC:
        from benchmarks.peers import run_hsrpc

        return run_hsrpc.run(setup)
    return _measure_peer(setup)


def _measure_peer(setup: Setup) -> Outcome:
    from benchmarks.peers import cuda_memory

    before = calibrate(setup.model, 1)
    cuda_memory.limit_device(setup.budgets.device)
    run = _run_peer(setup)
    cuda_memory.unlimit_device()
    hardware = median_hardware([*before, *calibrate(setup.model, 2)])
    return peer_outcome(setup, run, hardware, cuda_memory.device_name())


def _run_peer(setup: Setup) -> PeerRun:
    if setup.system is System.FLEXGEN:
        from benchmarks.peers import run_flexgen

        return run_flexgen.run(setup)
    if setup.system is System.TRANSFORMERS:
        from benchmarks.peers import run_transformers

        return run_transformers.run(setup)
    from benchmarks.peers import run_accelerate

    return run_accelerate.run(setup)


def peer_outcome(setup: Setup, run: PeerRun, hardware: Hardware, device: str) -> Outcome:
    """A peer's run beside the limit of its own placement on this machine."""
    batch, timing = setup.batch or 0, run.timing
    decode = timing.decode_seconds(setup.output)
    limit = limit_seconds(run.traffic, sizes_of(setup.model), hardware)
    return Outcome(
        device=device,
        batch=batch,
        prefill_seconds=timing.prefill,
        step_seconds=timing.step_seconds,
        decode_seconds=decode,
        total_seconds=timing.prefill + decode,
        decode_tokens=batch * (setup.output - 1),
        total_tokens=batch * setup.output,
        projected=len(timing.steps) < setup.output - 1,
        limit_step_seconds=limit,
        efficiency=limit * (setup.output - 1) / decode,
        peak_device_bytes=run.peak_device_bytes,
        host_bytes=run.host_bytes,
        load_seconds=run.load_seconds,
        load_bandwidth=hardware.load_bandwidth,
    )
