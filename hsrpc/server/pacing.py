"""When a stream sends, and how much: output gathers so that there are fewer messages, none of which is too large."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hsrpc.errors import InvalidRequestError
from hsrpc.request import Delta
from hsrpc.server.config import MAX_MESSAGE_DELAY, MAX_MESSAGE_TEXT, MAX_MESSAGE_TOKENS, ServerConfig
from hsrpc.server.engine_protocol import Generation

_MAX_MESSAGES_PER_SECOND = 1_000
"""Messages of all streams together: a few percent of the event loop's core, which the engine needs as well."""
_MAX_DELAY = 0.05
"""Seconds that output waits for more at most; streams too many for it send more messages than that."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a client wants its output."""

    max_tokens: int
    """Largest message, tokens."""
    max_delay: float
    """Seconds that output may wait for more; 0 leaves it to the server."""


def choose_pace(config: ServerConfig, max_tokens: int | None, max_delay: float | None) -> Pace:
    """What a client asks for, within bounds; None is as `config` has it.

    Raises:
        InvalidRequestError: for `max_tokens_per_message` or `max_message_delay`.
    """
    tokens = config.max_tokens_per_message if max_tokens is None else max_tokens
    if tokens < 1:
        raise InvalidRequestError("max_tokens_per_message", f"{tokens} is less than 1")
    delay = config.max_message_delay if max_delay is None else max_delay
    if not 0 <= delay <= MAX_MESSAGE_DELAY:
        raise InvalidRequestError("max_message_delay", f"{delay} s is outside [0, {MAX_MESSAGE_DELAY}]")
    return Pace(min(tokens, MAX_MESSAGE_TOKENS), delay)


class Turns:
    """Lets a bounded number pass in one iteration of the event loop, so that a step's tokens do not hold it up."""

    def __init__(self, max_passes: int = 8) -> None:
        self._max_passes = max_passes
        self._passed = 0
        """Passes in this iteration; where it is not 0, `_begin` is scheduled for the next one."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return in this iteration if there is room, else in a later one, in order of arrival."""
        if self._passed >= self._max_passes:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            return
        self._pass()

    def _begin(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._max_passes:
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
        apart = min(1 / _MAX_MESSAGES_PER_SECOND, _MAX_DELAY / max(1, streams))
        self._last = min(max(self._last, now) + apart, now + _MAX_DELAY)
        return self._last - now


class Pacer:
    """Spreads the messages of all streams, over time and over the iterations of the event loop."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._timetable = Timetable()

    async def turn(self) -> None:
        """Wait until one more message may be sent."""
        await self._turns.wait()

    async def gather(self, generation: Generation, pace: Pace, streams: int) -> None:
        """Wait, after a message of one of `streams`, until there should be another."""
        if pace.max_delay:
            await generation.gather(pace.max_delay, pace.max_tokens)
        else:
            await generation.gather(_MAX_DELAY, pace.max_tokens, self._timetable.delay(streams))


def split(delta: Delta, max_tokens: int) -> Iterator[Delta]:
    """`delta` in pieces of at most `max_tokens` tokens and MAX_MESSAGE_TEXT characters; the last has the finish.

    Log-probabilities of the prompt are as many of them as tokens may be, and come before what they share a piece with.
    """
    scored = delta.prompt_logprobs
    if len(scored) > max_tokens:
        *starts, last = range(0, len(scored), max_tokens)
        for start in starts:
            yield Delta(prompt_logprobs=scored[start : start + max_tokens])
        delta = replace(delta, prompt_logprobs=scored[last:])
    num_tokens, length = len(delta.token_ids), len(delta.text)
    num_pieces = max(math.ceil(num_tokens / max_tokens), math.ceil(length / MAX_MESSAGE_TEXT))
    if num_pieces <= 1:
        yield delta
        return
    for i in range(num_pieces):
        tokens = slice(i * max_tokens, (i + 1) * max_tokens)
        yield Delta(
            text=delta.text[i * MAX_MESSAGE_TEXT : (i + 1) * MAX_MESSAGE_TEXT],
            token_ids=delta.token_ids[tokens],
            logprobs=delta.logprobs[tokens],
            finish=delta.finish if i == num_pieces - 1 else None,
            prompt_logprobs=delta.prompt_logprobs if i == 0 else (),
        )
