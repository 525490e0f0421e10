"""Requests to measure with: random tokens, lengths uniform or like those of chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

_SIGMA = 0.8
"""Spread of the logarithm of lengths: the longest tenth has about half of the tokens."""
_FIRST_ID = 4
"""Below are special tokens in the families served."""


class Lengths(StrEnum):
    """How the requests' lengths are distributed."""

    UNIFORM = "uniform"
    """All alike."""
    SHAREGPT_LIKE = "sharegpt-like"
    """Log-normal with the same mean, cut at four times the mean."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, and how many tokens each request generates."""

    prompts: Sequence[Sequence[int]]
    output_tokens: Sequence[int]
    shared: int = 0
    """First tokens that are those of all prompts."""

    def like_it(self) -> Workload:
        """Requests of the same lengths that find no block of these, but of what all share."""
        prompts = [[*prompt[: self.shared], *reversed(prompt[self.shared :])] for prompt in self.prompts]
        return replace(self, prompts=prompts)

    @property
    def longest(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return max(len(prompt) + count for prompt, count in zip(self.prompts, self.output_tokens, strict=True))


def make_workload(
    lengths: Lengths,
    *,
    count: int,
    prompt: int,
    output: int,
    vocab_size: int,
    longest: int | None = None,
    shared: int = 0,
    seed: int = 0,
) -> Workload:
    """`count` requests of `prompt` tokens that generate `output` tokens, exactly or on average.

    Drawn lengths are cut so that no request has more than `longest` tokens. The first `shared` of each prompt are those
    of all others.
    """
    rng = np.random.default_rng(seed)
    sizes, outputs = (_lengths(lengths, count, mean, rng) for mean in (prompt, output))
    if longest is not None and lengths is not Lengths.UNIFORM:
        outputs = [min(size, longest - 1) for size in outputs]
        sizes = [min(size, longest - out) for size, out in zip(sizes, outputs, strict=True)]
    prompts = [rng.integers(_FIRST_ID, vocab_size, size).tolist() for size in sizes]
    prefix = max(prompts, key=len)[:shared]
    return Workload([[*prefix, *prompt[shared:]][: len(prompt)] for prompt in prompts], outputs, shared)


def _lengths(lengths: Lengths, count: int, mean: int, rng: np.random.Generator) -> list[int]:
    if lengths is Lengths.UNIFORM:
        return [mean] * count
    drawn = rng.lognormal(math.log(mean) - _SIGMA**2 / 2, _SIGMA, count)
    return [int(value) for value in np.clip(drawn, 1, 4 * mean)]
