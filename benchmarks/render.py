"""Tables of the documents, written from raw results.

    python -m benchmarks.render            # write them
    python -m benchmarks.render --check    # say which are stale; exit status 1 if any is

A page has a table between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import raw_results, tables
from benchmarks.raw_results import RESULTS, Record
from benchmarks.tables import Row

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/models.md",
    "docs/performance.md",
    "docs/findings.md",
    "benchmarks/results/README.md",
)
MARKED = re.compile(r"<!-- table: (?P<name>[a-z0-9-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Table:
    """A table, and the files of results that it comes from."""

    sources: tuple[str, ...]
    columns: Row
    rows: Callable[[Sequence[Record]], Iterator[Row]]


_ALL = tuple(raw_results.names())
_STEP = ("step", "limit", "efficiency")
_POLICIES = ("policies/opt-6.7b", "policies/opt-13b", "policies/opt-30b", "policies/opt-30b-kv")
_CODING = ("coding/opt-13b-plain", "coding/opt-13b-coded", "coding/llama-2-13b-plain", "coding/llama-2-13b-coded")
_RECOMPUTE = ("recompute/opt-6.7b", "recompute/opt-13b", "recompute/opt-13b-second-machine", "recompute/opt-30b")
_SWEEPS = ("planner/sweep-bus", "planner/sweep-compute", "planner/sweep-partly")
_SHARES = tuple(f"{tenths / 10:g}" for tenths in range(11))
_SHAPES = ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b")
_CHOICE = "planner/choice-opt-1.3b-24GiB"
_GRIDS = tuple(f"planner/grid-{shape}-{memory}" for memory in ("24GiB", "76GiB") for shape in _SHAPES)
_PLACED = (_CHOICE, *_GRIDS[1:4])
_PROMPTS = ("prompts/opt-6.7b-512", "prompts/opt-6.7b-2048", "prompts/opt-6.7b-2048-slow-host")
_PEERS = ("peers/host", "peers/host-accelerate", "peers/budget", "peers/resident")
_OF_PEERS = ("hsrpc: tokens/s", "step", "of its limit", "peer: tokens/s", "step", "of its limit", "times")
_SLOTS = ("0", "1", *(str(8 * eighths) for eighths in range(1, 9)))
_MIXTURES = (
    "qwen3-30b-a3b-1",
    "qwen3-30b-a3b-256",
    "qwen3-30b-a3b-1024",
    "qwen3-30b-a3b-80gib",
    "mixtral-8x7b-256",
    "mixtral-8x7b-80gib",
    "gemma-3-27b-64",
    "gemma-3-27b-80gib",
    "deepseek-v2-lite-kv",
    "deepseek-v2-lite-rebuilt",
    "deepseek-v2-lite-absorbed",
)
_CACHES = ("opt-13b-plain", "opt-13b-fp8")
_QUANTIZED = (
    "llama-3.3-70b-fp8",
    "llama-3.3-70b-w4a16",
    "qwen3-32b-fp8",
    "gpt-oss-120b-mxfp4-256",
    "gpt-oss-120b-mxfp4-1024",
)
_PREFIXES = ("opt-13b-none", "opt-13b-400", "opt-13b-host-none", "opt-13b-host-400")
_RESIDENT = ("qwen3-8b-109", "qwen3-8b-219", "qwen3-8b-219-again", "qwen3-8b-planned")
_MODELS = ("models/current",)
_DRAFTS = ("drafts/smollm2",)
_OF_MASKS = ("mask", "longest")
_OF_PLAN = ("requests", "caches", "resident")

TABLES = {
    "policies": Table(
        _POLICIES,
        ("model, requests x tokens", "policy", *_STEP, "beside plain copies", "predicted", "tokens/s"),
        tables.policies,
    ),
    "drafts-replay": Table(
        tuple(name for name in _ALL if name.startswith("drafts-replay/")),
        (
            "model, requests",
            "drafted, right",
            "tau",
            "step",
            "predicted",
            "limit",
            "tokens/s",
            "predicted",
            "times",
        ),
        tables.drafts_replay,
    ),
    "structured-output": Table(
        ("structured-output/libraries",),
        ("constraint", "tokens", "llguidance: compile", *_OF_MASKS, "xgrammar: compile", *_OF_MASKS),
        tables.structured_output,
    ),
    "products": Table(
        ("products/h200",), ("model", "rows", "time", "reading", "computing", "exponent"), tables.products
    ),
    "few-rows": Table(
        ("products/few-rows",), ("a layer of", "rows", "codes as they lie", "decoded", "16 bits"), tables.few_rows
    ),
    "experts": Table(("experts/random",), ("requests: slots of 64 experts", *_SLOTS), tables.experts),
    "coding": Table(
        _CODING, ("model", "weights", *_STEP, "beside plain copies", "predicted", "tokens/s"), tables.coding
    ),
    "mixtures": Table(
        tuple(f"mixtures/{case}" for case in _MIXTURES),
        ("model, requests", "device", "caches", "weights that stream", *_STEP, "predicted", "tokens/s"),
        tables.mixtures,
    ),
    "quantized": Table(
        tuple(f"quantized/{case}" for case in _QUANTIZED),
        ("model, requests", "weights", *_STEP, "predicted", "tokens/s"),
        tables.quantized,
    ),
    "caches": Table(
        tuple(f"caches/{case}" for case in _CACHES),
        ("model, requests", "activations", "resident", *_STEP, "GPU busy", "predicted", "tokens/s"),
        tables.caches,
    ),
    "prefixes": Table(
        tuple(f"prefixes/{case}" for case in _PREFIXES),
        ("model, requests", "shared", "weights resident", *_STEP, "GPU busy", "tokens/s", "times"),
        tables.prefixes,
    ),
    "fp8-products": Table(
        ("quantized/fp8-products",),
        ("a layer of", "rows", "decoding", "products", "of codes", "rounding inputs", "error", "error of codes"),
        tables.fp8_products,
    ),
    "code-kernels": Table(
        ("quantized/kernels",), ("a layer of", "weights", "time", "read and written", "of a copy"), tables.code_kernels
    ),
    "resident": Table(
        tuple(f"resident/{case}" for case in _RESIDENT),
        ("model, requests", "step", "predicted", "predicted / measured", "tokens/s"),
        tables.resident,
    ),
    "recompute": Table(_RECOMPUTE, ("model, requests", "share: step, ms", "GPU busy"), tables.recompute),
    "sweeps": Table(_SWEEPS, ("activation share", *_SHARES, "planner"), tables.sweeps),
    "grids": Table(
        (_GRIDS[0], _CHOICE, *_GRIDS[1:]),
        (
            "model, device memory",
            "the planner's choice",
            "step",
            "predicted / measured",
            "tokens/s",
            "others: tokens/s",
        ),
        tables.grids,
    ),
    "prompts": Table(
        _PROMPTS,
        ("model, prompt", "weights", "tokens/s", "of the GEMM rate", "host's launches of a layer"),
        tables.prompts,
    ),
    "mixed": Table(
        ("mixed/come-and-go", "mixed/max-step-time"),
        ("case", "steps", "efficiency", "tokens recomputed a step", "preempted", "loop lag, p99"),
        tables.mixed,
    ),
    "peers": Table(_PEERS, ("case", "model, requests", "peer", *_OF_PEERS), tables.peers),
    "grpc": Table(
        ("serving/grpc-cost",),
        ("OPT-1.3B, 64 requests", "tokens/s", "in full steps", "step", "loop lag, p99", "the loop's share of a core"),
        tables.grpc,
    ),
    "gateway": Table(
        ("serving/gateway-cost",),
        (
            "tokens/s handed out, 64 streams",
            "door",
            "tokens/s",
            "first token",
            "p99",
            "CPU of 1,000 tokens: server",
            "gateway",
        ),
        tables.gateway,
    ),
    "scheduling": Table(
        ("host-cost/scheduling",),
        ("requests that run", "none waits", "100 wait", "1,000 wait", "10,000 wait"),
        tables.scheduling,
    ),
    "orchestration": Table(
        ("host-cost/orchestration",),
        ("on the device", "step", "graph and sampling", "more"),
        tables.orchestration,
    ),
    "growth": Table(("growth/current",), ("over", "step", "from a straight line"), tables.growth),
    "startup": Table(("startup/current",), ("OPT-13B, 27 GB pinned", "time"), tables.startup),
    "bus": Table(("bus/current",), ("copies, GB/s", "alone", "beside GEMMs", "beside GEMMs into a buffer"), tables.bus),
    "guard": Table(
        tuple(name for name in _ALL if name.startswith("guard/")),
        ("GPU", "case", *_STEP, "tokens/s", "commit"),
        tables.guard,
    ),
    "lists": Table(
        ("lists/before", "lists/after", "lists/before-again", "lists/after-again"),
        ("step, efficiency", "before", "after", "before again", "after again"),
        tables.lists,
    ),
    "smollm2": Table(
        ("smollm2/current",),
        (
            "prompt",
            "tokens",
            "weights on the device",
            "kv",
            "activation",
            "hybrid",
            "auto",
            "least margin",
            "output begins",
        ),
        tables.smollm2,
    ),
    "drafts": Table(
        _DRAFTS,
        ("work", "temperature", "tokens", "distinct 4-grams", "n-gram", "suffix", "suffix, after others"),
        tables.drafts,
    ),
    "draft-costs": Table(
        _DRAFTS,
        ("drafter", "draft", "tau", "without loops", "drafted a step", "accepted", "256 requests"),
        tables.draft_costs,
    ),
    "cache-quality": Table(
        ("cache-quality/current",),
        (
            "model, text",
            "rounded",
            "perplexity",
            "divergence",
            "same best",
            "K",
            "V",
            "logits",
            "greedy",
        ),
        tables.cache_quality,
    ),
    "model-sizes": Table(
        _MODELS,
        ("shape", "`model_type`", "parameters", "weights", "context", "KV a token", "ratio", "what takes less"),
        tables.model_sizes,
    ),
    "model-plans": Table(
        _MODELS,
        ("shape", "24 GiB: tokens/s", *_OF_PLAN, "80 GiB: tokens/s", *_OF_PLAN),
        tables.model_plans,
    ),
    "model-machine": Table(
        _MODELS,
        ("calibration", "host to GPU", "GPU to host", "GEMMs", "weights read", "host memory"),
        tables.model_machine,
    ),
    "overview": Table(
        (*_POLICIES[:3], *_CODING[2:]),
        ("weights and caches all on the host", "policy", *_STEP, "tokens/s"),
        tables.overview,
    ),
    "placed": Table(
        _PLACED, ("placed by the planner in 24 GiB", "plan", "step", "predicted", "tokens/s"), tables.placed
    ),
    "beside": Table(
        ("peers/host", "peers/budget", "peers/resident", _PROMPTS[0], "mixed/come-and-go", "serving/grpc-cost"),
        ("measured", "what"),
        tables.beside,
    ),
    "commands": Table(_ALL, ("file", "command", "commit", "date"), tables.commands),
}


def render(name: str, page: Path) -> str:
    """The table's lines, and the way to the files they come from. KeyError: there is no such table."""
    table = TABLES[name]
    lines = ["| " + " | ".join(row) + " |" for row in _rows(table)]
    lines.insert(1, "|" + "---|" * len(table.columns))
    if table.sources and page.parent != RESULTS:
        lines += ["", *_raw(table.sources, os.path.relpath(RESULTS, page.parent))]
    return "\n".join(lines) + "\n"


def filled(text: str, page: Path) -> str:
    """The page with every table as its results have it."""

    def write(found: re.Match[str]) -> str:
        return f"<!-- table: {found['name']} -->\n{render(found['name'], page)}<!-- end -->"

    return MARKED.sub(write, text)


def stale(page: Path) -> list[str]:
    """Names of the page's tables that differ from what the results say."""
    found = MARKED.finditer(page.read_text(encoding="utf-8"))
    return [match["name"] for match in found if match["table"] != render(match["name"], page)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages. Returns the exit status."""
    parser = argparse.ArgumentParser(description="writes the tables of the documents from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing, and say which tables are stale")
    options = parser.parse_args(arguments)
    old = False
    for page in (ROOT / name for name in PAGES):
        for name in stale(page):
            change = "is stale: run python -m benchmarks.render" if options.check else "written"
            print(f"{page.relative_to(ROOT)}: table {name} {change}")
            old = True
        if not options.check:
            page.write_text(filled(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    return int(old and options.check)


def _rows(table: Table) -> Iterator[Row]:
    yield table.columns
    for row in table.rows([raw_results.read(source) for source in table.sources]):
        if len(row) != len(table.columns):
            raise ValueError(f"a row has {len(row)} cells, its table {len(table.columns)} columns: {row}")
        yield row


def _raw(sources: Sequence[str], results: str) -> list[str]:
    """Lines that lead to the raw files, by folder, and to their commands."""
    by_folder: dict[str, list[str]] = {}
    for source in sources:
        folder, _, case = source.partition("/")
        by_folder.setdefault(folder, []).append(case)
    folders = ", ".join(f"[{folder}]({results}/{folder}) ({_listed(cases)})" for folder, cases in by_folder.items())
    return textwrap.wrap(
        f"Raw: {folders}; [commands]({results}/README.md).", 120, break_long_words=False, break_on_hyphens=False
    )


def _listed(cases: Sequence[str]) -> str:
    """Names of the files, or how many there are."""
    return ", ".join(cases) if len(cases) <= 4 else f"{len(cases)} files"


if __name__ == "__main__":
    sys.exit(main())
