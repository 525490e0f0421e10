"""Steps with drafts, measured beside the formula: draft lengths and rates of error, for several models and batches.

Weights are random, and so are prompts; what is drafted is the model's own output, recorded first. Each model and batch
is one engine and one file, and each setting a few steps.

    python -m benchmarks.drafts
    python -m benchmarks.drafts --case opt-13b-64 --drafts 3 15 --acceptance 0.7
    python -m benchmarks.render    # writes the table of docs/performance.md
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.decoding import cell_of
from benchmarks.raw_results import RESULTS
from benchmarks.record import header, write_json
from hsrpc.bench.replay import Replayed, replay
from hsrpc.config import EngineConfig
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.drafting import Drafting

PROGRAM = "python -m benchmarks.drafts"
FOLDER = RESULTS / "drafts-replay"
SHAPES = ("opt-13b", "llama-2-13b", "qwen3-32b")
"""Two multi-head models, and one with grouped queries."""
_PROMPT = 512
BATCHES = {1: _PROMPT, 64: _PROMPT, 256: 128}
"""Prompt tokens of each request, by the number of requests: few where there are many, so that a step stays short."""
DRAFTS = (1, 3, 7, 15)
ACCEPTANCE = (0.3, 0.7, 1.0)
OUTPUT = 34
"""Tokens that are recorded: two steps of the longest drafts, all right, and one before them."""
STEPS = 3
"""Measured of each setting, at least."""
GPU_MEMORY, HOST_MEMORY = "24GiB", "100GiB"
_CASE_SECONDS = 120.0


class Case(NamedTuple):
    """A model and how many requests."""

    shape: str
    batch: int

    def prompt(self, options: argparse.Namespace) -> int:
        """Prompt tokens of a request."""
        return int(options.prompt or BATCHES.get(self.batch, _PROMPT))

    @property
    def name(self) -> str:
        return f"{Path(self.shape).stem}-{self.batch}"

    def config(self, max_draft_tokens: int, options: argparse.Namespace) -> EngineConfig:
        """Just so many requests, in so much memory."""
        prompt, output = self.prompt(options), options.output
        return EngineConfig(
            model=RANDOM_PREFIX + self.shape,
            gpu_memory=options.gpu_memory,
            host_memory=options.host_memory,
            min_batch=self.batch,
            max_batch=self.batch,
            max_model_len=prompt + output,
            expected_context=prompt + output // 2,
            expected_output=output,
            max_draft_tokens=max_draft_tokens,
        )


CASES = tuple(Case(shape, batch) for shape in SHAPES for batch in BATCHES)


async def measure(case: Case, settings: Sequence[Drafting], options: argparse.Namespace) -> dict[str, object]:
    """All settings of a case; or its `failure`."""
    most = max(drafting.tokens for drafting in settings)
    config = case.config(most, options)
    lengths = {"prompt": case.prompt(options), "output": options.output, "steps": options.steps}

    async def all_settings() -> dict[str, object]:
        return asdict(await replay(config, settings, on_setting=_tell, **lengths))

    started = time.perf_counter()
    found = await cell_of(all_settings(), _CASE_SECONDS)
    return {"case": case.name, **found, "wall_seconds": time.perf_counter() - started}


def _tell(each: Replayed) -> None:
    step = f"{each.step_seconds * 1e3:.1f} ms, predicted {each.predicted_step_seconds * 1e3:.1f}"
    rates = f"{each.tokens_per_second:.1f} tokens/s, predicted {each.predicted_tokens_per_second:.1f}"
    print(f"  {each.drafts} drafted, {each.acceptance:g} right: tau {each.tokens_per_request:.2f}; {step}; {rates}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write a file a case. Returns the exit status: 1 if any case failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="steps with drafts beside the formula")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="may be repeated")
    parser.add_argument("--shape", help="this shape or config.json alone, in place of the cases")
    parser.add_argument("--batch", type=int, default=64, help="of --shape (default: 64)")
    parser.add_argument("--prompt", type=int, metavar="N", help="prompt tokens (default: 512; of 256 requests: 128)")
    parser.add_argument("--drafts", type=int, nargs="+", default=list(DRAFTS), metavar="N", help="default: 1 3 7 15")
    parser.add_argument(
        "--acceptance", type=float, nargs="+", default=list(ACCEPTANCE), metavar="X", help="default: 0.3 0.7 1"
    )
    parser.add_argument(
        "--output", type=int, default=OUTPUT, metavar="N", help="recorded tokens (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of each setting (default: %(default)s)")
    parser.add_argument("--gpu-memory", default=GPU_MEMORY, metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--host-memory", default=HOST_MEMORY, metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: %(default)s)")
    parser.add_argument("--commit", help="of a copy of the sources without their history")
    options = parser.parse_args(words)
    settings = [Drafting(tokens, acceptance) for tokens in options.drafts for acceptance in options.acceptance]
    cases = [case for case in CASES if not options.case or case.name in options.case]
    has_failed = False
    for case in [Case(options.shape, options.batch)] if options.shape else cases:
        print(f"{case.name}:", flush=True)
        found = asyncio.run(measure(case, settings, options))
        has_failed |= "failure" in found
        print(f"  {found.get('failure', 'done')} after {found['wall_seconds']:.0f} s", flush=True)
        content = {"header": header([*PROGRAM.split(), *words], commit=options.commit), "result": found}
        write_json(options.folder / f"{case.name}.json", content)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
