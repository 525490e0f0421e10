"""What real text accepts of drafts: outputs of SmolLM2-135M-Instruct for chat, code edits, summaries and extraction.

The model (see `benchmarks.smollm2`) writes to the prompts of `draft_texts.toml`, greedily and at temperature 0.8, on
the CPU. Drafts never change tokens, so what a drafter would have saved follows from the recorded outputs: replay them,
and let it draft where a step would begin. Tau is tokens over steps. Small models fall into loops, which any drafter
continues; the share of distinct 4-grams of an output shows them.

    python -m benchmarks.drafts_on_text --json drafts.json
    python -m benchmarks.drafts_on_text --recorded recorded.json     # replays these, or makes them

Beside it is the processor time of a step of drafting for 256 requests of 4,000 tokens, made of the same texts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.from_gguf import add_checkpoint_options, ensure_checkpoint
from benchmarks.record import header, write_json
from benchmarks.smollm2 import Rendered, render
from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import DeviceKind, DType
from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.draft.ngrams import NgramDrafter
from hsrpc.draft.suffix import SuffixDrafter

PROGRAM = "python -m benchmarks.drafts_on_text"
PROMPTS = Path(__file__).with_name("draft_texts.toml")
TEMPERATURES = (0.0, 0.8)
MAX_DRAFTED = (3, 7, 15)
DISTINCT = 4
"""Length of the n-grams whose share shows loops."""


class Text(NamedTuple):
    """A prompt and what the model wrote."""

    kind: str
    temperature: float
    prompt: list[int]
    output: list[int]
    begins: str
    """First words of the output."""

    @property
    def distinct(self) -> float:
        """Share of the output's 4-grams that are all different; 1 without any repetition."""
        grams = list(zip(*(self.output[shift:] for shift in range(DISTINCT)), strict=False))
        return len(set(grams)) / len(grams) if grams else 1.0


class Way(NamedTuple):
    """A drafter, and whether requests of a kind of work, one after the other, are those of one caller."""

    name: str
    make: Callable[[], Drafter]
    is_shared: bool


WAYS = (
    Way("n-gram", NgramDrafter, is_shared=False),
    Way("suffix", SuffixDrafter, is_shared=False),
    Way("suffix, after others", SuffixDrafter, is_shared=True),
)


class Replayed(NamedTuple):
    """An output written again with drafts of at most `max_drafted` tokens."""

    way: str
    max_drafted: int
    steps: int
    drafted: int


async def record(directory: Path, max_tokens: int) -> list[Text]:
    """Let the model write to all prompts."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    prompts = [
        render(each["kind"], [{"role": "user", "content": each["text"].strip()}], tokenizer)
        for each in tomllib.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]
    ]
    config = EngineConfig(
        model=str(directory),
        device=DeviceKind.CPU,
        dtype=DType.FLOAT32,
        gpu_memory="2GiB",
        host_memory="2GiB",
        resident_share=1.0,
        max_batch=len(prompts),
        max_model_len=max(len(prompt.token_ids) for prompt in prompts) + max_tokens,
    )
    async with Engine(config) as engine:

        async def write(seed: int, prompt: Rendered, temperature: float) -> Text:
            params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
            output = [token async for delta in engine.generate(prompt.token_ids, params) for token in delta.token_ids]
            begins = " ".join(tokenizer.decode(output[:24]).split()[:8])
            return Text(prompt.kind, temperature, prompt.token_ids, output, begins)

        texts = list[Text]()
        for temperature in TEMPERATURES:
            texts += await asyncio.gather(*(write(seed, each, temperature) for seed, each in enumerate(prompts)))
            print(f"temperature {temperature}: {len(prompts)} outputs", flush=True)
    return texts


def num_equal(draft: Sequence[int], rest: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    pairs = zip(draft, rest, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def replay(way: Way, texts: Sequence[Text], max_drafted: int) -> Iterator[Replayed]:
    """The texts one after the other, by one drafter for each temperature."""
    drafters = {temperature: way.make() for temperature in TEMPERATURES}
    for number, text in enumerate(texts):
        name, salt = str(number), text.kind if way.is_shared else str(number)
        tokens, steps, drafted = list(text.prompt), 0, 0
        drafter, end = drafters[text.temperature], len(text.prompt) + len(text.output)
        while len(tokens) < end:
            [draft] = drafter.draft([Wanted(name, salt, tokens, len(text.prompt), max_drafted)])
            rest = text.output[len(tokens) - len(text.prompt) :]
            accepted = num_equal(draft, rest)
            tokens += rest[: accepted + 1]
            steps, drafted = steps + 1, drafted + len(draft)
        drafter.forget([name])
        yield Replayed(way.name, max_drafted, steps, drafted)


def _endless(pieces: Sequence[list[int]], rng: random.Random) -> Iterator[int]:
    """Tokens of one drawn piece after the other."""
    while True:
        yield from rng.choice(pieces)


def step_seconds(
    way: Way,
    texts: Sequence[Text],
    *,
    max_drafted: int,
    num_requests: int = 256,
    length: int = 4000,
    steps: int = 40,
) -> float:
    """Processor time of drafting for a step in which each request has two tokens more than in the one before.

    That of the fastest of so many steps: where other programs run beside, the others say more of these.
    """
    rng, drafter, pieces = random.Random(0), way.make(), [[*text.prompt, *text.output] for text in texts]
    requests = [list(itertools.islice(_endless(pieces, rng), length)) for _ in range(num_requests)]

    def draft(end: int) -> float:
        wanted = [Wanted(str(n), "", tokens[:end], length // 2, max_drafted) for n, tokens in enumerate(requests)]
        begin = time.thread_time()
        drafter.draft(wanted)
        return time.thread_time() - begin

    for number, piece in enumerate(pieces if way.is_shared else ()):
        drafter.draft([Wanted(f"before {number}", "", piece, 1, 1)])
        drafter.forget([f"before {number}"])
    draft(length - 2 * steps)
    return min(draft(length - 2 * left) for left in reversed(range(steps)))


def measure(texts: Sequence[Text]) -> dict[str, Any]:
    """Replay all texts in all ways; what the file has."""
    cells = [(way, max_drafted) for way in WAYS for max_drafted in MAX_DRAFTED]
    replayed = zip(*(replay(way, texts, max_drafted) for way, max_drafted in cells), strict=True)
    return {
        "texts": [
            {
                "kind": text.kind,
                "temperature": text.temperature,
                "begins": text.begins,
                "prompt_tokens": len(text.prompt),
                "output_tokens": len(text.output),
                "distinct": round(text.distinct, 3),
                "replayed": [each._asdict() for each in of_text],
            }
            for text, of_text in zip(texts, replayed, strict=True)
        ],
        "step_seconds": [
            {
                "way": way.name,
                "max_drafted": max_drafted,
                "seconds": step_seconds(way, texts, max_drafted=max_drafted),
            }
            for way, max_drafted in cells
        ],
    }


def print_result(result: dict[str, Any]) -> None:
    """A line for each kind of work, drafter and length."""
    table = Table("work", "temperature", "drafter", "draft", "tau", "rows a step", "accepted")
    groups = dict[tuple[str, float, str, int], list[tuple[int, Replayed]]]()
    for text in result["texts"]:
        for each in (Replayed(**cell) for cell in text["replayed"]):
            key = text["kind"], text["temperature"], each.way, each.max_drafted
            groups.setdefault(key, []).append((text["output_tokens"], each))
    for (kind, temperature, way, max_drafted), found in groups.items():
        tokens = sum(count for count, _ in found)
        steps, drafted = (sum(getattr(each, name) for _, each in found) for name in ("steps", "drafted"))
        share = (tokens - steps) / max(1, drafted)
        numbers = f"{tokens / steps:.2f}", f"{drafted / steps:.1f}", f"{share:.0%}"
        table.add_row(kind, str(temperature), way, str(max_drafted), *numbers)
    Console().print(table)
    for cell in result["step_seconds"]:
        print(f"{cell['way']}, {cell['max_drafted']}: {cell['seconds'] * 1e3:.1f} ms for 256 requests of 4,000 tokens")


def recorded(options: argparse.Namespace) -> list[Text]:
    """Outputs from the file, or else of the model, and then in the file."""
    if options.recorded and options.recorded.exists():
        return [Text(*fields) for fields in json.loads(options.recorded.read_text(encoding="utf-8"))]
    texts = asyncio.run(record(options.directory, options.tokens))
    if options.recorded:
        write_json(options.recorded, texts)
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, replay, print, save."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_options(parser)
    parser.add_argument("--tokens", type=int, default=192, metavar="N", help="of an output (default: %(default)s)")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="outputs: read if it is there, else written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all results here")
    options = parser.parse_args(words)
    about = header([*PROGRAM.split(), *words])
    if not (options.recorded and options.recorded.exists()):
        ensure_checkpoint(parser, options)
    result = measure(recorded(options))
    print_result(result)
    if options.json:
        write_json(options.json, {"header": about, "result": result})


if __name__ == "__main__":
    main()
