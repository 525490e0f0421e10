"""A greedy output beside a reference's: how many tokens are equal, and how near the two were where they part."""

from __future__ import annotations

from typing import NamedTuple

TIE = 1e-3
"""Logits by which the reference prefers its own token, at most, where float32's rounding may decide."""


class Comparison(NamedTuple):
    """An output of the engine beside the reference's. As text: a few words."""

    equal: int
    """Tokens up to the first difference."""
    of: int
    """Tokens of the longer one."""
    margin: float | None
    """At the first difference, by which the reference preferred its own token; None: there is none, or one ended."""

    @property
    def is_equal(self) -> bool:
        return self.equal == self.of

    @property
    def is_tie(self) -> bool:
        return self.margin is not None and self.margin < TIE

    def __str__(self) -> str:
        counted = f"{self.equal} of {self.of}"
        if self.is_equal:
            return counted
        if self.margin is None:
            return f"{counted}, then one ends"
        return f"{counted}, then {'a tie' if self.is_tie else 'other tokens'} ({self.margin:.1g})"
