"""How deltas become portions: merged so that there are fewer messages, split so that none is too large."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from hsrpc.core.request import Delta


async def merge(deltas: AsyncIterator[Delta], delay: float, most: int | None) -> AsyncGenerator[Delta]:
    """The first delta at once; then what comes within `delay` s in one, sooner at `most` tokens or at the end."""
    if not delay:
        async for delta in deltas:
            yield delta
        return
    coming, wait = _take(deltas), 0.0
    try:
        while (held := await coming) is not None:
            deadline = asyncio.get_running_loop().time() + wait
            coming, wait = _take(deltas), delay
            while held.finish is None and len(held.token_ids) < (most or sys.maxsize):
                more = await _result_by(deadline, coming)
                if more is None:
                    break
                held, coming = join(held, more), _take(deltas)
            yield held
    finally:
        coming.cancel()


def join(first: Delta, second: Delta) -> Delta:
    """Both deltas as one."""
    return Delta(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        finish=second.finish,
    )


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


def _take(deltas: AsyncIterator[Delta]) -> asyncio.Future[Delta | None]:
    """The next delta as a future that outlives a time-out; None at the end."""
    return asyncio.ensure_future(_next(deltas))


async def _next(deltas: AsyncIterator[Delta]) -> Delta | None:
    return await anext(deltas, None)


async def _result_by(deadline: float, coming: asyncio.Future[Delta | None]) -> Delta | None:
    """What comes before `deadline` (event loop seconds); None if nothing does. `coming` stays as it is."""
    remaining = deadline - asyncio.get_running_loop().time()
    done, _ = await asyncio.wait({coming}, timeout=max(0.0, remaining))
    return coming.result() if done else None
