"""How deltas become portions: gathered so that there are fewer messages, split so that none is too large."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator

from hsrpc.core.request import Delta
from hsrpc.server.contract import Generation

_MAX_MESSAGES_PER_SECOND = 10_000
"""Of all streams; half of what one core can send."""
_MAX_PACE = 0.05
"""Seconds."""


class Turns:
    """Lets a bounded number pass in one iteration of the event loop, so that a step's tokens do not hold it up."""

    def __init__(self, most: int = 32) -> None:
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


def pace(streams: int) -> float:
    """Seconds that a stream leaves between its messages, so that many streams do not hold up the event loop."""
    return min(_MAX_PACE, streams / _MAX_MESSAGES_PER_SECOND)


async def gathered(generation: Generation, delay: Callable[[], float], most: int | None) -> AsyncGenerator[Delta]:
    """What there is, at once; what comes within `delay()` s after it in one, sooner at `most` tokens or at the end."""
    async for delta in generation:
        yield delta
        await generation.gather(delay(), most)


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
