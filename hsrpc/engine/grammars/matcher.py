"""A request's constraint under way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import llguidance
import numpy as np
from numpy.typing import NDArray

from hsrpc.constraint import Constraint
from hsrpc.engine.grammars.notation import LIMITS

Masks: TypeAlias = NDArray[np.int32]
"""[rows, ceil(vocabulary / 32)], a bit for each token."""

_AT_ONCE = 0.05
"""Seconds to compile a constraint that may be compiled again while a step waits."""


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A constraint, compiled. Matchers copied from it share its bounds, and what they find out about expressions."""

    constraint: Constraint
    notation: str
    vocabulary: llguidance.LLTokenizer
    original: llguidance.LLMatcher
    seconds: float
    """That compiling took."""

    def fresh(self) -> llguidance.LLMatcher:
        """A matcher that shares nothing."""
        return llguidance.LLMatcher(self.vocabulary, self.notation, log_level=0, limits=LIMITS)


class Matcher:
    """Follows the output of one request.

    `push` is for the event loop, `matched` for any thread between two steps, the rest for the thread that makes masks.
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.failure: str | None = None
        self._native = compiled.original.deep_copy()
        self._is_shared = True
        self._token_ids: list[int] = []
        self._num_taken = 0
        """Tokens that `_native` has."""
        self._masks: Future[Masks] | None = None
        self._row = 0

    def push(self, token_id: int) -> None:
        self._token_ids.append(token_id)

    def allowed(self, num_drafted: int = 0) -> NDArray[np.int32]:
        assert self._masks is not None  # begun before the step is sampled
        masks = self._masks.result()
        row: NDArray[np.int32] = masks[self._row + num_drafted]
        return row

    def matched(self, draft: Sequence[int]) -> int:
        native, size = self.catch_up(), self.compiled.vocabulary.vocab_size
        if native.is_error():
            return 0
        known = list(takewhile(lambda token_id: token_id < size, draft))  # the library fails at one it does not know
        count = native.validate_tokens(known)
        if not native.is_error():
            return count
        self.go_back()
        return 0

    def expect(self, masks: Future[Masks], row: int) -> None:
        """Have the mask of the next token from that row of what is computed, those along the draft from the next."""
        self._masks, self._row = masks, row

    def catch_up(self) -> llguidance.LLMatcher:
        """The library's matcher, behind all tokens that were pushed."""
        new = self._token_ids[self._num_taken :]
        self._num_taken += len(new)
        if new:
            self._native.consume_tokens(new)
        return self._native

    @property
    def problem(self) -> str | None:
        """Why the library goes no further, though the output is not at its end; None: it does."""
        return self._native.get_error().split("\n", 1)[0] if self._native.is_error() else None

    def go_back(self) -> None:
        """Forget what was tried along a draft, which came to a bound."""
        self._native, self._num_taken = self.compiled.original.deep_copy(), 0

    def begin_again(self) -> bool:
        """Take a matcher that shares no bounds with others', where it did; False where that is of no use, or slow."""
        if not self._is_shared or self.compiled.seconds > _AT_ONCE:
            return False
        self._native, self._is_shared, self._num_taken = self.compiled.fresh(), False, 0
        return True

    def fail(self, problem: str) -> None:
        """Give up: no token is allowed any more."""
        place = f"token {len(self._token_ids) + 1} of the output"
        self.failure = (
            f"cannot be followed beyond {place} ({problem}); make it simpler, or one that some text satisfies"
        )
