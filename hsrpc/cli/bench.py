"""hsrpc bench: measured speed beside the limit of the machine."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.cli.bench_calibrate import add_calibrate_parser
from hsrpc.cli.bench_serve import add_frontend_parser, add_serve_parser
from hsrpc.cli.options import MEASURED_TIME, Commands, add_command, add_engine_options, check_folders, engine_config
from hsrpc.config import CachePolicy, EngineConfig
from hsrpc.errors import ConfigError

if TYPE_CHECKING:
    from hsrpc.bench.run import Result
    from hsrpc.bench.workload import Workload
    from hsrpc.engine.engine import Engine
    from hsrpc.plan.plan import Plan
    from hsrpc.plan.roofline import StepRecord

_EXAMPLES = """\
  hsrpc bench decode --shape opt-6.7b --max-batch 128 --prompt 512 --placement host
  hsrpc bench decode --shape ./my-model/config.json --profile
  hsrpc bench decode --shape opt-13b --max-batch 64 --gpu-memory 24GiB --max-draft-tokens 7 --replay-acceptance 0.8
  hsrpc bench prefill --shape opt-6.7b --max-batch 16 --prompt 2047
  hsrpc bench offline --shape opt-13b --requests 256 --lengths sharegpt-like --gpu-memory 24GiB
  hsrpc bench offline --shape opt-13b --prompt 512 --shared-prefix 400 --gpu-memory 24GiB
  hsrpc bench sweep --shape opt-6.7b --max-batch 64 --placement host --plot sweep.png --json sweep.json
  hsrpc bench calibrate --shape opt-13b --save gpu1.json
  hsrpc bench serve --rate 4 --duration 30
  hsrpc bench frontend
"""
_KINDS = {
    "decode": "decode steps of a full batch, after its prefill",
    "prefill": "steps that compute prompts",
    "offline": "all steps of a number of requests that come and go",
    "sweep": "decode at activation shares 0 to 1",
}


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "bench", "measure speed: of the engine beside the limit, and through gRPC", _EXAMPLES
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", dest="kind", required=True)
    for name, text in _KINDS.items():
        _add_engine_parser(kinds, name, text)
    add_calibrate_parser(kinds)
    add_serve_parser(kinds)
    add_frontend_parser(kinds)


def _add_engine_parser(kinds: Commands, name: str, text: str) -> None:
    examples = "".join(f"{line}\n" for line in _EXAMPLES.splitlines() if line.startswith(f"  hsrpc bench {name} "))
    parser = add_command(kinds, name, text, examples)
    load = parser.add_argument_group("load", "--max-batch is the batch that is measured, where it fits, and no bound")
    load.add_argument("--shape", help="such as opt-6.7b, or a config.json; in place of --model random:SHAPE")
    load.add_argument(
        "--requests", type=int, metavar="N", help="default: as many as run at once; prefill: as many as fill the steps"
    )
    load.add_argument("--prompt", type=int, default=512, metavar="N", help="prompt tokens of a request (default: 512)")
    load.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="first prompt tokens that are the same in all requests (default: 0)",
    )
    load.add_argument("--output", type=int, default=128, metavar="N", help="output tokens of a request (default: 128)")
    load.add_argument("--lengths", choices=("uniform", "sharegpt-like"), default="uniform", help="default: uniform")
    load.add_argument(
        "--steps", type=int, default=20, metavar="N", help="decode or prompt steps measured (default: 20)"
    )
    load.add_argument(
        "--seconds", type=MEASURED_TIME, metavar="SECONDS", help="measure no longer than so (default: to the end)"
    )
    if name == "decode":
        load.add_argument(
            "--replay-acceptance",
            type=float,
            metavar="X",
            help="0 to 1: record the model's output, then draft it, --max-draft-tokens at a time, this part right",
        )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="save everything that was measured; sweep: after each share"
    )
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes, from two steps more")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="save those two for Perfetto or chrome://tracing, such as trace.json.gz",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="sweep: save measured and predicted curves as PNG")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print, save."""
    from hsrpc.bench.report import plot_sweep, print_results, save_json

    if options.shape:
        options.model = f"random:{options.shape}"
    config = engine_config(options)
    config = replace(config, min_batch=config.max_batch or config.min_batch)
    if options.kind == "decode" and options.replay_acceptance is not None:
        _replay(options, config)
        return
    if options.kind == "sweep" and options.trace:
        problem, remedy = "a sweep is many measurements", "trace one of them, with --activation-share"
        raise ConfigError("trace", str(options.trace), problem, remedy)
    if not 0 <= options.shared_prefix < options.prompt:
        problem, remedy = f"not a part of {options.prompt} prompt tokens", "give fewer, or a longer --prompt"
        raise ConfigError("shared_prefix", options.shared_prefix, problem, remedy)
    check_folders(options, "json", "trace", "plot")
    results: list[Result] = []
    for each in [_with_share(config, share / 10) for share in range(11)] if options.kind == "sweep" else [config]:
        results.append(_measure(options, each))
        if options.json:  # at once: a run that is cut short keeps what it measured
            save_json(results, options.json)
    print_results(results)
    if options.plot:
        title = f"{results[0].model}, batch {results[0].batch}"
        measured = [(r.activation_share, r.decode_tokens_per_second) for r in results]
        predicted = [(r.activation_share, r.batch / r.predicted_step_seconds) for r in results]
        plot_sweep(title, measured, predicted, options.plot)


def _replay(options: argparse.Namespace, config: EngineConfig) -> None:
    """Measure steps without drafts and with them, print, save."""
    from hsrpc.bench.replay import replay
    from hsrpc.bench.report import print_replay, save_replay
    from hsrpc.cli.loop import run_loop
    from hsrpc.plan.drafting import Drafting

    acceptance, drafts = options.replay_acceptance, config.draft_tokens
    if not 0 <= acceptance <= 1:
        raise ConfigError("replay_acceptance", acceptance, "outside [0, 1]", "give a part of the drafted tokens")
    if isinstance(drafts, str) or not drafts:
        problem, remedy = f"has no meaning with max_draft_tokens={drafts}", "give --max-draft-tokens 1 or more with it"
        raise ConfigError("replay_acceptance", acceptance, problem, remedy)
    check_folders(options, "json")
    config = replace(
        config,
        expected_context=config.expected_context or options.prompt + options.output // 2,
        expected_output=config.expected_output or options.output,
        max_model_len=config.max_model_len or options.prompt + options.output,
        expected_acceptance=acceptance,
    )
    setting = Drafting(drafts, acceptance)
    lengths = {"prompt": options.prompt, "output": options.output, "steps": options.steps}
    result = run_loop(replay(config, [setting], **lengths))
    print_replay(result)
    if options.json:
        save_replay(result, options.json)


def _with_share(config: EngineConfig, share: float) -> EngineConfig:
    return replace(config, cache_policy=CachePolicy.HYBRID, activation_share=share)


def _measure(options: argparse.Namespace, config: EngineConfig) -> Result:
    from hsrpc.bench.run import WARM_UP_STEPS, observe_run, summarise
    from hsrpc.bench.workload import Lengths, make_workload
    from hsrpc.cli.loop import run_loop  # needs the extra `engine`, which --help does not
    from hsrpc.engine.startup import describe_model

    lengths, output = Lengths(options.lengths), 1 if options.kind == "prefill" else options.output
    mean = options.prompt + output // 2
    longest = options.prompt + output
    if lengths is not Lengths.UNIFORM:
        longest = min(4 * longest, describe_model(config)[0].sizes.context_length)
    config = replace(
        config,
        expected_context=config.expected_context or mean,
        expected_shared_prefix=config.expected_shared_prefix or (options.shared_prefix if config.prefix_cache else 0),
        expected_output=config.expected_output or (None if options.kind == "prefill" else output),
        max_model_len=config.max_model_len or longest,
    )
    wanted = options.steps + WARM_UP_STEPS
    requests = decoded = 0
    began = math.inf
    is_whole = options.kind in ("decode", "sweep")

    def make(engine: Engine) -> Workload:
        nonlocal requests, began
        requests = options.requests or _default_requests(options, engine.plan)
        workload = make_workload(
            lengths,
            count=requests,
            prompt=options.prompt,
            output=output,
            vocab_size=engine.spec.vocab_size,
            longest=config.max_model_len,
            shared=options.shared_prefix,
        )
        if is_whole:
            _check_whole(workload, engine.plan)
        began = time.monotonic()
        return workload

    def is_enough(record: StepRecord) -> bool:
        nonlocal decoded
        decoded += _is_full_decode(record, requests)
        is_late = options.seconds is not None and time.monotonic() - began > options.seconds
        return is_late or (is_whole and decoded >= wanted)

    def choose(records: Sequence[StepRecord]) -> list[StepRecord]:
        return _chosen(options.kind, requests, records)

    with_ranges, trace = options.profile or options.trace is not None, options.trace
    profile = {"with_busy": True, "with_ranges": with_ranges, "trace": trace}
    return summarise(run_loop(observe_run(config, make, choose, is_enough=is_enough, **profile)), config)


def _check_whole(workload: Workload, plan: Plan) -> None:
    """Before the run: with these requests there would be no step in which all decode.

    Raises:
        BenchError: they do not run at once, or one ends too soon.
    """
    from hsrpc.bench.run import WARM_UP_STEPS, BenchError

    requests, shortest = len(workload.prompts), min(workload.output_tokens)
    if requests > plan.max_batch:
        raise BenchError(f"{plan.max_batch} of {requests} requests run at once; give fewer, or use bench offline")
    if shortest < WARM_UP_STEPS + 2:
        found = f"one of {requests} requests has {shortest} output tokens, too few for steps in which all decode"
        raise BenchError(f"{found}; give more output tokens, or use bench offline")


def _default_requests(options: argparse.Namespace, plan: Plan) -> int:
    """Requests that run at once; for prompts, those that fill the steps."""
    from hsrpc.bench.run import WARM_UP_STEPS

    if options.kind != "prefill":
        return plan.max_batch
    tokens = (WARM_UP_STEPS + options.steps) * plan.max_idle_prefill_tokens
    return max(1, int(tokens // options.prompt))


def _chosen(kind: str, requests: int, records: Sequence[StepRecord]) -> list[StepRecord]:
    if kind == "prefill":
        return [record for record in records if record.prefill_tokens]
    if kind == "offline":
        return list(records)
    return [record for record in records if _is_full_decode(record, requests)]


def _is_full_decode(record: StepRecord, requests: int) -> bool:
    """All requests of the batch, and no prompt beside them."""
    return record.prefill_tokens == 0 and record.decode_tokens == requests
