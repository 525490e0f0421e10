"""hsrpc batch: a file of requests in OpenAI's batch form, on an embedded engine or a server."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from hsrpc.batch.shard import WHOLE, Shard
from hsrpc.cli.options import Commands, SecondsOption, add_command, check_folders, engine_config
from hsrpc.cli.source import Run, add_source_options, running_source
from hsrpc.cli.terminal import print_error
from hsrpc.config import Seconds, parse_bytes
from hsrpc.errors import ConfigError, HsrpcError
from hsrpc.source import Embedded, Source

if TYPE_CHECKING:
    from hsrpc.batch.efficiency import Efficiency
    from hsrpc.batch.outputs import Outputs
    from hsrpc.batch.run import Tally
    from hsrpc.batch.windows import Survey, Windows
    from hsrpc.plan.plan import Plan
    from hsrpc.plan.question import Question
    from hsrpc.plan.sizes import ModelSizes

_EXAMPLES = """\
  hsrpc batch requests.jsonl answers.jsonl                              with the bundled model
  hsrpc batch requests.jsonl.gz answers.jsonl.gz --model ./opt-13b --gpu-memory 20GiB
  hsrpc batch requests.jsonl --dry-run --model ./opt-13b                what it would take, and what to set
  hsrpc batch requests.jsonl answers.jsonl --target 10.0.0.7:50051      on a server
  hsrpc batch requests.jsonl part2.jsonl --shard 2/8                    the third of eight machines
  zcat requests.jsonl.gz | hsrpc batch - - --errors errors.jsonl | jq .response.body.choices
"""
STANDARD = "-"
"""Names standard input, and standard output."""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "batch", "run a file of requests in OpenAI's batch form", _EXAMPLES)
    parser.add_argument(
        "input", metavar="IN", help="lines of JSON with custom_id, method, url and body; - is standard input"
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        nargs="?",
        help="gets a line for each request that went well, in order of completion; is gone on with where it exists, "
        "compressed where it ends in .gz; - is standard output",
    )
    parser.add_argument(
        "--errors",
        type=Path,
        metavar="FILE",
        help="gets the other lines, likewise (default: answers.errors.jsonl beside answers.jsonl)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing: check and count all of IN, predict the time, say what to set",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=WHOLE,
        metavar="I/N",
        help="run each Nth line alone, from line I + 1 on, where N runs share IN; each needs an OUT of its own "
        "(default: 0/1, all lines)",
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME[,NAME...]",
        help="names that the `model` of a line may have (default: the model's own)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests to have at a time (default: those that run at once, and a quarter more that wait)",
    )
    parser.add_argument(
        "--window",
        default="64MiB",
        metavar="SIZE",
        help="memory for lines that are read ahead, and put in order: those that share a prefix together, long outputs "
        "first; no line may be longer (default: 64MiB)",
    )
    parser.add_argument(
        "--retry-seconds",
        type=SecondsOption(Seconds(0.0)),
        default=300.0,
        metavar="SECONDS",
        help="to wait for a server that is gone; 0 does not wait (default: 300)",
    )
    parser.add_argument(
        "--no-advice", action="store_true", help="do not plan again for what would be faster, which takes seconds"
    )
    add_source_options(parser)
    parser.set_defaults(run=run)


def _shard(text: str) -> Shard:
    try:
        index, count = map(int, text.split("/"))
        return Shard(index, count)
    except ValueError:
        problem = f"{text!r} is no shard; give I/N with I from 0 to N - 1, such as 0/8 for the first of eight"
        raise argparse.ArgumentTypeError(problem) from None


@dataclass(frozen=True, slots=True)
class _Files:
    """Where lines come from and go to."""

    input: str
    output: Path | None
    """None: standard output."""
    errors: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Files:
        """The files that the flags name.

        Raises:
            ConfigError: one file is to be two things, or a directory is not there.
        """
        from hsrpc.batch.output_file import errors_path

        output = None if options.output == STANDARD else Path(options.output)
        if output is None and options.errors is None:
            raise ConfigError("errors", None, "standard output has no file beside it", "give --errors FILE")
        if sys.stdout is None and output is None:
            raise ConfigError("output", STANDARD, "standard output is closed", "give a file")
        files = cls(options.input, output, options.errors or errors_path(output or Path()))
        for name, file in (("output", files.output), ("errors", files.errors)):
            check_folders(argparse.Namespace(**{name: file}), name)
        files._check_distinct()
        return files

    def _check_distinct(self) -> None:
        files = {"input": None if self.input == STANDARD else Path(self.input), "output": self.output}
        known = {name: file for name, file in {**files, "errors": self.errors}.items() if file is not None}
        for (other, one), (name, file) in combinations(known.items(), 2):
            if _is_same(one, file):
                raise ConfigError(name, str(file), f"the same file as {other}", "give another one")
        if self.output is None and self.errors.exists() and self.errors.stat().st_size:
            problem = "has lines of an earlier run, which cannot be gone on with on standard output"
            raise ConfigError("errors", str(self.errors), problem, "give another file, or move it away")


def _is_same(one: Path, other: Path) -> bool:
    both_exist = one.exists() and other.exists()
    return os.path.samefile(one, other) if both_exist else one.absolute() == other.absolute()


def run(options: argparse.Namespace) -> None:
    """Run what is not done yet, or say what it would take."""
    names, max_bytes = _names(options), parse_bytes(options.window, "window")
    if options.concurrency is not None and options.concurrency < 1:
        raise ConfigError("concurrency", options.concurrency, "not a positive whole number", "give 1 or more")
    if options.dry_run:
        from hsrpc.cli.batch_dry_run import dry_run

        dry_run(options, names, max_bytes)
        return
    if options.output is None:
        options.parser.error("the following arguments are required: OUT")
    batch = _Batch(options, _Files.of(options), names, max_bytes)
    try:
        with _terminated_as_interrupted():
            batch.run()
    except (HsrpcError, OSError, KeyboardInterrupt):
        batch.tell_how_to_go_on()
        raise
    batch.tell_summary()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within it, SIGTERM does what Ctrl-C does: the first process of a container gets it only if it handles it."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.served_model_name is not None and options.target is not None:
        problem = f"has no meaning with --target {options.target}"
        raise ConfigError("served_model_name", options.served_model_name, problem, "the server has names of its own")
    return tuple(filter(None, (options.served_model_name or "").split(",")))


@dataclass(slots=True)
class _Batch:
    """One run of the command."""

    options: argparse.Namespace
    files: _Files
    names: tuple[str, ...]
    max_bytes: int
    done: int = 0
    """Lines of earlier runs."""
    written: int = 0
    """Lines of this one that are in their files."""
    tally: Tally | None = None
    """None: no line was begun."""
    seconds: float = 0.0
    efficiency: Efficiency | None = None
    planned: tuple[Question, ModelSizes, Plan] | None = None
    """What an engine in this process was asked and planned; None: a server answers."""

    def run(self) -> None:
        """Run all lines that no file has."""
        from hsrpc.batch.input_file import can_read_twice
        from hsrpc.batch.ledger import Ledger
        from hsrpc.batch.windows import Windows

        can_read_twice(self.files.input)  # first: where there is no input, no output is made
        with closing(Ledger()) as ledger, self._outputs() as outputs:
            self.done = outputs.resume(ledger)
            windows = Windows(self.files.input, ledger, self.max_bytes, self.options.shard)
            survey = windows.survey()
            if survey is not None and survey.lines == survey.done:
                print_error(f"hsrpc: all {survey.lines} lines are done")
                return
            if self.done:
                print_error(f"hsrpc: {self.done} lines were done before; going on with the rest")
            if self.options.target is None:
                self._observe()
                if survey is not None:
                    self._expect_shared(windows)
            context = running_source(self.options, names=self.names, observe=self.efficiency, retries=False)
            with context as (run, source):
                self._run(run, source, windows, survey, outputs)

    @contextmanager
    def _outputs(self) -> Iterator[Outputs]:
        """The files; once they are left, it is known how many lines they have got."""
        from hsrpc.batch.outputs import Outputs

        outputs = Outputs(self.files.output, self.files.errors)
        try:
            with outputs:
                yield outputs
        finally:
            self.written = outputs.written

    def _observe(self) -> None:
        from hsrpc.batch.efficiency import Efficiency  # needs numpy, which a client's installation lacks
        from hsrpc.cli.loop import SWITCH_SECONDS

        self.efficiency = Efficiency()
        sys.setswitchinterval(SWITCH_SECONDS)

    def _expect_shared(self, windows: Windows) -> None:
        """Plan for the prefix that the input's prompts share, where the flags say nothing of it."""
        from hsrpc.cli.batch_shared import shared_prefix  # needs the engine, which a client's installation lacks

        found = shared_prefix(windows, engine_config(self.options), self.names)
        if found:
            self.options.expected_shared_prefix = found
            told = f"requests begin with {found} tokens of those before them, on average"
            print_error(f"hsrpc: {told}; planning with --expected-shared-prefix {found}")

    def _run(self, run: Run[Any], source: Source, windows: Windows, survey: Survey | None, outputs: Outputs) -> None:
        from hsrpc.batch.caller import default_concurrency
        from hsrpc.batch.progress import show_progress
        from hsrpc.batch.run import Runner

        if isinstance(source, Embedded) and self.efficiency is not None:
            engine = source.engine
            self.planned = engine.question, engine.spec.sizes, engine.plan
            plan = engine.plan
            self.efficiency.begin(
                engine.spec.sizes, plan.hardware, absorbs=plan.absorbs, gathered_bytes=plan.gathered_bytes
            )
        concurrency = self.options.concurrency or default_concurrency(run(source.max_batch()))
        total, done = (None, self.done) if survey is None else (survey.lines, survey.done)
        progress = show_progress(total, done, print_error)
        runner = Runner(
            source,
            outputs,
            concurrency=concurrency,
            seed=self.options.seed,
            retry_seconds=self.options.retry_seconds,
            note=progress.note,
        )
        self.tally, began = runner.tally, monotonic()
        try:
            run(runner.run(iter(windows)))
        finally:
            self.seconds = monotonic() - began
            progress.close()

    def tell_how_to_go_on(self) -> None:
        """After an end before the last line, where any was begun."""
        if self.tally is None:
            return
        if self.files.output is None:
            how = "what went to standard output cannot be gone on with"
        else:
            how = "the same command goes on with the rest"
            how += ", given the same input" if self.files.input == STANDARD else ""
        print_error(f"hsrpc: {self.done + self.written} lines are done; {how}")

    def tell_summary(self) -> None:
        """What was done, how fast, and what would have been faster."""
        if self.tally is None:
            return
        from hsrpc.cli.batch_report import summary

        for line in summary(self.tally, self.seconds, self.files.errors, self.efficiency):
            print_error(line)
        if self.planned is not None and not self.options.no_advice and self.tally.requests:
            from hsrpc.cli.batch_report import advice

            for line in advice(self.tally, *self.planned):
                print_error(line)
