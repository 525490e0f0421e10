"""python -m benchmarks.peers: hsrpc beside FlexGen, transformers, vLLM and llama.cpp."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.cases import ALL_MODELS, Budgets, Case, Setup, System
from benchmarks.peers.cells import Cell, all_cells, engines, estimated_seconds, setups_of
from benchmarks.peers.vllm_plan import VLLM_OFFLOADS, vllm_setups
from hsrpc.config import parse_bytes

_EXAMPLES = """\
examples, from the root of the repository:
  python -m benchmarks.peers estimate
  python -m benchmarks.peers run --case host --model opt-6.7b --system flexgen --file peers.json --time 560
  python -m benchmarks.peers run --case budget --model opt-13b --system flexgen --file peers.json \\
      --percent 55 45 100 0 100 0 --batch 16
  python -m benchmarks.peers run --case resident --file peers.json
  python -m benchmarks.peers run --model llama-2-13b --file peers.json      beside vLLM, without and with a prefix
  python -m benchmarks.peers run --model gpt-oss-20b:mxfp4 --file peers.json           beside llama.cpp
  python -m benchmarks.peers run --file peers.json             all cells; goes on where it was interrupted
  python -m benchmarks.peers report peers.json --json report.json --plot report.png
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Measure hsrpc and its peers on one machine within the same budgets.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="measure cells, each setup in a process of its own")
    _add_cell_options(run)
    run.add_argument("--file", type=Path, required=True, help="JSON that each record is added to as it is measured")
    run.add_argument("--time", type=float, default=86400.0, metavar="SECONDS", help="start nothing that takes longer")
    run.add_argument(
        "--limit", type=float, default=400.0, metavar="SECONDS", help="that one setup may take (default: 400)"
    )
    run.set_defaults(run=_run)
    estimate = commands.add_parser("estimate", help="the setups of the cells, and about how long each takes")
    _add_cell_options(estimate)
    estimate.set_defaults(run=_estimate)
    report = commands.add_parser("report", help="tables, ratios and a plot of what was measured")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE")
    report.add_argument("--json", type=Path, metavar="FILE", help="save best setups, ratios and all records")
    report.add_argument("--plot", type=Path, metavar="FILE", help="save total throughputs as PNG")
    report.set_defaults(run=_report)
    one = commands.add_parser("one", help="measure setups, given as JSON, in this process (what `run` starts)")
    one.add_argument("setups")
    one.add_argument("file", type=Path)
    one.set_defaults(run=_one)
    return parser


def _add_cell_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", type=Case, choices=list(Case), nargs="+", default=list(Case), help="default: all")
    parser.add_argument("--model", choices=ALL_MODELS, nargs="+", default=list(ALL_MODELS), help="default: all")
    parser.add_argument(
        "--system", type=System, choices=list(System), nargs="+", default=list(System), help="default: all"
    )
    parser.add_argument("--gpu-memory", default="24GiB", metavar="SIZE", help="device budget (default: 24GiB)")
    parser.add_argument("--host-memory", default="108GiB", metavar="SIZE", help="host budget (default: 108GiB)")
    parser.add_argument("--candidates", type=int, default=6, metavar="N", help="FlexGen setups to try (default: 6)")
    parser.add_argument(
        "--screen-steps", type=int, default=6, metavar="N", help="tokens that each is tried for (default: 6)"
    )
    parser.add_argument(
        "--final-steps",
        type=int,
        metavar="N",
        help="tokens that the best is measured for, the rest projected (default: all)",
    )

    parser.add_argument(
        "--percent", type=int, nargs=6, metavar="N", help="the one FlexGen setup to measure: its six percentages"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="of that setup (default: as in the best one offered)")
    parser.add_argument("--num-batches", type=int, default=1, metavar="N", help="GPU batches of it (default: 1)")
    parser.add_argument(
        "--offload",
        type=_offload,
        nargs="+",
        default=VLLM_OFFLOADS,
        metavar="G/N/A",
        help="vLLM: N layers of each G on the host, A loaded ahead (default: 1/1/2 4/3/2 2/1/1)",
    )
    parser.add_argument(
        "--fill",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="X",
        help="vLLM: requests, as multiples of what its cache has room for at once (default: 1)",
    )
    parser.add_argument(
        "--workspace",
        default="2GiB",
        metavar="SIZE",
        help="vLLM: device memory of a step of 8192 tokens; more where it runs out of memory (default: 2GiB)",
    )
    parser.add_argument("--drafts", type=int, default=0, metavar="N", help="vLLM: tokens of an n-gram draft")


def _offload(text: str) -> tuple[int, ...]:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 4/3/2: layers of a group, on the host, loaded ahead")
    return tuple(map(int, parts))


def _budgets(options: argparse.Namespace) -> Budgets:
    return Budgets(
        device=parse_bytes(options.gpu_memory, "gpu_memory"), host=parse_bytes(options.host_memory, "host_memory")
    )


def _setups(cell: Cell, options: argparse.Namespace) -> list[Setup]:
    """Those of the cell, or the one FlexGen setup that the flags give."""
    setups = setups_of(cell, _budgets(options), options.candidates)
    if cell.system is System.VLLM:
        setup = replace(setups[0], drafts=options.drafts, workspace=parse_bytes(options.workspace, "workspace"))
        return vllm_setups(setup, options.offload, options.fill)
    if cell.system is not System.FLEXGEN or options.percent is None:
        return setups
    num_batches = options.num_batches
    batch = options.batch or setups[0].batch or num_batches
    if batch % num_batches:
        raise SystemExit(f"--batch {batch} is not a multiple of --num-batches {num_batches}; change one of them")
    return [replace(setups[0], percent=tuple(options.percent), batch=batch, num_batches=num_batches)]


def _run(options: argparse.Namespace) -> None:
    from benchmarks.peers.drive import Driver, run_child

    options.file.absolute().parent.mkdir(parents=True, exist_ok=True)
    driver = Driver(
        file=options.file,
        measure=run_child,
        say=lambda text: print(text, flush=True),
        deadline=time.monotonic() + options.time,
        limit=options.limit,
    )
    cells = all_cells(options.case, options.model, options.system)
    for cell in cells:
        if cell.system is System.FLEXGEN:
            driver.run_best(_setups(cell, options), options.screen_steps, options.final_steps)
    others = [setup for cell in cells if cell.system is not System.FLEXGEN for setup in _setups(cell, options)]
    for setups in engines(others):
        driver.run_engine(setups)


def _estimate(options: argparse.Namespace) -> None:
    for cell in all_cells(options.case, options.model, options.system):
        setups = _setups(cell, options)
        if cell.system is System.FLEXGEN:
            tried = setups if len(setups) > 1 else []
            final = replace(setups[0], steps=options.final_steps)
            setups = [*(replace(setup, steps=options.screen_steps) for setup in tried), final]
        seconds = sum(estimated_seconds(*group) for group in engines(setups))
        print(f"{cell.case} {cell.model} {cell.system}: {seconds:.0f} s")
        for setup in setups:
            print(f"  {estimated_seconds(setup):4.0f} s  {setup.key}")


def _report(options: argparse.Namespace) -> None:
    from benchmarks.peers.record import read_records
    from benchmarks.peers.report import plot_report, print_report, save_report

    records = [record for file in options.files for record in read_records(file)]
    if not records:
        raise SystemExit(f"nothing was measured in {', '.join(map(str, options.files))}; check the names")
    print_report(records)
    if options.json:
        save_report(records, options.json)
    if options.plot and any(record.outcome for record in records):
        plot_report(records, options.plot)


def _one(options: argparse.Namespace) -> None:
    from benchmarks.peers.one import run_one

    run_one(options.setups, options.file)


if __name__ == "__main__":
    main()
