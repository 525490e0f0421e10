"""How deltas become portions: gathered so that there are fewer messages, split so that none is too large."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from hsrpc.request import Delta

_MAX_MESSAGES_PER_SECOND = 1_000
"""Of all streams: a few percent of the event loop's core, which the engine needs for its next step."""
MAX_DELAY = 0.05
"""Seconds that output waits for more at most; streams too many for it send more messages than that."""


class Turns:
    """Lets a bounded number pass in one iteration of the event loop, so that a step's tokens do not hold it up."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._passed = 0
        """In this iteration; where it is not 0, `_begin` is scheduled for the next one."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return in this iteration if there is room, else in a later one, in order of arrival."""
        if self._passed >= self._most:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            return
        self._pass()

    def _begin(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._most:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._pass()

    def _pass(self) -> None:
        if not self._passed:
            asyncio.get_running_loop().call_soon(self._begin)
        self._passed += 1


class Timetable:
    """When streams may send again, evenly spread: messages in bunches would hold up the event loop for a whole step.

    What gathers from a stream's time on goes with the step that made it, when the loop is awake and the engine's
    threads are between steps: in the middle of one, each wake-up of the loop would take the interpreter from them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = 0.0
        """The latest time given away."""

    def delay(self, streams: int) -> float:
        """Seconds that one of `streams`, which has sent now, leaves before it sends again: to a time of its own."""
        now = self._clock()
        apart = min(1 / _MAX_MESSAGES_PER_SECOND, MAX_DELAY / max(1, streams))
        self._last = min(max(self._last, now) + apart, now + MAX_DELAY)
        return self._last - now


def split(delta: Delta, most: int | None) -> Iterator[Delta]:
    """`delta` in pieces of at most `most` tokens; the first has the text, the last the finish."""
    size = len(delta.token_ids)
    if most is None or size <= most:
        yield delta
        return
    for start in range(0, size, most):
        end = start + most
        yield Delta(
            text="" if start else delta.text,
            token_ids=delta.token_ids[start:end],
            logprobs=delta.logprobs[start:end],
            finish=delta.finish if end >= size else None,
        )
