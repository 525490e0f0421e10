"""What the host adds to a decode step of a model that lies on the device with all its cache.

    python -m benchmarks.orchestration --shape opt-1.3b --batch 64 --json orchestration.json

Measures the engine's last decode steps of a full batch. Then, with the engine idle, it launches the last step's graph
and its sampling again and again, with nothing else between: what a step takes beyond that is orchestration.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.bench.run import load_requests
from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.cli.loop import run_loop
from hsrpc.config import CachePolicy, DeviceKind
from hsrpc.engine.stats import StepRecord
from hsrpc.model.sampler import SamplingRow

LAST_STEPS = 20
REPLAYS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Seconds of a step, and of its work alone."""

    model: str
    device: str
    batch: int
    context: int
    step_seconds: float
    """Median of `step_times`."""
    alone_seconds: float
    orchestration: float
    """Part of the step beyond its work."""
    step_times: list[float]


async def measure(options: argparse.Namespace) -> Found:
    """One engine's last steps, then their work alone."""
    records: list[StepRecord] = []
    config = EngineConfig(
        model=f"random:{options.shape}",
        device=DeviceKind(options.device),
        cache_policy=CachePolicy.KV,
        max_batch=options.batch,
        max_model_len=options.prompt + options.output,
        expected_context=options.prompt + options.output,
        gpu_memory=options.gpu_memory,
    )
    async with Engine(config, observe=records.append) as engine:
        lengths = {"prompt": options.prompt, "output": options.output, "vocab_size": engine.spec.vocab_size}
        await load_requests(engine, make_workload(Lengths.UNIFORM, count=options.batch, **lengths))
        alone = time_alone(engine, options.batch)
        name, device = engine.spec.name, engine.device
    full = [each.seconds for each in records if each.decode_tokens == options.batch and not each.prefill_tokens]
    step = median(full[-LAST_STEPS:])
    return Found(
        model=name,
        device=device,
        batch=options.batch,
        context=options.prompt + options.output,
        step_seconds=step,
        alone_seconds=alone,
        orchestration=1 - alone / step,
        step_times=full[-LAST_STEPS:],
    )


@torch.inference_mode()
def time_alone(engine: Engine, batch: int) -> float:
    """Seconds of the last step's graph and sampling, whose inputs are where they were.

    Raises:
        SystemExit: no graph runs the model's steps.
    """
    parts = engine._opened
    device, graphs, sampler = parts.device, parts.executor._graphs, parts.executor._sampler
    if graphs is None:
        raise SystemExit(f"--shape {engine.spec.name}: it does not fit the device with its cache; raise --gpu-memory")
    rows = [SamplingRow(SamplingParams(temperature=0.0), [], [], 0, frozenset())] * batch
    graph = graphs._graphs[batch]
    with device.on(device.compute):
        for repeat in range(REPLAYS + 1):
            if repeat == 1:
                device.drain()
                start = time.perf_counter()
            graph()
            sampler.launch(graphs._logits[:batch], rows)
        device.drain()
    return (time.perf_counter() - start) / REPLAYS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b", help="a name, or a config.json")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--json", type=Path, help="save the times here")
    options = parser.parse_args(arguments)
    found = run_loop(measure(options))
    step, alone = found.step_seconds * 1e3, found.alone_seconds * 1e3
    print(f"{found.model}, {found.batch} requests: {step:.3f} ms a step, {alone:.3f} ms its graph and sampling alone")
    print(f"orchestration {found.orchestration:.1%} of the step")
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
