"""llama.cpp by its own `llama-batched-bench`, with a GGUF file of random weights: experts on the host.

As a user would run it: all else and the cache on the device, weights not mapped but read, so that experts are pinned
and large batches can be copied to the GPU. It samples nothing: its steps are decoding alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.cases import Setup, sizes_of
from benchmarks.peers.random_gguf import write_random_gguf
from benchmarks.peers.record import PeerRun, Timing, Traffic
from hsrpc.model.random_codes import split_format

_PROGRAM = "llama-batched-bench"
_FOLDER = Path(tempfile.gettempdir(), "hsrpc-peers")
"""Keeps the file: writing one takes longer than the run."""
_SECONDS_BETWEEN_SAMPLES = 0.2
_ENVIRONMENT = {"LLAMA_ARG_LOAD_MODE": "none", "LLAMA_ARG_NO_MMAP": "1"}
"""Weights are read, and those on the host are pinned; newer releases know the first, older ones the other."""
_CELL = 256
"""Its cache has room for a multiple of so many tokens."""


def run(setups: Sequence[Setup]) -> Iterator[PeerRun]:
    """Write the file unless it is there, load once, and measure all batches.

    Raises:
        ValueError: there is no such program, or it failed.
    """
    if shutil.which(_PROGRAM) is None:
        raise ValueError(f"{_PROGRAM} is not on the PATH; build llama.cpp with CUDA and add its folder to PATH")
    started = time.perf_counter()
    file = _random_file(setups[0].model)
    free, _ = torch.cuda.mem_get_info()
    lines, least = _watched(command(setups, file, os.cpu_count() or 1))
    seconds = time.perf_counter() - started
    timings = read_timings(lines)
    for setup in setups:
        if setup.batch not in timings:
            said = " ".join(lines[-3:])
            raise ValueError(f"{_PROGRAM} did not measure {setup.batch} streams, but said: {said}")
    for setup in setups:
        measured = timings[setup.batch or 0]
        yield PeerRun(
            timing=measured,
            traffic=_traffic(setup),
            peak_device_bytes=free - least,
            host_bytes=_expert_bytes(setup.model),
            load_seconds=seconds - sum(each.prefill + sum(each.steps) for each in timings.values()),
        )


def command(setups: Sequence[Setup], file: Path, num_threads: int) -> list[str]:
    """The call that measures all these batches."""
    setup, batches = setups[0], sorted(each.batch or 0 for each in setups)
    num_layers = sizes_of(setup.model).num_layers
    context = batches[-1] * -(-(setup.prompt + setup.output) // _CELL) * _CELL
    values = {
        "--model": file,
        "--ctx-size": context,
        "--batch-size": 2048,
        "--ubatch-size": 2048,
        "--n-gpu-layers": num_layers + 1,
        "--n-cpu-moe": num_layers,
        "--flash-attn": "on",
        "--fit": "off",
        "--threads": num_threads,
        "-npp": setup.prompt,
        "-ntg": setup.output,
        "-npl": ",".join(map(str, batches)),
        "--output-format": "jsonl",
    }
    return [_PROGRAM, *(str(word) for pair in values.items() for word in pair)]


def read_timings(lines: Sequence[str]) -> dict[int, Timing]:
    """Timings by number of streams, from what the program says in JSON; its steps are a mean."""
    found: dict[int, Timing] = {}
    for line in lines:
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            count, streams = entry["tg"], entry["pl"]
            steps = [entry["t_tg"] / count] * count
            found[streams] = Timing(prefill=entry["t_pp"], steps=steps, tokens=count * streams)
    return found


def _random_file(model: str) -> Path:
    shape, _ = split_format(model)
    file = _FOLDER / f"{shape}.gguf"
    if not file.exists():
        _FOLDER.mkdir(exist_ok=True)
        fresh = file.with_suffix(".new")
        write_random_gguf(shape, fresh)
        fresh.rename(file)
    return file


def _watched(words: Sequence[str]) -> tuple[list[str], int]:
    """What a program says, and the least device memory that was free meanwhile."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ | _ENVIRONMENT)
        least = torch.cuda.mem_get_info()[0]
        while process.poll() is None:
            least = min(least, torch.cuda.mem_get_info()[0])
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        output.seek(0)
        return output.read().splitlines(), least


def _expert_bytes(model: str) -> int:
    return int(sum(tensor.host_bytes for layer in sizes_of(model).layers for tensor in layer.expert_tensors))


def _traffic(setup: Setup) -> Traffic:
    """What would cross the bus if experts did: those that the tokens of a step take, drawn at random."""
    batch, touched = setup.batch or 0, 0.0
    for layer in sizes_of(setup.model).layers:
        if layer.experts:
            touched += layer.expert_bus_bytes * float(layer.experts.touched(batch))
    return Traffic(batch=batch, context=setup.mean_context, weights=int(touched), cache=0)
