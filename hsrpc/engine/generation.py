"""A request's output on its way to the consumer: merged while nobody takes it, so it costs bounded memory."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain

from hsrpc.errors import HsrpcError
from hsrpc.request import Delta, SamplingParams


class Generation:
    """Async iterator over a request's deltas; ends after the one with `finish`.

    Raises:
        EngineFaultError: while iterating, when the engine died.
        GaveWayError: while iterating, when it waited in a full queue and a client with fewer requests there had one.
        RequestFailedError: while iterating, when this request alone cannot go on.
    """

    def __init__(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, abort: Callable[[], object]
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt)
        self.params = params
        """Settings in effect: `seed` and `max_tokens` are filled in, and what exceeds context or vocabulary is cut."""
        self.cached_tokens = 0
        """Tokens of the prompt that were found and not computed, from the first output on."""
        self._abort = abort
        self._pending: list[Delta] = []
        self._num_pending = 0
        """Tokens in `_pending`."""
        self._wanted = 0
        """Tokens that wake the consumer; fewer do not."""
        self._due = 0.0
        """Monotonic time from which any output does."""
        self._error: HsrpcError | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        while not (self._pending or self._error or self._ended):
            self._arrived.clear()
            await self._arrived.wait()
        if self._ended:
            raise StopAsyncIteration
        if not self._pending:
            self._ended = True
            # Without the way it took in other requests, which share it.
            raise self._error.with_traceback(None) if self._error else StopAsyncIteration
        delta = _merge(self._pending)
        self._pending, self._num_pending = [], 0
        self._ended = delta.finish is not None
        return delta

    async def gather(self, seconds: float, tokens: int | None, soonest: float | None = None) -> None:
        """Let output gather for `seconds`; return sooner with `tokens` of it, or once it has ended.

        Output that comes when `soonest` seconds have passed ends it too: it goes with its step, and needs no timer.
        """
        self._wanted = tokens or sys.maxsize
        self._due = time.monotonic() + (seconds if soonest is None else soonest)
        self._arrived.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._arrived.set)
        try:
            if not self._is_enough():
                await self._arrived.wait()
        finally:
            timer.cancel()
            self._wanted = 0

    def _is_enough(self) -> bool:
        ended = self._ended or self._error is not None or bool(self._pending and self._pending[-1].finish)
        return ended or self._num_pending >= self._wanted

    def close(self) -> None:
        """End it here: a request that is still live is aborted, and what was not taken is dropped."""
        self._ended = True
        self._pending, self._num_pending = [], 0
        self._arrived.set()
        self._abort()

    def put(self, delta: Delta) -> None:
        """Add output; engine only."""
        self._pending.append(delta)
        self._num_pending += len(delta.token_ids)
        if delta.finish or self._num_pending >= self._wanted or time.monotonic() >= self._due:
            self._arrived.set()

    def fail(self, error: HsrpcError) -> None:
        """End with an error, after what was put before; engine only."""
        self._error = error
        self._arrived.set()


def _merge(deltas: Sequence[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        deltas[-1].finish,
        tuple(chain.from_iterable(delta.prompt_logprobs for delta in deltas)),
    )
