"""How the cost of a step grows: of scheduling with the requests that wait and run, of computing with context and batch.

    python benchmarks/growth.py scheduling --json scheduling.json --plot scheduling.png
    python benchmarks/growth.py steps --shape opt-6.7b --json steps.json --plot steps.png

`scheduling` needs no model and no GPU: it times the scheduler while in every step one request ends, one is admitted
and one arrives. `steps` measures decode steps on random weights with all layers and caches on the host, along a line of
contexts and a line of batches, and states how far each line is from a straight one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from hsrpc.bench.run import WARM_UP_STEPS, observe_run, summarise
from hsrpc.bench.workload import Lengths, Workload, make_workload
from hsrpc.cli.loop import run_loop
from hsrpc.config import EngineConfig, Placement
from hsrpc.engine.engine import Engine
from hsrpc.plan.roofline import StepRecord
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits
from hsrpc.schedule.step import BufferLimits, RowCosts
from hsrpc.schedule.sweep import NOTHING_CARRIED

WAITING = (0, 100, 1_000, 10_000)
RUNNING = (1, 8, 32, 128, 512)
CLIENTS = 16
PROMPT = 512
BLOCK_SIZE = 16
WARM_UP = 10
PARAMS = SamplingParams(max_tokens=100_000, ignore_eos=True)


class Load:
    """A scheduler with a full batch and a queue, and no device behind it."""

    def __init__(self, waiting: int, running: int) -> None:
        limits = SchedulerLimits(
            max_batch=running,
            max_model_len=2048,
            max_prefill_tokens=running * PROMPT,
            max_idle_prefill_tokens=running * PROMPT,
            block_size=BLOCK_SIZE,
            buffers=BufferLimits(rows=64 * 2048, activation_rows=64 * 2048, queries=64 * 2048),
            costs=RowCosts(1.0, 0.5, 0.1),
        )
        num_blocks = dict.fromkeys(PoolId, 0) | {PoolId.HOST_KV: 60_000, PoolId.HOST_ACTIVATION: 60_000}
        self.scheduler = Scheduler(BlockManager(num_blocks), limits, [])
        self._assembler = Assembler(
            layers=(), block_size=limits.block_size, windows=limits.windows, max_queries=limits.buffers.queries
        )
        self._arrived = 0
        self._prompt = list(range(PROMPT))
        self._arrive(running)
        self._step()
        self._arrive(waiting)

    def step(self) -> float:
        """Seconds of the scheduler: a request arrives, a step is handed out and taken back, its oldest request ends."""
        start = time.perf_counter()
        self._arrive(1)
        oldest = self._step()
        self.scheduler.finish(oldest.request_id, FinishReason.ABORTED)
        return time.perf_counter() - start

    def _arrive(self, count: int) -> None:
        for number in range(self._arrived, self._arrived + count):
            now = time.monotonic()
            self.scheduler.add(Request(str(number), self._prompt, PARAMS, number, now, client=str(number % CLIENTS)))
        self._arrived += count

    def _step(self) -> Request:
        step = self.scheduler.schedule(time.monotonic())
        assert step is not None
        assert self._assembler.assemble(step, NOTHING_CARRIED).mini_batches  # making them belongs to the time
        self.scheduler.commit(step.step_id, [1] * len(step.sampling), time.monotonic())
        return min((chunk.request for chunk in step.chunks), key=lambda request: request.rank)


def time_scheduling(waiting: int, running: int, steps: int) -> dict[str, float]:
    """Median and extremes of the seconds a step."""
    load = Load(waiting, running)
    times = [load.step() for _ in range(WARM_UP + steps)][WARM_UP:]
    assert (load.scheduler.num_running, load.scheduler.num_waiting) == (running - 1, waiting + 1)
    return {"waiting": waiting, "running": running, "median_s": median(times), "min_s": min(times), "max_s": max(times)}


def run_scheduling(options: argparse.Namespace) -> dict[str, object]:
    """All pairs of waiting and running requests."""
    results = [time_scheduling(waiting, running, options.steps) for running in RUNNING for waiting in WAITING]
    for result in results:
        print(
            "{running:4} run, {waiting:6} wait: {median_s:.6f} s a step ({min_s:.6f} to {max_s:.6f})".format(**result)
        )
    return {"prompt_tokens": PROMPT, "steps": options.steps, "results": results}


def plot_scheduling(found: dict[str, Any], file: Path) -> None:
    """A line for each batch, over the queue's length."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for running in RUNNING:
        line = [result for result in found["results"] if result["running"] == running]
        waiting, milliseconds = [r["waiting"] for r in line], [r["median_s"] * 1e3 for r in line]
        axes.plot(waiting, milliseconds, marker="o", label=f"{running} run")
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlabel="requests that wait", ylabel="ms of scheduling a step", yscale="log", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=150)


def measure_step(options: argparse.Namespace, batch: int, context: int) -> dict[str, float]:
    """Median seconds of decode steps of `batch` requests with about `context` cached tokens each."""
    output = options.steps + WARM_UP_STEPS + 8
    config = EngineConfig(
        model=f"random:{options.shape}",
        device=options.device,
        placement=Placement.HOST,
        cache_policy=options.policy,
        min_batch=batch,
        max_batch=batch,
        max_model_len=context + output,
        expected_context=context + output // 2,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
    )
    decoded, wanted = 0, int(options.steps) + WARM_UP_STEPS

    def is_decode(record: StepRecord) -> bool:
        return record.prefill_tokens == 0 and record.decode_tokens == batch

    def is_enough(record: StepRecord) -> bool:
        nonlocal decoded
        decoded += is_decode(record)
        return decoded >= wanted

    def make(engine: Engine) -> Workload:
        vocab_size = engine.spec.vocab_size
        return make_workload(Lengths.UNIFORM, count=batch, prompt=context, output=output, vocab_size=vocab_size)

    run = run_loop(observe_run(config, make, lambda records: list(filter(is_decode, records)), is_enough=is_enough))
    result = summarise(run, config)
    return {
        "batch": batch,
        "context": median(record.held_tokens for record in run.chosen) / batch,
        "step_s": result.step_seconds,
        "limit_s": result.limit_seconds,
        "efficiency": result.efficiency,
        "bandwidth": result.hardware.load_bandwidth,
        "activation_share": result.activation_share,
    }


def run_steps(options: argparse.Namespace) -> dict[str, object]:
    """A line over contexts at the last batch, and one over batches at the last context; they share a point."""
    wanted = {
        "context": [(options.batch[-1], context) for context in options.context],
        "batch": [(batch, options.context[-1]) for batch in options.batch],
    }
    points: dict[tuple[int, int], dict[str, float]] = {}
    for point in dict.fromkeys(wanted["context"] + wanted["batch"]):
        points[point] = measure_step(options, *point)
        print(
            "{batch:4} x {context:5.0f}: step {step_s:.4f} s, limit {limit_s:.4f} s".format(**points[point]), flush=True
        )
        if options.json:  # at once: of a run that is cut short the points are left
            options.json.write_text(json.dumps({"points": list(points.values())}, indent=1) + "\n")
    lines = {name: [points[point] for point in line] for name, line in wanted.items()}
    departures = {name: departure(line, name) for name, line in lines.items()}
    for name, value in departures.items():
        print(f"over {name}: at most {value:.1%} from a straight line")
    return {"model": options.shape, "policy": options.policy, "lines": lines, "departure_from_linear": departures}


def departure(line: Sequence[dict[str, float]], name: str) -> float:
    """Largest distance from the best straight line, as a share of the measured time."""
    x, y = (np.array([point[key] for point in line]) for key in (name, "step_s"))
    return float(np.max(np.abs(np.polyval(np.polyfit(x, y, 1), x) - y) / y))


def plot_steps(found: dict[str, Any], file: Path) -> None:
    """Measured step time and limit over context, and over batch."""
    figure, both = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    for axes, (name, line) in zip(both, found["lines"].items(), strict=True):
        x = [point[name] for point in line]
        axes.plot(x, [point["step_s"] * 1e3 for point in line], marker="o", label="measured")
        axes.plot(x, [point["limit_s"] * 1e3 for point in line], linestyle="--", label="limit")
        axes.set(xlabel={"context": "cached tokens of a request", "batch": "requests"}[name])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    both[0].set(ylabel="ms a decode step", title=f"{found['model']}, {found['policy']}")
    both[0].legend()
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="scheduling | steps")
    scheduling = kinds.add_parser("scheduling")
    scheduling.add_argument("--steps", type=int, default=100)
    scheduling.set_defaults(run=run_scheduling, draw=plot_scheduling)
    steps = kinds.add_parser("steps")
    steps.add_argument("--shape", default="opt-6.7b", help="a name, or a config.json")
    steps.add_argument("--policy", default="activation")
    steps.add_argument("--context", type=int, nargs="+", default=[128, 256, 512, 1024])
    steps.add_argument("--batch", type=int, nargs="+", default=[16, 32, 48, 64])
    steps.add_argument("--steps", type=int, default=15)
    steps.add_argument("--device", default="auto")
    steps.add_argument("--gpu-memory", default="24GiB")
    steps.add_argument("--host-memory", default="90GiB")
    steps.set_defaults(run=run_steps, draw=plot_steps)
    for kind in (scheduling, steps):
        kind.add_argument("--json", type=Path, help="save all times here")
        kind.add_argument("--plot", type=Path, help="save curves here as PNG")
    options = parser.parse_args(arguments)
    found = options.run(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        options.draw(found, options.plot)


if __name__ == "__main__":
    main()
