"""Compiles the constraints of requests, and makes the masks of a step's tokens, off the event loop."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import llguidance
import numpy as np

from hsrpc.constraint import Constraint
from hsrpc.engine.fair_thread import FairThread
from hsrpc.engine.grammars.matcher import Compiled, Masks, Matcher
from hsrpc.engine.grammars.notation import LIMITS
from hsrpc.engine.grammars.trial import STACK_BYTES, Trial
from hsrpc.errors import InvalidRequestError
from hsrpc.schedule.step import SamplingRow

_MAX_CACHED = 64
"""Compiled constraints that are kept; each may come to hold tens of megabytes, most hold some kilobytes."""


_log = logging.getLogger(__name__)


class Grammars:
    """What constrains requests to one model's tokens, on two threads of its own: one compiles, one makes masks.

    A constraint is compiled once, as long as it is among those used last.
    """

    def __init__(self, vocabulary: llguidance.LLTokenizer) -> None:
        self._vocabulary = vocabulary
        self._num_words = -(-vocabulary.vocab_size // 32)
        self._trial = Trial()
        self._compiler = FairThread("hsrpc-constraints", stack_bytes=STACK_BYTES)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="hsrpc-masks")
        self._pool: llguidance.LLExecutor | None = None
        self._cache = _Cache()

    async def matcher(self, constraint: Constraint, client: str) -> Matcher:
        """What follows `constraint`, from the first token of an output on; compiled at `client`'s turn.

        Raises:
            InvalidRequestError: it cannot be compiled, or no text satisfies it.
        """
        compiled = self._cache.get(constraint)
        if compiled is None:
            compiled = await self._compiler.run(client, self._compile_once, constraint)
        return Matcher(compiled)

    def begin(self, rows: Iterable[SamplingRow]) -> None:
        """Begin to make the masks of those rows of a step that are constrained."""
        wanted: list[_Masked] = []
        constrained = ((row.matcher, row.draft) for row in rows if isinstance(row.matcher, Matcher))
        for index, (matcher, draft) in enumerate(constrained):
            if draft:  # its request has a row behind each of these, and one before them
                wanted[-1] = wanted[-1]._replace(draft=draft)
            else:
                wanted.append(_Masked(matcher, index))
        if wanted:
            masks = self._masks.submit(self._fill, wanted)
            for each in wanted:
                each.matcher.expect(masks, each.row)

    def close(self) -> None:
        """End the threads after what was asked of them."""
        self._compiler.finish(self._trial.close)
        self._masks.shutdown(wait=False)

    def _compile_once(self, constraint: Constraint) -> Compiled:
        """Compile it, unless that was done while it waited for its turn."""
        compiled = self._cache.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            self._cache.put(compiled)
        return compiled

    def _compile(self, constraint: Constraint) -> Compiled:
        notation = self._trial.compilable(constraint)
        start = time.monotonic()
        original = llguidance.LLMatcher(self._vocabulary, notation, log_level=0, limits=LIMITS)
        compiled = Compiled(constraint, notation, self._vocabulary, original, time.monotonic() - start)
        first = original.deep_copy()
        first.compute_bitmask()
        if error := original.get_error() or first.get_error():
            gist = error.split("\n", 1)[0]
            raise InvalidRequestError(constraint.field, f"no output can begin to satisfy it ({gist}); change it")
        return compiled

    def _fill(self, wanted: Sequence[_Masked]) -> Masks:
        masks = np.zeros((wanted[-1].end, self._num_words), dtype=np.int32)
        try:
            self._fill_all(wanted, masks)
        except Exception as error:
            # What the library does not foresee is the fault of these requests alone.
            _log.error("masks of %d requests cannot be made", len(wanted), exc_info=error)
            for each in wanted:
                each.matcher.fail("internal error")
            masks[:] = 0
        return masks

    def _fill_all(self, wanted: Sequence[_Masked], masks: Masks) -> None:
        self._fill_rows(wanted, masks)
        # A draft may come to a bound that the output never comes to.
        again = [each.without_draft() for each in wanted if each.draft and each.matcher.problem]
        for each in again:
            each.matcher.go_back()
        self._fill_rows(again, masks)
        again = [each.without_draft() for each in wanted if each.matcher.problem and each.matcher.begin_again()]
        self._fill_rows(again, masks)
        for each in wanted:
            if (problem := each.matcher.problem) is not None:
                each.matcher.fail(problem)
                masks[each.row : each.end] = 0

    def _fill_rows(self, wanted: Sequence[_Masked], masks: Masks) -> None:
        if not wanted:
            return
        if self._pool is None:
            self._pool = llguidance.LLExecutor()
        memory = masks.ctypes.data, masks.strides[0], len(masks)
        alone = [(each.matcher.catch_up(), each.row) for each in wanted if not each.draft]
        along = [(each.matcher.catch_up(), each.row, list(each.draft)) for each in wanted if each.draft]
        if alone:
            self._pool.unsafe_compute_mask_ptr(alone, *memory)
        if along:
            self._pool.unsafe_compute_mask_ptr_with_draft_token(along, *memory)


class _Masked(NamedTuple):
    """A matcher whose masks a step wants, and the rows that they go to."""

    matcher: Matcher
    row: int
    """Row of logits that the next token is sampled from."""
    draft: tuple[int, ...] = ()
    """Tokens behind each of which a mask is wanted too, in the rows that follow."""

    @property
    def end(self) -> int:
        """The row behind its own."""
        return self.row + 1 + len(self.draft)

    def without_draft(self) -> _Masked:
        """The next token's alone."""
        return self._replace(draft=())


class _Cache:
    """Compiled constraints that were used last, by what they say. For any thread."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[tuple[str, str], Compiled] = OrderedDict()
        self._lock = Lock()

    def get(self, constraint: Constraint) -> Compiled | None:
        key = (constraint.field, constraint.text)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is None or compiled.original.is_error():  # a copy has come to the bounds that all share
                return None
            self._compiled.move_to_end(key)
            return compiled

    def put(self, compiled: Compiled) -> None:
        with self._lock:
            self._compiled[compiled.constraint.field, compiled.constraint.text] = compiled
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)


class NoGrammars:
    """Stands in where outputs cannot be constrained. Same calls as `Grammars`."""

    def __init__(self, problem: str) -> None:
        self._problem = problem

    async def matcher(self, constraint: Constraint, client: str) -> Matcher:
        """Raises InvalidRequestError: outputs cannot be constrained."""
        raise InvalidRequestError(constraint.field, f"{self._problem}; leave it out")

    def begin(self, rows: Iterable[SamplingRow]) -> None:
        pass

    def close(self) -> None:
        pass
