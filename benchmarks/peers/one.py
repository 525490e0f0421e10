"""Setups of one engine in this process, which ends with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
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
    System.VLLM: ("vllm", "torch"),
    System.LLAMA_CPP: ("gguf",),
}
_WANTED = {"vllm": "vllm==0.23.0", "flexgen": "flexgen==0.1.8"}
"""Releases that the runners are written for."""


def run_one(setups: str, file: Path) -> None:
    """Measure the setups that are written in JSON, all for one engine; write the outcomes, after each of them."""
    wanted = [setup_from(entry) for entry in json.loads(setups)]
    software = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES[wanted[0].system])
    outcomes = []
    for outcome in measure(wanted):
        outcomes.append(asdict(replace(outcome, software=software)))
        file.write_text(json.dumps(outcomes))


def measure(setups: Sequence[Setup]) -> Iterator[Outcome]:
    """Run setups of one engine. What goes wrong is raised."""
    if setups[0].system is System.HSRPC:
        from benchmarks.peers import run_hsrpc

        return map(run_hsrpc.run, setups)
    return _measure_peer(setups)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise ValueError(f"{name} is not installed; pip install {_WANTED.get(name, name)}") from error


def _measure_peer(setups: Sequence[Setup]) -> Iterator[Outcome]:
    from benchmarks.peers import cuda_memory

    hardware = calibrate(setups[0].model, 1)
    cuda_memory.limit_device(setups[0].budgets.device)
    for setup, run in zip(setups, _run_peer(setups), strict=True):
        cuda_memory.unlimit_device()
        hardware += calibrate(setup.model, 2)
        yield peer_outcome(setup, run, median_hardware(hardware), cuda_memory.device_name())
        cuda_memory.limit_device(setup.budgets.device)


def _run_peer(setups: Sequence[Setup]) -> Iterator[PeerRun]:
    system = setups[0].system
    if system is System.VLLM:
        from benchmarks.peers import run_vllm

        return run_vllm.run(setups)
    if system is System.LLAMA_CPP:
        from benchmarks.peers import run_llama_cpp

        return run_llama_cpp.run(setups)
    return map(_run_alone, setups)


def _run_alone(setup: Setup) -> PeerRun:
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
        decode_tokens=batch * (setup.output - 1) if timing.tokens is None else timing.tokens,
        total_tokens=batch * setup.output,
        projected=len(timing.steps) < timing.num_steps(setup.output),
        limit_step_seconds=limit,
        efficiency=limit * timing.num_steps(setup.output) / decode,
        peak_device_bytes=run.peak_device_bytes,
        host_bytes=run.host_bytes,
        load_seconds=run.load_seconds,
        load_bandwidth=hardware.load_bandwidth,
    )
