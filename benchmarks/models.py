"""Sizes of every well-known shape, and what the planner would do with it on a machine that was measured before.

No GPU is needed: the rates are those of a calibration in `benchmarks/results`, and nothing is run. It takes minutes.

    python -m benchmarks.models
    python -m benchmarks.render    # writes the tables of docs/models.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import raw_results
from benchmarks.raw_results import RESULTS
from benchmarks.record import header, write_json
from hsrpc.config import DType, EngineConfig, format_bytes
from hsrpc.engine.startup import plan_for
from hsrpc.errors import ConfigError
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import ModelSpec
from hsrpc.model.shapes import RANDOM_PREFIX, SHAPES
from hsrpc.model.spec import DTYPES, named_spec
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.known_machines import KNOWN_MACHINES
from hsrpc.plan.plan import Plan
from hsrpc.schedule.blocks import BlockKind

PROGRAM = "python -m benchmarks.models"
FILE = RESULTS / "models/current.json"
MEASURED = ("guard/nvidia-h200", "planned-24gib")
"""The file of results and its case whose calibration is taken."""
GIB = 2**30
GPU_MEMORY = (24 * GIB, 80 * GIB)
HOST_MEMORY = 110 * GIB
DTYPE = DType.BFLOAT16


def measured_hardware() -> Hardware:
    """Rates of the machine, as they were measured."""
    file, case = MEASURED
    [cell] = [each for each in raw_results.read(file).result["cases"] if each["name"] == case]
    return Hardware(**cell["hardware"])


def sizes_of(spec: ModelSpec) -> dict[str, Any]:
    """What a model takes, whatever machine serves it."""
    sizes = spec.sizes
    return {
        "family": spec.family,
        "parameters": sum(tensor.numel for tensor in create_family(spec).all_tensors()),
        "weight_bytes": sizes.model_bytes,
        "context": sizes.context_length,
        "window": sizes.sliding_window,
        "kv_bytes": sizes.token_bytes(BlockKind.KV),
        "activation_bytes": sizes.token_bytes(BlockKind.ACTIVATION),
        "activation_ratio": sizes.activation_ratio,
    }


def plan_of(name: str, gpu_memory: int, host_memory: int, hardware: Hardware) -> dict[str, Any]:
    """What `hsrpc plan` would say on that machine, its settings left as they are; or why no plan fits."""
    machine = replace(KNOWN_MACHINES["h200"], hardware=hardware)
    config = EngineConfig(model=RANDOM_PREFIX + name, dtype=DTYPE, gpu_memory=gpu_memory, host_memory=host_memory)
    try:
        plan = plan_for(machine, config).plan
    except ConfigError as error:
        return {"gpu_memory": gpu_memory, "refused": str(error)}
    return {"gpu_memory": gpu_memory, "plan": _facts(plan)}


def _facts(plan: Plan) -> dict[str, Any]:
    step = plan.prediction
    return {
        "policy": plan.policy.value,
        "reason": plan.reason,
        "activation_share": plan.activation_share,
        "recomputed_share": plan.recompute.tokens / (step.batch * step.context) if plan.recompute.tokens else 0.0,
        "resident_share": plan.resident_share,
        "codes_weights": plan.decode_buffer_bytes > 0,
        "batch": step.batch,
        "context": step.context,
        "max_model_len": plan.max_model_len,
        "step_seconds": step.step,
        "tokens_per_second": step.tokens_per_second,
        "mean_tokens_per_second": step.mean_tokens_per_second,
    }


def describe(name: str, hardware: Hardware) -> dict[str, Any]:
    """A shape's sizes, and its plan for each size of GPU memory."""
    spec = named_spec(name, DTYPES[DTYPE])
    plans = [plan_of(name, memory, HOST_MEMORY, hardware) for memory in GPU_MEMORY]
    return {"name": name, **sizes_of(spec), "plans": plans}


def _line(entry: dict[str, Any]) -> str:
    cells = [
        f"{each['plan']['mean_tokens_per_second']:.0f} tokens/s" if "plan" in each else "does not fit"
        for each in entry["plans"]
    ]
    return f"{entry['name']}: {format_bytes(entry['weight_bytes'])}; {', '.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan for all shapes and write the file. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="sizes and plans of all well-known shapes")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="this one alone; may be repeated")
    parser.add_argument("--json", type=Path, default=FILE, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--commit", help="of a copy of the sources without their history")
    options = parser.parse_args(words)
    origin = header([*PROGRAM.split(), *words], commit=options.commit)
    hardware, names, models = measured_hardware(), options.shape or list(SHAPES), []
    for number, name in enumerate(names, 1):
        models.append(describe(name, hardware))
        print(f"{number} of {len(names)}: {_line(models[-1])}", flush=True)
    machine = {"file": MEASURED[0], "case": MEASURED[1], "rates": asdict(hardware)}
    content = {"header": origin, "machine": machine, "host_memory": HOST_MEMORY, "models": models}
    write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
