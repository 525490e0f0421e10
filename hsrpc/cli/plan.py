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
from hsrpc.config import DeviceKind, EngineConfig, parse_bytes
from hsrpc.errors import ConfigError

if TYPE_CHECKING:
    from hsrpc.engine.startup import Planned
    from hsrpc.plan.plan import Plan, StepPrediction

MANIFESTS = "k8s"
"""Folder of the Kubernetes manifests in a checkout."""
READ_RATE = "200MB"
"""Bytes a second that a volume on a network is taken to give."""
_EXAMPLES = """\
  hsrpc plan --model ./opt-13b --gpu-memory 20GiB --host-memory 96GiB
  hsrpc plan --model random:opt-30b --gpu-memory 24GiB --host-memory 96GiB --plot share.png
  hsrpc plan --model random:llama-3.3-70b --hardware h100                        no GPU is needed for it
  hsrpc plan --model random:qwen3-14b --hardware rtx4090 --host-memory 128GiB    with more memory than is assumed
  hsrpc plan --model ./opt-13b --hardware gpu1.json    as `hsrpc bench calibrate --save gpu1.json` measured there
  hsrpc plan --model ./opt-13b --json | jq .prediction
  hsrpc plan --model ./opt-13b --hardware h100 --kubernetes --output deploy    and then: kubectl apply -k deploy
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
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print one object instead of tables")
    forms.add_argument(
        "--kubernetes",
        action="store_true",
        help="print an overlay of hsrpc's manifests in place of tables, with which a pod makes this plan: flags, "
        "memory, GPU, and the startup probe's patience",
    )
    parser.add_argument(
        "--no-advice", action="store_true", help="do not plan again for what would make it faster, which takes seconds"
    )
    kubernetes = parser.add_argument_group("with --kubernetes")
    kubernetes.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write the overlay into this folder, for kubectl apply -k (default: to standard output, for a folder "
        "beside the manifests' own overlays)",
    )
    kubernetes.add_argument(
        "--manifests",
        metavar="DIR|URL",
        help=f"hsrpc's manifests, as a folder or as kustomize takes them from elsewhere (default: {MANIFESTS})",
    )
    kubernetes.add_argument(
        "--read-rate",
        metavar="SIZE",
        help=f"bytes a second that the model's volume gives, for the startup probe (default: {READ_RATE})",
    )
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plan and print."""
    from hsrpc.cli.plan_report import Report
    from hsrpc.plan.advice import advise

    config = engine_config(options)
    if options.kubernetes:
        _print_overlay(options, config)
        return
    _refuse_without_kubernetes(options)
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


def _refuse_without_kubernetes(options: argparse.Namespace) -> None:
    for name in ("output", "manifests", "read_rate"):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(name, str(value), "has no meaning without --kubernetes", "give both, or neither")


def _print_overlay(options: argparse.Namespace, config: EngineConfig) -> None:
    """Plan with budgets that read well as flags, and print or write the overlay that gives a pod the same."""
    from hsrpc.cli.plan_kubernetes import Overlay, check_movable, in_whole_mib, seen_from, write
    from hsrpc.engine.startup import plan_for

    check_movable(config)
    read_rate = parse_bytes(options.read_rate or READ_RATE, "read_rate")
    folder, manifests = options.output, options.manifests or MANIFESTS
    manifests = seen_from(folder or Path(manifests, "overlays/plan"), manifests)
    planned = _planned(options, config)
    _tell_machine(options, planned)
    exact = in_whole_mib(config, planned)
    overlay = Overlay(plan_for(planned.question.machine, exact), exact, read_rate, manifests)
    if folder is None:
        print(overlay.text(), end="")
    else:
        print(f"saved {write(overlay.text(), folder)}; next: kubectl apply -k {folder}", file=sys.stderr)
    if options.plot:
        _plot(planned.planner.curve(), overlay.planned.plan, planned.spec.name, options.plot)


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
