"""The planner against measurement: is its step time right, and is its choice the best?

    python -m benchmarks.planner_check grid --shape opt-6.7b --gpu-memory 24GiB --host-memory 100GiB --json grid.json
    python -m benchmarks.planner_check sweep --regime compute --json sweep.json --plot sweep.png
    python -m benchmarks.planner_check sweep --regime compute --json sweep.json --plot sweep.png --shares 0.65 0.7 0.75
    python -m benchmarks.planner_check sweep --over recompute --json part.json --plot part.png --shares 0 0.1 0.2 0.3

`grid` measures the planner's plan and forced ones: other batches, cache policies and resident shares, as far as they
fit and are predicted to be worth the time. `sweep` measures the planner's choice and activation shares, 0 to 1 in steps
of 0.1 or those given: bus-bound (float16, all on the host), compute-bound (float32, all on the host), or with a part of
the weights resident. `--over recompute` forces parts of the tokens to be recomputed in place of activation shares,
with activations for all others.

All requests have the same lengths, and only steps in which the whole batch decodes count. Predicted times are those for
the contexts that were really measured. The file is written after each cell; what it has already is not measured again,
and is drawn with the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.decoding import MIN_STEPS, Cell, cell_of, check_steps, observe_decoding
from benchmarks.planner_report import PLANNER, RECOMPUTE, draw_grid, draw_sweep, line_of, report
from hsrpc.cli.loop import run_loop
from hsrpc.config import CachePolicy, DType, EngineConfig, Placement
from hsrpc.engine.startup import make_plan
from hsrpc.errors import ConfigError
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.schedule.blocks import PoolId

SHARES = [tenth / 10 for tenth in range(11)]
SETTING = ("kind", "regime", "over", "shape", "dtype", "batch", "gpu_memory", "host_memory", "prompt", "output")
"""Options that all cells of a file have in common: by them their times can be compared."""
REGIMES = {
    "bus": (EngineConfig(model="random:opt-6.7b", dtype=DType.FLOAT16, placement=Placement.HOST), 64),
    "compute": (EngineConfig(model="random:opt-2.7b", dtype=DType.FLOAT32, placement=Placement.HOST), 64),
    "partly": (EngineConfig(model="random:opt-13b", dtype=DType.FLOAT16), 96),
}


def with_lengths(config: EngineConfig, options: argparse.Namespace) -> EngineConfig:
    """Config for requests that all have the same lengths and only decode: prompts are not what is measured."""
    context = options.prompt + options.output // 2
    return replace(
        config,
        device=options.device,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        expected_context=context,
        expected_output=2 * context,
        max_model_len=options.prompt + options.output,
    )


def sweep_configs(options: argparse.Namespace) -> list[tuple[str, EngineConfig]]:
    """The planner's choice, then the shares."""
    config, batch = REGIMES[options.regime]
    size = options.batch or batch
    config = replace(with_lengths(config, options), min_batch=size, max_batch=size)
    if options.shape:
        config = replace(config, model=RANDOM_PREFIX + options.shape)
    return [(PLANNER, config), *((name, replace(config, **forced)) for name, forced in _forced_shares(options))]


def _forced_shares(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for share in options.shares:
        if options.over == RECOMPUTE:
            yield f"{RECOMPUTE} {share}", {"cache_policy": CachePolicy.ACTIVATION, "recompute_share": share}
        else:
            yield f"share {share}", {"cache_policy": CachePolicy.HYBRID, "activation_share": share}


def grid_configs(options: argparse.Namespace, batch: int | None = None) -> list[tuple[str, EngineConfig]]:
    """The planner's choice, then forced plans that are predicted to be fast, of many kinds.

    Of each batch and kind of cache the fastest comes first, then the second fastest of each, and so on: plans that
    differ in little but their resident weights are as fast as each other. `batch` is the planner's, as measured before.
    """
    model = RANDOM_PREFIX + (options.shape or "opt-6.7b")
    config = with_lengths(EngineConfig(model=model, dtype=options.dtype), options)
    planned = make_plan(config)
    planner, best = planned.planner, planned.plan
    found: dict[str, tuple[float, str, EngineConfig, tuple[object, ...]]] = {}
    for name, forced in forced_configs(planner.config, batch or best.max_batch):
        try:
            plan = Planner(planner.sizes, planner.budgets, planner.hardware, forced).plan()
        except ConfigError:
            continue
        rate = plan.prediction.tokens_per_second
        if plan.max_batch == forced.max_batch and rate >= options.within * best.prediction.tokens_per_second:
            found.setdefault(signature(plan), (rate, name, forced, (plan.max_batch, plan.policy)))
    found.pop(signature(best), None)
    places: defaultdict[tuple[object, ...], int] = defaultdict(int, {(batch or best.max_batch, best.policy): 1})
    ranked = []
    for rate, name, forced, kind in sorted(found.values(), key=lambda item: -item[0]):
        ranked.append((places[kind], -rate, name, forced))
        places[kind] += 1
    ranked.sort(key=lambda item: item[:2])
    return [(PLANNER, config), *((name, forced) for _, _, name, forced in ranked[: options.cells])]


def forced_configs(config: EngineConfig, batch: int) -> Iterator[tuple[str, EngineConfig]]:
    """Batches around the planner's, every kind of cache, and weights from none to all on the device."""
    for size in sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch, 4 * batch}):
        for policy in (CachePolicy.AUTO, CachePolicy.KV, CachePolicy.ACTIVATION):
            for share in (None, 0.0, 0.25, 0.5, 0.75, 1.0):
                name = f"batch {size}, {policy}, resident {'planned' if share is None else share}"
                yield name, replace(config, min_batch=size, max_batch=size, cache_policy=policy, resident_share=share)
        yield f"batch {size}, host", replace(config, min_batch=size, max_batch=size, placement=Placement.HOST)


def signature(plan: Plan) -> str:
    """Alike for plans that do the same in all but details."""
    blocks = [round(plan.num_blocks[pool], -2) for pool in PoolId]
    return f"{plan.max_batch} {plan.resident_share:.2f} {blocks}"


async def measure(name: str, config: EngineConfig, options: argparse.Namespace) -> Cell:
    """One cell: the plan, and its step as predicted and measured; or why there is none."""
    return {"name": name} | await cell_of(_measure(config, options), options.seconds)


async def _measure(config: EngineConfig, options: argparse.Namespace) -> Cell:
    run = await observe_decoding(config, prompt=options.prompt, output=options.output, steps=options.steps)
    check_steps(run)
    steps, batch = run.chosen, run.plan.max_batch
    context = round(fmean(step.held_tokens for step in steps) / batch)
    predicted = predict_at(run.plan, run.spec.sizes, context)
    seconds = median(step.seconds for step in steps)
    return {
        "model": run.spec.name,
        "device": run.device,
        "plan": plan_summary(run.plan),
        "hardware": asdict(run.plan.hardware),
        "context": context,
        "num_steps": len(steps),
        "predicted": asdict(predicted),
        "recomputed_share": sum(step.recomputed_tokens for step in steps) / sum(step.held_tokens for step in steps),
        "step_seconds": seconds,
        "step_times": [step.seconds for step in steps],
        "predicted_over_measured": predicted.step / seconds,
        "tokens_per_second": batch / seconds,
        "preemptions": run.stats.preemptions,
        "loop_lag_p99": run.loop_lag_p99,
        "ready_seconds": run.ready_seconds,
    }


def plan_summary(plan: Plan) -> dict[str, object]:
    return {
        "policy": plan.policy,
        "batch": plan.max_batch,
        "activation_share": plan.activation_share,
        "resident_share": plan.resident_share,
        "num_blocks": {pool.name.lower(): count for pool, count in plan.num_blocks.items()},
        "rows": plan.buffers.rows,
        "max_prefill_tokens": plan.max_prefill_tokens,
        "device_bytes": sum(plan.device_bytes.values()),
        "host_bytes": sum(plan.host_bytes.values()),
        "reason": plan.reason,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a check."""
    options = parse(arguments)
    started = time.monotonic()
    setting = {name: getattr(options, name) for name in SETTING}
    cells = read_cells(options.json, setting)
    for name, config in todo(options, cells):
        if time.monotonic() - started > options.time:
            break
        cell = run_loop(measure(name, config, options)) | {"setting": setting}
        cells[:] = [each for each in cells if each["name"] != name] + [cell]
        options.json.write_text(json.dumps(cells, indent=1) + "\n")
        print(line_of(cell), flush=True)
    print()
    report(cells)
    drawn = [cell for cell in cells if "failure" not in cell]
    if options.plot and drawn:
        if options.kind == "grid":
            draw_grid(drawn, options.plot)
        else:
            draw_sweep(drawn, options.plot, over=options.over)


def read_cells(file: Path, setting: dict[str, Any]) -> list[Cell]:
    """What the file has.

    Raises:
        SystemExit: it was measured with another setting.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = json.loads(file.read_text()) if file.exists() else []
    for cell in cells:
        others = {name: value for name, value in cell.get("setting", setting).items() if value != setting[name]}
        if others:
            raise SystemExit(f"{file} was measured with {others}; give another file, or the same options")
    return cells


def todo(options: argparse.Namespace, cells: Sequence[Cell]) -> list[tuple[str, EngineConfig]]:
    """What is not measured yet: new cells first, then those that failed. A grid has no more cells than asked for."""
    measured = {cell["name"]: cell for cell in cells}
    if options.kind == "sweep":
        wanted = sweep_configs(options)
    elif len(measured) > options.cells and not any("failure" in cell for cell in cells):
        return []
    else:
        wanted = grid_configs(options, measured.get(PLANNER, {}).get("plan", {}).get("batch"))
    new = [each for each in wanted if each[0] not in measured]
    if options.kind == "grid":
        new = new[: options.cells + 1 - len(measured)]
    return new + [each for each in wanted if "failure" in measured.get(each[0], {})]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("grid", "sweep"))
    parser.add_argument("--regime", choices=tuple(REGIMES), default="bus", help="of a sweep")
    parser.add_argument("--over", choices=("activation", RECOMPUTE), default="activation", help="shares of a sweep")
    parser.add_argument("--shape", help="such as opt-13b")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, metavar="X", help="of a sweep (default: 0 to 1 by 0.1)"
    )
    parser.add_argument("--dtype", default="float16", help="of a grid")
    parser.add_argument("--batch", type=int, help="of a sweep, in place of the regime's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--host-memory", default="100GiB")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="decode steps measured in each cell")
    parser.add_argument("--cells", type=int, default=10, help="most forced plans of a grid")
    parser.add_argument(
        "--within", type=float, default=0.5, help="forced plans predicted slower than this part are left out"
    )
    parser.add_argument("--seconds", type=float, default=150, help="most that one cell takes")
    parser.add_argument("--time", type=float, default=3600, help="no cell is begun after this many seconds")
    parser.add_argument("--json", type=Path, required=True, help="all cells; goes on where it was interrupted")
    parser.add_argument("--plot", type=Path, help="save tokens/s here as PNG, measured and predicted")
    options = parser.parse_args(arguments)
    if options.steps < MIN_STEPS:
        parser.error(f"--steps {options.steps}: at least {MIN_STEPS} count as a measurement")
    return options


if __name__ == "__main__":
    main()
