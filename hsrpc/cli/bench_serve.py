"""hsrpc bench serve, hsrpc bench frontend: load through gRPC."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.cli.connection import ConnectionSettings, add_connection_options, connection_settings
from hsrpc.cli.options import MEASURED_TIME, Commands, add_command, check_folders

if TYPE_CHECKING:
    from hsrpc.bench.load import Arrival, Mix, Outcome
    from hsrpc.bench.load_report import Goal, LoadSummary
    from hsrpc.client import AsyncClient

_READY_SECONDS = 600.0
_SERVE_EXAMPLES = """\
  hsrpc bench serve --rate 4 --duration 30                      the bundled model, in a server of its own
  hsrpc bench serve --target gpu1:50051 --rate 2 --prompt 512 --output 128 --json load.json --plot load.png
  hsrpc bench serve --rate 1 --first-token-goal 0.5 -- --model ./opt-13b --gpu-memory 20GiB
"""
_FRONTEND_EXAMPLES = """\
  hsrpc bench frontend                           1, 64 and 256 streams, merged and not
  hsrpc bench frontend --streams 16 128 --seconds 2 --json frontend.json --plot frontend.png
"""


def add_serve_parser(kinds: Commands) -> None:
    parser = add_command(kinds, "serve", "open-loop Poisson load through gRPC", _SERVE_EXAMPLES)
    parser.add_argument(
        "server", nargs="*", metavar="SERVER_OPTION", help="of the server that is started: `-- --model DIR ...`"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=_positive, default=2.0, metavar="X", help="requests per second (default: 2)")
    load.add_argument("--duration", type=MEASURED_TIME, default=30.0, metavar="SECONDS", help="default: 30")
    load.add_argument("--prompt", type=int, default=64, metavar="N", help="prompt tokens of a request (default: 64)")
    load.add_argument("--output", type=int, default=64, metavar="N", help="output tokens of a request (default: 64)")
    load.add_argument(
        "--lengths", choices=("uniform", "sharegpt-like"), default="sharegpt-like", help="default: sharegpt-like"
    )
    load.add_argument("--cancel-share", type=_share, default=0.0, metavar="X", help="cancelled by the client")
    load.add_argument("--load-seed", type=int, default=0, metavar="N", help="same seed, same load (default: 0)")
    goal = parser.add_argument_group("goal, for goodput")
    goal.add_argument("--first-token-goal", type=MEASURED_TIME, metavar="SECONDS", help="from the scheduled send time")
    goal.add_argument("--inter-token-goal", type=MEASURED_TIME, metavar="SECONDS", help="on average over a request")
    _add_files(parser)
    add_connection_options(parser, target=None, target_help="a server that is started for it")
    parser.set_defaults(run=run_serve)


def add_frontend_parser(kinds: Commands) -> None:
    parser = add_command(
        kinds, "frontend", "what the server can send, over an engine that costs nothing", _FRONTEND_EXAMPLES
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256], metavar="N", help="default: 1 64 256")
    parser.add_argument(
        "--seconds", type=MEASURED_TIME, default=1.0, metavar="SECONDS", help="of each trial (default: 1)"
    )
    _add_files(parser)
    parser.set_defaults(run=run_frontend)


def run_serve(options: argparse.Namespace) -> None:
    """Load a server; print and save what came of it."""
    import uvloop

    from hsrpc.bench.load_report import Goal, plot_load, print_load, save_load
    from hsrpc.bench.process import ServerProcess

    check_folders(options, "json", "plot")
    connection = connection_settings(options)
    goal = Goal(first_token=options.first_token_goal, inter_token=options.inter_token_goal)
    with ExitStack() as stack:
        target = options.target or stack.enter_context(ServerProcess(options.server)).address
        summary, outcomes = uvloop.run(_load(target, connection, _mix(options), options.load_seed, goal))
    print_load(summary)
    if options.json:
        save_load(summary, outcomes, options.json)
    if options.plot:
        plot_load(summary, outcomes, options.plot)


def run_frontend(options: argparse.Namespace) -> None:
    """Raise the rate until the server no longer keeps up; print and save."""
    from tqdm import tqdm

    from hsrpc.bench.frontend import Trial, measure_frontend, plot_frontend, print_frontend, save_frontend
    from hsrpc.cli.loop import run_loop

    check_folders(options, "json", "plot")
    with tqdm(desc="trials", unit="") as bar:

        def done(trial: Trial) -> None:
            bar.set_postfix_str(f"{trial.mode}, {trial.streams} streams, {trial.tokens_per_second:,.0f} tokens/s")
            bar.update()

        trials = run_loop(measure_frontend(options.streams, options.seconds, done))
    print_frontend(trials)
    if options.json:
        save_frontend(trials, options.json)
    if options.plot:
        plot_frontend(trials, options.plot)


async def _load(
    target: str, connection: ConnectionSettings, mix: Mix, seed: int, goal: Goal
) -> tuple[LoadSummary, list[Outcome]]:
    from hsrpc.bench.load import make_arrivals
    from hsrpc.bench.load_report import summarise_load
    from hsrpc.client import NO_RETRIES, AsyncClient

    async with AsyncClient(target, options=NO_RETRIES, **connection) as client:
        await client.wait_ready(_READY_SECONDS)
        model = await client.get_model()
        arrivals = make_arrivals(mix, model.sizes.vocab_size, model.max_model_len, seed)
        outcomes = await _with_bar(client, arrivals)
    return summarise_load(model.name, mix.rate, outcomes, goal), outcomes


async def _with_bar(client: AsyncClient, arrivals: list[Arrival]) -> list[Outcome]:
    from tqdm import tqdm

    from hsrpc.bench.load import OK, run_load

    with tqdm(total=len(arrivals), desc="requests", unit="") as bar:
        good = 0

        def done(outcome: Outcome) -> None:
            nonlocal good
            good += outcome.status == OK
            bar.set_postfix_str(f"{good} OK")
            bar.update()

        return await run_load(lambda: client, arrivals, done)


def _mix(options: argparse.Namespace) -> Mix:
    from hsrpc.bench.load import Mix
    from hsrpc.bench.workload import Lengths

    return Mix(
        rate=options.rate,
        duration=options.duration,
        lengths=Lengths(options.lengths),
        prompt=options.prompt,
        output=options.output,
        cancel_share=options.cancel_share,
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG")


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < math.inf, "give a number above 0")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "give a share, 0 to 1")


def _number(text: str, is_right: Callable[[float], bool], remedy: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_right(value):
        raise argparse.ArgumentTypeError(f"{text!r} does not do; {remedy}")
    return value
