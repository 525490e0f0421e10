"""Holds what a GPU answers beyond greedy tokens against the CPU: masks, penalties, draws, scores, shared prefixes.

The bundled model in float32, with its weights and caches on the device and on the host; the CPU's own answers are held
to transformers' by tests. Outputs must match their constraints, and log-probabilities the CPU's within `CLOSE`; how
many outputs are equal throughout is printed, since GEMMs of other shapes round differently.

    python -m benchmarks.gpu_outputs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import CachePolicy, DeviceKind, DType, Placement
from hsrpc.constraint import Choice, Constraint, JsonSchema, Regex
from hsrpc.request import Delta

CLOSE = 2e-3
"""Between two log-probabilities of one token."""
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["fox", "owl"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
_PHONE = r"\+[0-9]{2}( [0-9]{1,4}){1,3}"
_CHOICES = ("a fox", "an owl", "nobody at all")
_TALE = "Once upon a time there was a little fox who lived in the forest with her mother and her brothers. " * 3
"""What prompts have in common: several blocks."""


class Asked(NamedTuple):
    """A request, and what its text must be."""

    prompt: str
    params: SamplingParams
    holds: Callable[[str], object] = bool


class Setting(NamedTuple):
    """Where weights and caches lie."""

    placement: Placement
    policy: CachePolicy


SETTINGS = (
    Setting(Placement.AUTO, CachePolicy.KV),
    Setting(Placement.HOST, CachePolicy.KV),
    Setting(Placement.HOST, CachePolicy.ACTIVATION),
)


def _is_animal(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["name", "age", "kind"] and 0 <= found["age"] <= 99 and found["kind"] in ("fox", "owl")


def requests() -> list[Asked]:
    """All that is asked, at once."""
    constraints: tuple[tuple[Constraint, Callable[[str], object]], ...] = (
        (JsonSchema(_SCHEMA), _is_animal),
        (Regex(_PHONE), lambda text: re.fullmatch(_PHONE, text)),
        (Choice(_CHOICES), _CHOICES.__contains__),
    )
    constrained = [
        Asked(f"{_TALE} Question {number}:", replace(draw, constraint=constraint, max_tokens=90), holds)
        for number, (constraint, holds) in enumerate(constraints)
        for draw in (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=11, top_k=30))
    ]
    scored = [
        Asked(_TALE[: 40 + 100 * number], SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3))
        for number in range(3)
    ]
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {40: 2.0}}
    free = [
        Asked(f"{_TALE} Then {name} said", SamplingParams(max_tokens=24, ignore_eos=True, **settings))
        for name in ("Tom", "Lily", "Ben")
        for settings in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}, penalties | {"seed": 4})
    ]
    return [*constrained, *scored, *free]


async def answers(asked: Sequence[Asked], device: DeviceKind, setting: Setting) -> list[list[Delta]]:
    """What an engine makes of the requests."""
    config = EngineConfig(
        device=device,
        dtype=DType.FLOAT32,
        gpu_memory="2GiB",
        host_memory="1GiB",
        placement=setting.placement,
        cache_policy=setting.policy,
        min_batch=8,
        max_batch=8,
        max_prefill_tokens=64,
    )
    async with Engine(config) as engine:

        async def one(each: Asked) -> list[Delta]:
            return [delta async for delta in engine.generate(each.prompt, each.params)]

        found = await asyncio.gather(*map(one, asked))
        print(f"{device} {setting.placement} {setting.policy}: {engine.stats().cached_tokens} tokens found", flush=True)
        return found


def check(asked: Sequence[Asked], found: Sequence[Sequence[Delta]], wanted: Sequence[Sequence[Delta]]) -> int:
    """Number of outputs that are equal throughout.

    Raises:
        AssertionError: an output does not match what was asked, or a score is not the CPU's.
    """
    for each, deltas in zip(asked, found, strict=True):
        assert each.holds(_text(deltas)), f"{each.params}: {_text(deltas)!r}"
    for ours, theirs in zip(found, wanted, strict=True):
        scores = [[each for delta in deltas for each in delta.prompt_logprobs] for deltas in (ours, theirs)]
        for one, other in zip(*scores, strict=True):
            assert one.token_id == other.token_id, (one, other)
            assert abs(one.logprob - other.logprob) < CLOSE, (one, other)
    return sum(_text(ours) == _text(theirs) for ours, theirs in zip(found, wanted, strict=True))


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask the CPU once and the device in each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=DeviceKind, default=DeviceKind.CUDA, choices=(DeviceKind.CUDA, DeviceKind.CPU))
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")  # an environment variable of some images says otherwise
    asked = requests()
    wanted = asyncio.run(answers(asked, DeviceKind.CPU, SETTINGS[0]))
    for setting in SETTINGS:
        found = asyncio.run(answers(asked, options.device, setting))
        print(f"  {check(asked, found, wanted)} of {len(asked)} outputs equal throughout", flush=True)


if __name__ == "__main__":
    main()
