"""From tokens to text: detokenises a step's output on the tokenizer's thread, matches stop strings, ends requests."""

from __future__ import annotations

import logging
from asyncio import TimerHandle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsrpc.engine.generation import Generation
from hsrpc.errors import RequestFailedError
from hsrpc.request import Delta, Finish, FinishReason, Usage
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output
from hsrpc.text.detokenizer import Detokenizer
from hsrpc.text.stop_strings import StopMatcher

_log = logging.getLogger(__name__)
_BY_TOKEN = (FinishReason.EOS, FinishReason.STOP_TOKEN)
"""Ends by what the last token is."""


@dataclass(slots=True)
class Transcript:
    """The text of one live request."""

    request: Request
    generation: Generation
    detokenizer: Detokenizer
    stops: StopMatcher
    stop_tokens: Mapping[int, str]
    """Stop strings that are the text of a special token, by its id: a text that leaves it out would not hold them."""
    is_text: bool
    """The prompt was text, and no conversation."""
    timer: TimerHandle | None = None
    """Ends the request at its time limit."""
    num_tokens: int = 0
    """Output tokens delivered."""
    num_accepted: int = 0
    """Those of them that were drafted."""


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
    """The delta that follows from one output. On a stop string its `finish` says so, whatever the output said, and the
    tokens behind the one that completes it are dropped."""
    token_ids, texts, matched = output.token_ids, [], None
    for count, token_id in enumerate(token_ids, 1):
        finish = output.finish if count == len(token_ids) else None
        text, matched = _next_text(transcript, token_id, finish)
        texts.append(text)
        if matched is not None:
            token_ids = token_ids[:count]
            break
    if not token_ids and output.finish is not None:
        text, matched = _last_text(transcript)
        texts.append(text)
    transcript.num_tokens += len(token_ids)
    transcript.num_accepted += max(0, len(token_ids) - 1)
    ended = _finish(transcript, output, matched, now)
    return Delta("".join(texts), token_ids, output.logprobs[: len(token_ids)], ended, output.prompt_logprobs)


def _next_text(transcript: Transcript, token_id: int, finish: FinishReason | None) -> tuple[str, str | None]:
    """What a token adds to the text, where the output ends with it as `finish` says; and the stop string that it
    completes."""
    stop = transcript.stop_tokens.get(token_id)
    if stop is None and finish not in _BY_TOKEN:
        text, matched = transcript.stops.push(transcript.detokenizer.push((token_id,)))
        if matched is not None or finish is None:
            return text, matched
        rest, matched = _last_text(transcript)
        return text + rest, matched
    text, matched = _last_text(transcript)
    return (text, matched) if matched is not None else (text + _end_text(transcript, token_id, stop), stop)


def _last_text(transcript: Transcript) -> tuple[str, str | None]:
    """What was held back, and the stop string that it completes."""
    text, matched = transcript.stops.push(transcript.detokenizer.flush())
    return text + ("" if matched else transcript.stops.flush()), matched


def _end_text(transcript: Transcript, token_id: int, stop: str | None) -> str:
    """The text of the token that ends the output, where it was asked for."""
    if not transcript.request.params.include_stop:
        return ""
    return stop or transcript.detokenizer.push((token_id,)) + transcript.detokenizer.flush()


def _finish(transcript: Transcript, output: Output, matched: str | None, now: float) -> Finish | None:
    reason = FinishReason.STOP_STRING if matched is not None else output.finish
    if reason is None:
        return None
    request = transcript.request
    cached_tokens = request.cached_tokens or 0
    usage = Usage(
        request.num_prompt_tokens,
        transcript.num_tokens,
        request.preemptions,
        cached_tokens,
        request.num_drafted,
        transcript.num_accepted,
    )
    return Finish(reason, usage, request.timings(now), matched if matched is not None else output.matched_stop)
