"""A request's output as a front end sends it: cut into pieces, and sent when it is time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hsrpc.errors import RequestFailedError
from hsrpc.request import Delta, SamplingParams
from hsrpc.server.engine_protocol import Generation
from hsrpc.server.observation import note_output
from hsrpc.server.pacing import Pace, Pacer, split
from hsrpc.server.state import ServerState


class Stream:
    """Async iterator over deltas of at most `pace.max_tokens` tokens; ends after the one with `finish`.

    Asking for a delta says that those before it have been sent.

    Raises:
        EngineFaultError: while iterating, when the engine died.
        RequestFailedError: while iterating, when the request cannot go on, or stops without a finish.
        NotServingError: while iterating, when draining has taken too long.
    """

    def __init__(self, generation: Generation, pace: Pace, pacer: Pacer, state: ServerState) -> None:
        self.pace = pace
        self._generation = generation
        self._pacer = pacer
        self._state = state
        self._pieces: Iterator[Delta] | None = None
        """What is left of the output taken last; None before the first."""
        self._ended = False
        self._lead = ""

    @property
    def request_id(self) -> str:
        return self._generation.request_id

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self._generation.prompt_token_ids

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found and not computed, from the first delta on."""
        return self._generation.cached_tokens

    @property
    def params(self) -> SamplingParams:
        """Settings in effect: `seed` and `max_tokens` filled in, and what exceeds context or vocabulary cut."""
        return self._generation.params

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        delta = next(self._pieces, None) if self._pieces else None
        if delta is None:
            delta = await self._take()
        self._ended = delta.finish is not None
        return delta

    def lead_with(self, text: str) -> None:
        """Begin the output with `text`, before anything is taken."""
        self._lead = text

    async def turn(self) -> None:
        """Wait for this stream's turn to send: a front end calls it before each message."""
        await self._pacer.turn()

    async def _take(self) -> Delta:
        """The first piece of what has gathered."""
        if self._pieces is not None:
            await self._pacer.gather(self._generation, self.pace, self._state.live)
        try:
            output = await anext(self._generation)
        except StopAsyncIteration:
            raise RequestFailedError(f"request {self.request_id} ended without a finish") from None
        note_output(output)
        if self._lead:
            output, self._lead = replace(output, text=self._lead + output.text), ""
        self._pieces = split(output, self.pace.max_tokens)
        return next(self._pieces)
