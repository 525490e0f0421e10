"""The live requests and their consumers: a task makes text of a step's tokens, off the event loop, and hands it out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from hsrpc.engine.generation import Generation
from hsrpc.engine.no_tokenizer import NoTokenizer
from hsrpc.engine.tasks.text import Transcript, next_deltas
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.errors import HsrpcError, InvalidRequestError, NotFiniteError, RequestFailedError
from hsrpc.prompt import CHAT_HINT
from hsrpc.request import Delta, Finish, FinishReason, SamplingParams
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output, Scheduler
from hsrpc.text.detokenizer import Detokenizer
from hsrpc.text.stop_strings import StopMatcher

_log = logging.getLogger(__name__)

OUTPUT_STEPS = 2
"""Steps whose output may wait for detokenising before the next one does."""


class _Outputs(NamedTuple):
    """What goes to the consumers together."""

    items: Sequence[Output]
    is_step: bool
    """Whether it is a step's output, which holds a place in the semaphore."""


class Delivery:
    """Each live request has a transcript, by its id; whatever ends a request, it ends here and in the scheduler."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | NoTokenizer, dtype: str) -> None:
        """`dtype`: name of the element type that the model computes in, for errors."""
        self.live: dict[str, Transcript] = {}
        self.failed_in_a_row = 0
        """Requests that could not go on since one last ended with output."""
        self._dtype = dtype
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        # Unbounded, but holds at most OUTPUT_STEPS steps (by the semaphore) and one end of each live request.
        self._outputs: asyncio.Queue[_Outputs] = asyncio.Queue()
        self._room = asyncio.Semaphore(OUTPUT_STEPS)
        self._has_hinted = False

    def integrity(self) -> dict[str, object]:
        """What is on its way to consumers, by name; empty where nothing is."""
        found = {
            "transcripts": list(self.live),
            "outputs": self._outputs.qsize(),
            "output places": OUTPUT_STEPS - self._room._value,
        }
        return {name: value for name, value in found.items() if value}

    def open(
        self, request: Request, effective: SamplingParams, detokenizer: Detokenizer, *, is_text: bool
    ) -> Generation:
        """The consumer's side of a new request, whose settings in effect are `effective`; its prompt may be text."""
        prompt = request.token_ids[: request.num_prompt_tokens]
        generation = Generation(request.request_id, prompt, effective, partial(self.leave, request))
        stops = StopMatcher(request.params.stop, request.params.include_stop)
        tokens = {stop: self._tokenizer.special_token_id(stop) for stop in request.params.stop}
        stop_tokens = {token_id: stop for stop, token_id in tokens.items() if token_id is not None}
        self.live[request.request_id] = Transcript(
            request, generation, detokenizer, stops, stop_tokens, is_text, self._timer(request)
        )
        return generation

    async def run(self) -> None:
        """Make text and hand it out; ends by cancellation."""
        while True:
            items, is_step = await self._outputs.get()
            live = [(self.live[item.request.request_id], item) for item in items if self._is_live(item.request)]
            deltas = await self._tokenizer.run(next_deltas, live, time.monotonic())
            for (transcript, item), delta in zip(live, deltas, strict=True):
                self._deliver(transcript, item, delta)
            if is_step:
                self._room.release()

    async def put(self, outputs: Sequence[Output]) -> None:
        """The output of a step; waits while that of steps before it is not made into text."""
        await self._room.acquire()
        self._outputs.put_nowait(_Outputs(outputs, is_step=True))

    def end(self, request: Request, reason: FinishReason) -> bool:
        """End a request from outside a step: its text so far is flushed, its blocks are freed with the step.

        False where it has ended; another may have its id by now.
        """
        if not self._is_live(request) or self._scheduler.finish(request.request_id, reason) is None:
            return False
        self._outputs.put_nowait(_Outputs([Output(request, finish=reason)], is_step=False))
        return True

    def leave(self, request: Request) -> None:
        """Nobody takes its output any more: it ends without a last delta, and its id is free at once."""
        if self._is_live(request):
            self._close(self.live[request.request_id])

    def fail(self, request: Request, error: HsrpcError) -> None:
        """End a request with an error for its consumer."""
        if self._is_live(request):
            transcript = self.live[request.request_id]
            self._close(transcript)
            transcript.generation.fail(error)

    def fail_all(self, error: HsrpcError) -> None:
        for transcript in list(self.live.values()):
            self.fail(transcript.request, error)

    def _deliver(self, transcript: Transcript, output: Output, delta: Delta | RequestFailedError) -> None:
        if not self._is_live(transcript.request):
            return  # ended while its text was made
        if output.failed and (problem := _unmatched(transcript.request)) is not None:
            self.fail(transcript.request, problem)
            return
        if output.failed:
            delta = NotFiniteError(self._dtype)
            _log.error("request %s: %s", transcript.request.request_id, delta)
        if isinstance(delta, RequestFailedError):
            self.failed_in_a_row += 1
            self.fail(transcript.request, delta)
            return
        transcript.generation.cached_tokens = transcript.request.cached_tokens or 0
        transcript.generation.put(delta)
        if delta.finish is not None:
            if delta.finish.usage.completion_tokens or delta.finish.reason is FinishReason.MAX_TOKENS:
                self.failed_in_a_row = 0
            self._close(transcript, delta.finish.reason)
            self._hint(transcript, delta.finish)

    def _hint(self, transcript: Transcript, finish: Finish) -> None:
        """Tell the log once what may be wrong where text is answered with nothing."""
        if finish.is_nothing and transcript.is_text and self._tokenizer.has_chat_template and not self._has_hinted:
            self._has_hinted = True
            _log.warning(CHAT_HINT)

    def _close(self, transcript: Transcript, reason: FinishReason = FinishReason.ABORTED) -> None:
        del self.live[transcript.request.request_id]
        if transcript.timer is not None:
            transcript.timer.cancel()
        self._scheduler.finish(transcript.request.request_id, reason)

    def _is_live(self, request: Request) -> bool:
        transcript = self.live.get(request.request_id)
        return transcript is not None and transcript.request is request

    def _timer(self, request: Request) -> asyncio.TimerHandle | None:
        limit = request.params.time_limit
        if limit is None:
            return None
        return asyncio.get_running_loop().call_later(limit, self.end, request, FinishReason.TIME_LIMIT)


def _unmatched(request: Request) -> InvalidRequestError | None:
    """What is wrong with the constraint of a request that has no next token; None: it is not the constraint."""
    constraint, failure = request.params.constraint, request.matcher and request.matcher.failure
    return None if constraint is None or not failure else InvalidRequestError(constraint.field, failure)
