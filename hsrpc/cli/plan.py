"""hsrpc plan: what would lie where, and how fast it would be, without loading weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config
from hsrpc.cli.terminal import print_error
from hsrpc.config import DeviceKind, EngineConfig
from hsrpc.errors import ConfigError

if TYPE_CHECKING:
    from hsrpc.engine.startup import Planned
    from hsrpc.plan.plan import Plan, StepPrediction

_EXAMPLES = """\
  hsrpc plan --model ./opt-13b --gpu-memory 20GiB --host-memory 96GiB
  hsrpc plan --model random:opt-30b --gpu-memory 24GiB --host-memory 96GiB --plot share.png
  hsrpc plan --model random:llama-3.3-70b --hardware h100                        no GPU is needed for it
  hsrpc plan --model random:qwen3-14b --hardware rtx4090 --host-memory 128GiB    with more memory than is assumed
  hsrpc plan --model ./opt-13b --hardware gpu1.json    as `hsrpc bench calibrate --save gpu1.json` measured there
  hsrpc plan --model ./opt-13b --json | jq .prediction
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "plan", "show the memory plan and the predicted throughput", _EXAMPLES)
    parser.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help="plan for another machine, opening no device: h100 or h200 (as measured once), a100, rtx4090 or rtx3090 "
        "(by their datasheets), or a file that `hsrpc bench calibrate --save` wrote there (default: this machine)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save throughput over activation share as PNG")
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    parser.add_argument(
        "--no-advice", action="store_true", help="do not plan again for what would make it faster, which takes seconds"
    )
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plan and print."""
    from hsrpc.cli.plan_report import Report
    from hsrpc.plan.advice import advise

    config = engine_config(options)
    planned = _planned(options, config)
    _tell_machine(options, planned)
    report = Report.of(planned)
    if not options.json:
        report.print()
    question, sizes, plan = planned.question, planned.planner.sizes, planned.plan
    advice = None if options.no_advice else advise(question, sizes, plan)
    if options.json:
        print(json.dumps(report.as_json(advice)))
    elif advice is not None:
        report.print_advice(advice)
    if options.plot:
        _plot(planned.planner.curve(), plan, planned.spec.name, options.plot)


def _planned(options: argparse.Namespace, config: EngineConfig) -> Planned:
    from hsrpc.engine.startup import make_plan, plan_for  # loads torch, which --help does not
    from hsrpc.plan.known_machines import find_machine

    if options.hardware is None:
        return make_plan(config)
    if config.device is not DeviceKind.AUTO:
        problem = f"has no meaning with --hardware {options.hardware}"
        raise ConfigError("device", config.device.value, problem, "leave one of them out")
    return plan_for(find_machine(options.hardware), config)


def _tell_machine(options: argparse.Namespace, planned: Planned) -> None:
    """What a reader might take for granted, and is not so."""
    from hsrpc.model.tensor import dtype_name

    machine, dtype = planned.question.machine, dtype_name(planned.spec.dtype)
    if options.hardware is None:
        if machine.kind is DeviceKind.CPU and options.device == DeviceKind.AUTO:
            print_error("hsrpc: no GPU here: planned for this CPU; --hardware h100, or another, plans for its machine")
    elif (dtype == "float32") != (machine.dtype == "float32"):
        print_error(f"hsrpc: rates of {machine.dtype} products, taken for {dtype}: compute will take another time")


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
