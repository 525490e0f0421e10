"""How often an expert that a step needs lies on the device, by the slots that each layer has, beside their share.

    python -m benchmarks.expert_cache --json experts.json

A model of random weights, of SmolLM's widths, decodes random prompts on the CPU. Beside it are the same slots under
choices drawn alike, as the planner assumes them: they hit as often as the slots' share of the experts says.

What this does not show is how a trained router hits. In a model of random weights the hidden states of all tokens have
much in common, so that its router prefers the same experts throughout. Trained routers are made to use all experts
alike over many texts, and come back to those of the tokens before, of the subject and of the language within one:
`hsrpc bench decode` measures a model's own rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import header, write_json
from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.config import DeviceKind, EngineConfig, ExpertLoading
from hsrpc.engine.engine import Engine
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.roofline import StepRecord
from hsrpc.plan.sizes import ExpertSizes
from hsrpc.request import SamplingParams
from hsrpc.schedule.expert_slots import ExpertSlots

SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "moe_intermediate_size": 192,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}
_WARM_UP = 8
"""Decode steps that fill the slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Decode steps with one number of slots, and one of requests at once."""

    batch: int
    slots: int
    slot_share: float
    """Slots over experts."""
    hit_rate: float
    drawn_hit_rate: float
    """The rate of choices that are drawn, all experts being as likely."""
    loads: float
    """Experts loaded in a step, a layer, on average."""
    expected_loads: float
    """As the planner expects them."""
    num_steps: int


def with_slots(slots: int) -> Callable[[Planner], Plan]:
    """The planner's plan, but for the number of slots."""

    def choose(planner: Planner) -> Plan:
        plan = planner.plan()
        assert plan.demand is not None  # the configuration asks for it
        demand = replace(plan.demand, slots=slots)
        return replace(plan, demand=demand, device_bytes=plan.device_bytes | {DeviceUse.EXPERTS: demand.device_bytes})

    return choose


async def measure(model: Path, batch: int, slots: int, prompt: int, steps: int) -> Cell:
    """Steps in which all of `batch` requests decode."""
    records: list[StepRecord] = []
    config = EngineConfig(
        model=f"{RANDOM_PREFIX}{model}",
        device=DeviceKind.CPU,
        experts=ExpertLoading.DEMAND,
        min_batch=batch,
        max_batch=batch,
        max_model_len=prompt + steps + _WARM_UP + batch + 2,
    )
    async with Engine(config, observe=records.append, choose_plan=with_slots(slots)) as engine:
        work = make_workload(Lengths.UNIFORM, count=batch, prompt=prompt, output=1, vocab_size=engine.spec.vocab_size)
        output = steps + _WARM_UP + batch + 1  # prompts may take some steps more
        await asyncio.gather(*(_generate(engine, ids, output, seed) for seed, ids in enumerate(work.prompts)))
        plan, sizes = engine.plan, engine.spec.sizes
    whole = [step for step in records if step.prefill_tokens == 0 and step.decode_tokens == batch][_WARM_UP:]
    hits, loads = (sum(getattr(step, name) for step in whole) for name in ("expert_hits", "expert_loads"))
    assert plan.demand is not None
    experts = sizes.commonest.experts
    assert experts is not None  # the shape has some in every layer
    return Cell(
        batch=batch,
        slots=slots,
        slot_share=plan.demand.hit_rate,
        hit_rate=hits / (hits + loads),
        drawn_hit_rate=drawn_hit_rate(experts, batch, slots, len(whole)),
        loads=loads / len(whole) / sizes.num_layers,
        expected_loads=float(experts.touched(batch)) * plan.demand.missed,
        num_steps=len(whole),
    )


def drawn_hit_rate(experts: ExpertSizes, batch: int, num_slots: int, steps: int) -> float:
    """The hit rate of as many steps in which each token takes any experts."""
    rng, slots, hits, needed = np.random.default_rng(0), ExpertSlots(num_slots), 0, 0
    for number in range(_WARM_UP + steps):
        chosen = {e for _ in range(batch) for e in rng.choice(experts.count, experts.k, replace=False).tolist()}
        loads = slots.bring(sorted(chosen))
        if number >= _WARM_UP:
            hits, needed = hits + len(chosen) - len(loads), needed + len(chosen)
    return hits / needed


async def _generate(engine: Engine, prompt: Sequence[int], output: int, seed: int) -> None:
    """Tokens are drawn: the most likely ones of a random model soon repeat themselves, and with them its experts."""
    params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, seed=seed)
    async for _ in engine.generate(prompt, params):
        pass


def print_cells(cells: Sequence[Cell]) -> None:
    """One line each."""
    table = Table("requests", "slots", "slots / experts", "hits", "if drawn", "loads a layer", "expected")
    for cell in cells:
        table.add_row(
            str(cell.batch),
            str(cell.slots),
            f"{cell.slot_share:.0%}",
            f"{cell.hit_rate:.1%}",
            f"{cell.drawn_hit_rate:.1%}",
            f"{cell.loads:.2f}",
            f"{cell.expected_loads:.2f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, metavar="FILE", help="a config.json in place of the built-in one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="N", help="requests at once")
    parser.add_argument("--slots", type=int, nargs="+", metavar="N", help="of each layer (default: eighths of all)")
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens (default: 64)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps measured (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save what was measured")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = options.shape or Path(folder) / "config.json"
        if options.shape is None:
            file.write_text(json.dumps(SHAPE))
        shape = json.loads(file.read_text())
        count = shape["num_experts"]
        all_slots = options.slots or sorted({0, 1, *(count * i // 8 for i in range(1, 9))})
        cells = [
            asyncio.run(measure(file, batch, slots, options.prompt, options.steps))
            for batch in options.batch
            for slots in all_slots
        ]
    print_cells(cells)
    print("a model of random weights: how often a trained router repeats its experts is not shown")
    if options.json:
        command = ["python", "-m", "benchmarks.expert_cache", *(sys.argv[1:] if arguments is None else arguments)]
        write_json(options.json, {"header": header(command), "shape": shape, "cells": [asdict(each) for each in cells]})


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
