"""Compiles the constraints of requests, and makes the masks of a step's tokens, off the event loop."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

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
        matchers = [row.matcher for row in rows if isinstance(row.matcher, Matcher)]
        if matchers:
            masks = self._masks.submit(self._fill, matchers)
            for row, matcher in enumerate(matchers):
                matcher.expect(masks, row)

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

    def _fill(self, matchers: Sequence[Matcher]) -> Masks:
        masks = np.zeros((len(matchers), self._num_words), dtype=np.int32)
        try:
            self._fill_all(matchers, masks)
        except Exception as error:
            # What the library does not foresee is the fault of these requests alone.
            _log.error("masks of %d requests cannot be made", len(matchers), exc_info=error)
            for matcher in matchers:
                matcher.fail("internal error")
            masks[:] = 0
        return masks

    def _fill_all(self, matchers: Sequence[Matcher], masks: Masks) -> None:
        self._fill_rows(matchers, range(len(matchers)), masks)
        again = [row for row, matcher in enumerate(matchers) if matcher.problem and matcher.begin_again()]
        self._fill_rows(matchers, again, masks)
        for row, matcher in enumerate(matchers):
            if (problem := matcher.problem) is not None:
                matcher.fail(problem)
                masks[row] = 0

    def _fill_rows(self, matchers: Sequence[Matcher], rows: Sequence[int], masks: Masks) -> None:
        if not rows:
            return
        if self._pool is None:
            self._pool = llguidance.LLExecutor()
        wanted = [(matchers[row].catch_up(), row) for row in rows]
        self._pool.unsafe_compute_mask_ptr(wanted, masks.ctypes.data, masks.strides[0], len(masks))


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
