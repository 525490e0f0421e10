"""From tokens to text: detokenises a step's output on the tokenizer's thread, matches stop strings, ends requests."""

from __future__ import annotations

import logging
from asyncio import TimerHandle
from collections.abc import Sequence
from dataclasses import dataclass

from hsrpc.engine.generation import Generation
from hsrpc.errors import RequestFailedError
from hsrpc.request import Delta, Finish, FinishReason, Usage
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output
from hsrpc.text.detokenizer import Detokenizer
from hsrpc.text.stop_strings import StopMatcher

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Transcript:
    """The text of one live request."""

    request: Request
    generation: Generation
    detokenizer: Detokenizer
    stops: StopMatcher
    timer: TimerHandle | None = None
    """Ends the request at its time limit."""
    num_tokens: int = 0
    """Output tokens delivered."""


def next_deltas(live: Sequence[tuple[Transcript, Output]], now: float) -> list[Delta | RequestFailedError]:
    """The deltas of a step; an error where one request's text cannot be made. Runs on the decoder thread."""
    return [_delta_or_error(transcript, output, now) for transcript, output in live]


def _delta_or_error(transcript: Transcript, output: Output, now: float) -> Delta | RequestFailedError:
    try:
        return next_delta(transcript, output, now)
    except Exception as error:
        # A tokenizer may raise anything; it is the fault of this request alone.
        _log.error("the text of request %s cannot be made", transcript.request.request_id, exc_info=error)
        return RequestFailedError("the tokenizer cannot turn the output into text")


def next_delta(transcript: Transcript, output: Output, now: float) -> Delta:
    """The delta that follows from one output. On a stop string its `finish` says so, whatever the output said."""
    text, matched = "", None
    token_ids = () if output.token_id is None else (output.token_id,)
    transcript.num_tokens += len(token_ids)
    is_stop_token = output.finish is FinishReason.STOP_TOKEN
    if token_ids and not is_stop_token:
        text, matched = transcript.stops.push(transcript.detokenizer.push(token_ids))
    if matched is None and output.finish is not None:
        rest, matched = transcript.stops.push(transcript.detokenizer.flush())
        text += rest + ("" if matched else transcript.stops.flush())
        if is_stop_token and transcript.request.params.include_stop and matched is None:
            text += _stop_token_text(transcript, token_ids)
    finish = _finish(transcript, output, matched, now)
    return Delta(text, token_ids, () if output.logprob is None else (output.logprob,), finish)


def _stop_token_text(transcript: Transcript, token_ids: Sequence[int]) -> str:
    return transcript.detokenizer.push(token_ids) + transcript.detokenizer.flush()


def _finish(transcript: Transcript, output: Output, matched: str | None, now: float) -> Finish | None:
    reason = FinishReason.STOP_STRING if matched is not None else output.finish
    if reason is None:
        return None
    request = transcript.request
    usage = Usage(request.num_prompt_tokens, transcript.num_tokens, request.preemptions)
    return Finish(reason, usage, request.timings(now), matched if matched is not None else output.matched_stop)
