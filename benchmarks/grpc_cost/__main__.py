"""What streaming through gRPC costs: the same requests on one engine, embedded and through its server, by turns.

The clients are on the loopback, in processes of their own. All requests start together. Tokens/s are new tokens over
the time from the first request to the last token, prompts included. A step is full when all requests decode in it: what
those give is what a server sees whose requests come and go. The first run of each way is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.grpc_cost.measure import Cost, Load, OpenEngine, Way, measure_cost
from benchmarks.grpc_cost.pretend_engine import PretendedStep, PretendEngine
from hsrpc.cli.loop import run_loop
from hsrpc.cli.options import Parser, add_engine_options, engine_config
from hsrpc.engine.engine import Engine
from hsrpc.errors import HsrpcError

MAX_COST = 0.02
"""Share of the embedded throughput that gRPC may cost."""
MAX_LAG = 0.01
"""Seconds, 99th percentile of the event loop's lag."""
_EXAMPLES = """\
examples:
  python -m benchmarks.grpc_cost --model random:opt-1.3b --requests 64 --prompt 128 --output 1024 --json cost.json
  python -m benchmarks.grpc_cost --model random:opt-1.3b --clients 4 --max-message-delay 0.02
  python -m benchmarks.grpc_cost --pretend 0.0044 0.003      such a model's steps, without a GPU
  python -m benchmarks.grpc_cost --device cpu --requests 8 --prompt 16 --output 64      the bundled model
"""


def print_cost(cost: Cost) -> None:
    """A row a way, of medians, and what they come to."""
    columns = ("tokens/s", "in full steps", "step", "lag p99", "cores", "the loop's", "CPU/1,000 tokens", "messages")
    table = Table("", *columns)
    for way in Way:
        table.add_row(
            way,
            f"{cost.median(way, 'tokens_per_second'):,.0f}",
            f"{cost.median(way, 'full_tokens_per_second'):,.0f}",
            f"{cost.median(way, 'step_seconds') * 1e3:.2f} ms",
            f"{cost.median(way, 'loop_lag_p99') * 1e3:.1f} ms",
            f"{cost.median(way, 'cores'):.2f}",
            f"{cost.median(way, 'loop_cores'):.2f}",
            f"{cost.median(way, 'cpu_seconds') * 1e3:.1f} ms",
            f"{cost.median(way, 'messages'):,.0f}",
        )
    Console(width=120).print(f"{cost.model}, {cost.device}", table)
    whole, full = (1 - cost.ratio(name) for name in ("tokens_per_second", "full_tokens_per_second"))
    lag = cost.median(Way.GRPC, "loop_lag_p99")
    print(f"gRPC costs {whole:.1%} of the embedded tokens/s, {full:.1%} in full steps (goal: at most {MAX_COST:.0%})")
    print(f"lag of the event loop beside it, p99: {lag * 1e3:.1f} ms (goal: at most {MAX_LAG * 1e3:.0f} ms)")


def save_cost(cost: Cost, file: Path) -> None:
    """Every sample, and the ratios of throughput."""
    ratios = {f"{name}_ratio": cost.ratio(name) for name in ("tokens_per_second", "full_tokens_per_second")}
    file.write_text(json.dumps(asdict(cost) | ratios, indent=1) + "\n")


def make_parser() -> Parser:
    parser = Parser(
        prog="grpc_cost", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    load = parser.add_argument_group("load")
    for name, default, text in (
        ("requests", 64, "that start together"),
        ("prompt", 128, "prompt tokens of a request"),
        ("output", 512, "output tokens of a request"),
        ("clients", 1, "processes that the requests come from"),
        ("repeats", 5, "of each way"),
    ):
        load.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"{text} (default: {default})")
    load.add_argument(
        "--max-message-delay", type=_seconds, metavar="SECONDS", help="that clients ask for (default: the server's own)"
    )
    load.add_argument(
        "--pretend",
        type=_seconds,
        nargs=2,
        metavar=("DEVICE", "HOST"),
        help="no model: steps of so many seconds on a device, with so many of Python beside, half of them on the loop",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that was measured")
    add_engine_options(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not do; give 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give seconds, 0 or more")
    return seconds


def _opening(options: argparse.Namespace, load: Load) -> OpenEngine:
    """The engine of the options, planned for the load where they leave that open.

    Raises:
        ConfigError: a setting is wrong.
    """
    if options.pretend:
        step = PretendedStep(*options.pretend)
        return lambda observe: PretendEngine(step, load.requests, observe)
    config = engine_config(options)
    planned = replace(
        config,
        min_batch=config.max_batch or load.requests,
        max_batch=config.max_batch or load.requests,
        max_model_len=config.max_model_len or load.prompt + load.output,
        expected_context=config.expected_context or load.prompt + load.output // 2,
        expected_output=config.expected_output or load.output,
    )
    return lambda observe: Engine(planned, observe=observe)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save; 1 is a failure that its message explains, 2 a wrong use."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.clients > options.requests:
        parser.error(f"--clients {options.clients}: more than --requests {options.requests}; give each a request")
    load = Load(**{field.name: getattr(options, field.name) for field in fields(Load)})
    if options.json:
        options.json.absolute().parent.mkdir(parents=True, exist_ok=True)

    def note(cost: Cost) -> None:
        """What is there is kept, whatever comes."""
        rates = ", ".join(f"{sample.way} {sample.full_tokens_per_second:,.0f}" for sample in cost.samples[-len(Way) :])
        print(f"{len(cost.samples) // len(Way)} of {options.repeats}: {rates} tokens/s in full steps", flush=True)
        if options.json:
            save_cost(cost, options.json)

    try:
        cost = run_loop(measure_cost(_opening(options, load), load, options.repeats, note))
    except HsrpcError as error:
        print(f"grpc_cost: error: {error}", file=sys.stderr)
        return 1
    print_cost(cost)
    return 0


if __name__ == "__main__":
    sys.exit(main())
