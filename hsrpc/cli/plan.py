"""hsrpc plan: what would lie where, and how fast it would be, without loading weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config
from hsrpc.config import format_bytes, format_rate
from hsrpc.errors import ConfigError
from hsrpc.schedule.blocks import PoolId

if TYPE_CHECKING:
    from rich.table import Table

    from hsrpc.model.family import ModelSpec
    from hsrpc.plan.memory_use import DeviceUse, HostUse
    from hsrpc.plan.plan import Plan, StepPrediction

_EXAMPLES = """\
  hsrpc plan --model ./opt-13b --gpu-memory 20GiB --host-memory 96GiB
  hsrpc plan --model random:opt-30b --gpu-memory 24GiB --host-memory 96GiB --plot share.png
  hsrpc plan --model ./opt-13b --json | jq .prediction
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "plan", "show the memory plan and the predicted throughput", _EXAMPLES)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save throughput over activation share as PNG")
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plan and print."""
    from hsrpc.engine.startup import make_plan  # loads torch, which --help does not

    planned = make_plan(engine_config(options))
    plan = planned.plan
    if options.json:
        print(json.dumps(_as_json(planned.spec, plan)))
    else:
        _print(planned.spec, plan, planned.question.machine.name)
    if options.plot:
        _plot(planned.planner.curve(), plan, planned.spec.name, options.plot)


def _print(spec: ModelSpec, plan: Plan, device: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(
        f"[bold]{spec.name}[/] ({spec.family}) on {device}: {format_bytes(spec.sizes.model_bytes)} of weights"
    )
    console.print(f"cache policy [bold]{plan.policy}[/]: {plan.reason}")
    console.print(_memory_table("device memory", plan.device_bytes, plan.budgets.device))
    console.print(_memory_table("host memory", plan.host_bytes, plan.budgets.host))
    console.print(_blocks_table(plan))
    console.print(_prediction_table(plan))


def _memory_table(title: str, parts: Mapping[DeviceUse, int] | Mapping[HostUse, int], budget: int) -> Table:
    table = _table(title, "", "size")
    for use, size in parts.items():
        table.add_row(use.value, format_bytes(size))
    table.add_section()
    table.add_row("all", format_bytes(sum(parts.values())))
    table.add_row("budget", format_bytes(budget))
    return table


def _blocks_table(plan: Plan) -> Table:
    table = _table(f"cache blocks of {plan.block_size} tokens", "", "device", "host")
    counts = plan.num_blocks
    table.add_row("K and V", str(counts[PoolId.DEVICE_KV]), str(counts[PoolId.HOST_KV]))
    table.add_row("activations", str(counts[PoolId.DEVICE_ACTIVATION]), str(counts[PoolId.HOST_ACTIVATION]))
    return table


def _prediction_table(plan: Plan) -> Table:
    step, hardware = plan.prediction, plan.hardware
    table = _table("a decode step, predicted", "", "")
    rows = {
        "longest request, tokens": str(plan.max_model_len),
        "requests, tokens of each": f"{step.batch}, {step.context}",
        "mini-batches": str(step.mini_batches),
        "activation share": f"{plan.activation_share:.2f}",
        "tokens recomputed": str(plan.recompute.tokens),
        "weights resident": f"{plan.resident_share:.0%}",
        "weights that stream": "coded" if plan.decode_buffer_bytes else "as they are",
        f"bus ({format_rate(hardware.load_bandwidth, 'B/s')})": _ms(step.bus),
        "forward": _ms(step.forward),
        f"regeneration ({format_rate(hardware.gemm_rate, 'FLOP/s')})": _ms(step.regenerate),
        "gathering activations": _ms(step.gather),
        f"attention ({format_rate(hardware.attention_bandwidth, 'B/s')})": _ms(step.attention),
        "logits": _ms(step.head),
        "launching, on the host": _ms(step.launch),
        "between steps": _ms(step.boundary),
        "step": _ms(step.step),
        f"step beside {plan.max_prefill_tokens} prompt tokens": _ms(step.longest_step),
        "mean step, prompts coming in": _ms(step.mean_step),
        "throughput": f"{step.tokens_per_second:.1f} tokens/s",
        "throughput, prompts coming in": f"{step.mean_tokens_per_second:.1f} tokens/s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", min_width=48, show_header=any(columns))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _as_json(spec: ModelSpec, plan: Plan) -> dict[str, object]:
    step = plan.prediction
    return {
        "model": spec.name,
        "policy": plan.policy,
        "reason": plan.reason,
        "activation_share": plan.activation_share,
        "recomputed_tokens": plan.recompute.tokens,
        "resident_share": plan.resident_share,
        "max_batch": plan.max_batch,
        "max_model_len": plan.max_model_len,
        "device_bytes": {use.value: size for use, size in plan.device_bytes.items()},
        "host_bytes": {use.value: size for use, size in plan.host_bytes.items()},
        "budgets": {"device": plan.budgets.device, "host": plan.budgets.host},
        "num_blocks": {pool.name.lower(): count for pool, count in plan.num_blocks.items()},
        "max_prefill_tokens": plan.max_prefill_tokens,
        "spare_prefill_tokens": plan.spare_prefill_tokens,
        "max_idle_prefill_tokens": plan.max_idle_prefill_tokens,
        "prediction": _prediction_json(step),
        "hardware": asdict(plan.hardware),
    }


def _prediction_json(step: StepPrediction) -> dict[str, float]:
    """Counts and tokens as they are, times in seconds."""
    counts = {"batch", "context", "mini_batches"}
    parts = {name if name in counts else f"{name}_seconds": value for name, value in asdict(step).items()}
    return parts | {
        "gpu_seconds": step.gpu,
        "tokens_per_second": step.tokens_per_second,
        "mean_tokens_per_second": step.mean_tokens_per_second,
    }


def _plot(curve: Sequence[tuple[float, StepPrediction]], plan: Plan, name: str, file: Path) -> None:
    import matplotlib as mpl  # the extra `plot`

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(
        [share for share, _ in curve], [step.mean_tokens_per_second for _, step in curve], marker="o", markersize=4
    )
    axes.axvline(plan.activation_share, linestyle="--", color="gray", label=f"chosen: {plan.activation_share:.2f}")
    axes.set(xlabel="activation share of cached tokens", ylabel="tokens/s, predicted", title=f"{name}: throughput")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise ConfigError("plot", str(file), f"cannot be written ({error.strerror})", "give another file") from None
    print(f"saved {file}", file=sys.stderr)
