"""What caches in 8 bits do to the output of SmolLM2-135M-Instruct, of the bundled model, and of random ones.

Each format, and each part of one, rounds inputs of the projections to K and V, their weights, or K and V themselves,
within transformers' models in float32, by hsrpc's own rows. Compared with the same model without it are perplexity, the
distribution of each next token, the best one, and K and V. Texts are a page of these documents, and what the model
itself writes at temperature 1. For the formats that hsrpc serves, its engine goes on greedily with some prompts, and
the tokens are counted until one differs from what it gives without rounding.

    pip install gguf
    python -m benchmarks.cache_quality --json cache-quality.json
    python -m benchmarks.cache_quality --directory path/to/a/model/with/k_proj --page docs/architecture.md
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.from_gguf import add_checkpoint_options, ensure_checkpoint
from benchmarks.record import ROOT, header, write_json
from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import BUNDLED_MODEL, CacheCoding, CachePolicy, DeviceKind, DType
from hsrpc.model.formats.rows import CodedRows, Codes, RowShape

PROGRAM = "python -m benchmarks.cache_quality"
PAGE = ROOT / "docs" / "architecture.md"
BEGINNINGS = (
    "Once upon a time",
    "The little robot",
    "One rainy morning",
    "Mia had a",
    "A horse could pull on rails",
    "The sea was calm that night, and",
)
"""Beginnings: a model continues them to the texts that are scored, and the engine's answers to them are compared."""
WINDOW, GREEDY_TOKENS = 256, 48


class Mode(NamedTuple):
    """What is rounded, and to what; None: it is not."""

    name: str
    kv: Codes | None = None
    activation: Codes | None = None
    weight: Codes | None = None
    """[W_K W_V]"""
    served: tuple[CacheCoding, CachePolicy] | None = None
    """Format and policy under which hsrpc does so; None: it does not."""


MODES = (
    Mode("K and V fp8", kv=Codes.FP8, served=(CacheCoding.FP8, CachePolicy.KV)),
    Mode("K and V int8", kv=Codes.INT8, served=(CacheCoding.INT8, CachePolicy.KV)),
    Mode("activations fp8", activation=Codes.FP8, served=(CacheCoding.INT8, CachePolicy.ACTIVATION)),
    Mode("activations int8", activation=Codes.INT8),
    Mode(
        "activations and weights fp8",
        activation=Codes.FP8,
        weight=Codes.FP8,
        served=(CacheCoding.FP8, CachePolicy.ACTIVATION),
    ),
    Mode(
        "both: activations fp8, K and V int8",
        kv=Codes.INT8,
        activation=Codes.FP8,
        served=(CacheCoding.INT8, CachePolicy.HYBRID),
    ),
    Mode(
        "both: all fp8, weights too",
        kv=Codes.FP8,
        activation=Codes.FP8,
        weight=Codes.FP8,
        served=(CacheCoding.FP8, CachePolicy.HYBRID),
    ),
)
PLAIN = Mode("nothing", served=(CacheCoding.PLAIN, CachePolicy.KV))


class Outcome(NamedTuple):
    """A model's output for a text."""

    logits: torch.Tensor
    """[tokens, vocab]"""
    keys: torch.Tensor
    values: torch.Tensor


def rounded(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """x [..., w] as it comes back of a row of codes; the last dimension shares a scale."""
    rows = CodedRows(RowShape(1, (x.shape[-1],)), torch.float32, codes)
    flat = x.reshape(-1, x.shape[-1])
    return rows.decode(rows.encode(flat)).view(x.shape)


class RoundingCache(DynamicCache):  # type: ignore[misc]
    """K and V of each token, rounded as soon as they are made: a scale for each head."""

    def __init__(self, codes: Codes | None) -> None:
        super().__init__()
        self._codes = codes

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **named: Any) -> Any:
        if self._codes is not None:
            key_states, value_states = rounded(key_states, self._codes), rounded(value_states, self._codes)
        keys, values = super().update(key_states, value_states, *args, **named)
        return keys, values


@contextmanager
def rounding(model: PreTrainedModel, mode: Mode) -> Iterator[None]:
    """Inside it, the model's projections to K and V round their inputs and weights."""
    names = ("k_proj", "v_proj")
    projections = [getattr(module, name) for module in model.modules() for name in names if hasattr(module, name)]
    with ExitStack() as undo:
        for projection in projections:
            if (codes := mode.activation) is not None:
                handle = projection.register_forward_pre_hook(lambda _, given, c=codes: (rounded(given[0], c),))
                undo.callback(handle.remove)
            if mode.weight is not None:
                undo.callback(setattr, projection.weight, "data", projection.weight.data)
                projection.weight.data = rounded(projection.weight.data, mode.weight)
        yield


@torch.inference_mode()
def run(model: PreTrainedModel, token_ids: torch.Tensor, mode: Mode) -> Outcome:
    """Windows [n, w] of a text, each by itself."""
    parts = []
    with rounding(model, mode):
        for window in token_ids:
            past = RoundingCache(mode.kv)
            logits = model(window[None], cache=past, use_cache=True).logits[0]
            layers = past.layers
            parts.append((logits, torch.stack([x.keys[0] for x in layers]), torch.stack([x.values[0] for x in layers])))
    return Outcome(*(torch.cat(part) for part in zip(*parts, strict=True)))


def compare(plain: Outcome, other: Outcome, targets: torch.Tensor) -> dict[str, float]:
    """How far the other output is from the plain one: in nats, and parts of what is compared."""
    plain_logs, logs = (each.logits.log_softmax(-1) for each in (plain, other))
    return {
        "perplexity": math.exp(functional.nll_loss(logs, targets).item()),
        "divergence": (plain_logs.exp() * (plain_logs - logs)).sum(-1).mean().item(),
        "same_best": (plain_logs.argmax(-1) == logs.argmax(-1)).float().mean().item(),
        "key_error": _relative(plain.keys, other.keys),
        "value_error": _relative(plain.values, other.values),
        "logit_error": _relative(plain.logits, other.logits),
    }


def _relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def measure_text(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[str, Any]:
    """All modes on one text, in windows; a target is each token's successor."""
    count = (len(token_ids) - 1) // WINDOW
    ids = torch.tensor(token_ids[: count * WINDOW + 1])
    windows, targets = ids[:-1].view(count, WINDOW), ids[1:]
    plain = run(model, windows, PLAIN)
    found = {mode.name: compare(plain, run(model, windows, mode), targets) for mode in (PLAIN, *MODES)}
    return {"tokens": len(targets), "modes": found}


def own_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """What the model writes of its own at temperature 1, beginning after beginning."""
    torch.manual_seed(0)
    prompts = tokenizer(list(BEGINNINGS), return_tensors="pt", padding=True, padding_side="left")
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": WINDOW}
    found: list[int] = []
    while len(found) <= num_tokens:
        written = model.generate(**prompts, **settings)
        ends = torch.tensor(model.generation_config.eos_token_id)
        for text in written[:, prompts["input_ids"].shape[1] :]:
            is_end = torch.isin(text, ends)
            found += text[: int(is_end.int().argmax()) if is_end.any() else len(text)].tolist()
    return found[: num_tokens + 1]


async def greedy(directory: Path, mode: Mode) -> list[list[int]]:
    """The engine's greedy tokens for each of the beginnings, all at once."""
    assert mode.served is not None
    cache_format, policy = mode.served
    config = EngineConfig(
        model=str(directory),
        device=DeviceKind.CPU,
        dtype=DType.FLOAT32,
        gpu_memory="2GiB",
        host_memory="2GiB",
        cache_format=cache_format,
        cache_policy=policy,
        activation_share=0.5 if policy is CachePolicy.HYBRID else None,
        max_batch=len(BEGINNINGS),
        min_batch=len(BEGINNINGS),
        max_model_len=WINDOW,
    )
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
    async with Engine(config) as engine:

        async def one(prompt: str) -> list[int]:
            return [token async for delta in engine.generate(prompt, params) for token in delta.token_ids]

        return await asyncio.gather(*map(one, BEGINNINGS))


def agreement(plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Tokens before the first that differs, on average over the outputs."""
    equal = (
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(plain, other, strict=True)
    )
    return sum(equal) / len(plain)


def measure_model(directory: Path, page: Path | None, num_tokens: int) -> dict[str, Any]:
    """A model with weights: texts, then the engine's tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    texts = {"its own": measure_text(model, own_text(model, tokenizer, num_tokens))}
    if page is not None:
        ids = tokenizer(page.read_text(encoding="utf-8"))["input_ids"]
        texts[page.name] = measure_text(model, ids[: num_tokens + 1])
    del model
    plain = asyncio.run(greedy(directory, PLAIN))
    tokens = {
        mode.name: agreement(plain, asyncio.run(greedy(directory, mode))) for mode in MODES if mode.served is not None
    }
    return {"texts": texts, "greedy_equal": tokens, "greedy_of": GREEDY_TOKENS}


def random_models() -> dict[str, PreTrainedModel]:
    """Untrained ones, by name: their numbers are normally distributed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4096}
    opt = OPTConfig(**sizes, ffn_dim=2048, word_embed_proj_dim=1024)
    llama = LlamaConfig(**sizes, intermediate_size=2048, num_key_value_heads=2)
    return {"random OPT": OPTForCausalLM(opt).eval(), "random Llama": LlamaForCausalLM(llama).eval()}


def measure(directory: Path, page: Path, num_tokens: int) -> dict[str, Any]:
    """What the file has."""
    found: dict[str, Any] = {
        directory.name: measure_model(directory, page, num_tokens),
        Path(BUNDLED_MODEL).name: measure_model(Path(BUNDLED_MODEL), None, num_tokens),
    }
    for name, model in random_models().items():
        ids = torch.randint(4096, (2 * WINDOW + 1,)).tolist()
        found[name] = {"texts": {"random": measure_text(model, ids)}}
    return {"transformers": transformers.__version__, "window": WINDOW, "models": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint unless it is there, measure, save. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.tokens < WINDOW:
        parser.error(f"--tokens {options.tokens}: less than a window; give {WINDOW} or more")
    about = header([*PROGRAM.split(), *words])
    ensure_checkpoint(parser, options)
    result = measure(options.directory, options.page, options.tokens)
    for model, facts in result["models"].items():
        for text, measured in facts["texts"].items():
            print(f"{model}, {text}, {measured['tokens']} tokens")
            for mode, values in measured["modes"].items():
                print(f"  {mode:36}", *(f"{name} {value:.4g}" for name, value in values.items()))
        for mode, tokens in facts.get("greedy_equal", {}).items():
            print(f"  {mode:36} {tokens:.1f} of {GREEDY_TOKENS} greedy tokens")
    if options.json:
        write_json(options.json, {"header": about, "result": result})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="a text to read (default: docs/architecture.md)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1536, metavar="N", help="tokens of each text (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save what was measured here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
