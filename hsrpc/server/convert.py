"""Between messages and the engine's dataclasses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from hsrpc.errors import InvalidRequestError
from hsrpc.request import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Delta,
    Finish,
    FinishReason,
    SamplingParams,
    TokenLogprob,
)
from hsrpc.server.config import MAX_MESSAGE_DELAY, MAX_MESSAGE_TOKENS, ServerConfig
from hsrpc.server.status import NotSupportedError
from hsrpc.v1 import generation_pb2 as v1

MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_LENGTH}}}")

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_SECTIONS = {
    **{field.name: "sampling" for field in v1.Sampling.DESCRIPTOR.fields},
    **{field.name: "stopping" for field in v1.Stopping.DESCRIPTOR.fields},
    **{field.name: "output" for field in v1.Output.DESCRIPTOR.fields},
}


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the service, not the engine, does with a request's output."""

    echo_prompt: bool
    return_token_ids: bool
    max_tokens_per_message: int
    max_message_delay: float
    """Seconds."""


def read_prompt(request: v1.GenerateRequest) -> str | Sequence[int]:
    """The prompt, as text or token ids, which are not copied: their number has not been checked.

    Raises:
        InvalidRequestError: there is none.
    """
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidRequestError("input", "no prompt; set text or token_ids")
    prompt: str | Sequence[int] = request.text if given == "text" else request.token_ids.ids
    if not prompt:
        raise InvalidRequestError(given, "empty; give at least one token")
    return prompt


def read_request_id(request: v1.GenerateRequest) -> str | None:
    """The id that the client gave, if any.

    Raises:
        InvalidRequestError: it is empty, too long, or has other characters.
    """
    return check_request_id(request.request_id) if request.HasField("request_id") else None


def check_request_id(request_id: str) -> str:
    """`request_id`, which may stand in logs as it is.

    Raises:
        InvalidRequestError: it is empty, too long, or has other characters.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        found = f"{len(request_id)} characters" if len(request_id) > MAX_REQUEST_ID_LENGTH else ascii(request_id)
        remedy = f"give 1 to {MAX_REQUEST_ID_LENGTH} of A-Z a-z 0-9 . _ : -"
        raise InvalidRequestError("request_id", f"{found} is no request id; {remedy}")
    return request_id


def read_params(request: v1.GenerateRequest) -> SamplingParams:
    """What the request sets, the rest at its default.

    Raises:
        InvalidRequestError: naming the field by its path in the message.
        NotSupportedError: a field that the engine lacks is set.
    """
    sampling, stopping, output = request.sampling, request.stopping, request.output
    if output.HasField("prompt_logprobs"):
        raise NotSupportedError("output.prompt_logprobs")
    _check_counts(request)
    settings = _given(sampling, _SAMPLING) | _given(stopping, _STOPPING)
    if stopping.HasField("time_limit"):
        settings["time_limit"] = _seconds(stopping.time_limit)
    if output.HasField("logprobs"):
        settings["logprobs"] = output.logprobs
    settings |= {"logit_bias": dict(sampling.logit_bias), "priority": request.priority}
    settings |= {"stop": tuple(stopping.stop), "stop_token_ids": tuple(stopping.stop_token_ids)}
    try:
        return SamplingParams(**settings)
    except InvalidRequestError as error:
        raise with_path(error, request) from None


def _check_counts(request: v1.GenerateRequest) -> None:
    """Refuse long lists before they are copied."""
    for path, count, most in (
        ("stopping.stop", len(request.stopping.stop), MAX_STOP_STRINGS),
        ("stopping.stop_token_ids", len(request.stopping.stop_token_ids), MAX_STOP_TOKEN_IDS),
        ("sampling.logit_bias", len(request.sampling.logit_bias), MAX_LOGIT_BIAS),
    ):
        if count > most:
            raise InvalidRequestError(path, f"{count} entries, at most {most} are allowed")


def _given(message: Message, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def with_path(error: InvalidRequestError, request: v1.GenerateRequest) -> InvalidRequestError:
    """`error` with its field named by the path in the message: temperature is sampling.temperature."""
    name, bracket, index = error.field.partition("[")
    if name in ("prompt", "prompt_token_ids", "text", "token_ids"):
        path = "token_ids.ids" if request.WhichOneof("input") == "token_ids" else "text"
    else:
        path = f"{_SECTIONS[name]}.{name}" if name in _SECTIONS else name
    return InvalidRequestError(path + bracket + index, error.description)


def read_output(output: v1.Output, config: ServerConfig) -> OutputOptions:
    """How the output is to be sent; where it does not say, as `config` has it.

    Raises:
        InvalidRequestError: naming the field.
    """
    given = output.HasField("max_tokens_per_message")
    most = output.max_tokens_per_message if given else config.max_tokens_per_message
    if most < 1:
        raise InvalidRequestError("output.max_tokens_per_message", f"{most} is less than 1")
    delay = _seconds(output.max_message_delay) if output.HasField("max_message_delay") else config.max_message_delay
    if not 0 <= delay <= MAX_MESSAGE_DELAY:
        raise InvalidRequestError("output.max_message_delay", f"{delay} s is outside [0, {MAX_MESSAGE_DELAY}]")
    return OutputOptions(output.echo_prompt, output.return_token_ids, min(most, MAX_MESSAGE_TOKENS), delay)


def start_message(
    request_id: str, model: str, prompt_token_ids: Sequence[int], params: SamplingParams, options: OutputOptions
) -> v1.Start:
    """Facts about the prompt, and the settings in effect."""
    return v1.Start(
        request_id=request_id,
        model=model,
        prompt_tokens=len(prompt_token_ids),
        sampling=_sampling_message(params),
        stopping=_stopping_message(params),
        output=_output_message(params, options),
        priority=params.priority,
    )


def _sampling_message(params: SamplingParams) -> v1.Sampling:
    return v1.Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        logit_bias=params.logit_bias,
    )


def _stopping_message(params: SamplingParams) -> v1.Stopping:
    return v1.Stopping(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop=params.include_stop,
        time_limit=None if params.time_limit is None else duration(params.time_limit),
    )


def _output_message(params: SamplingParams, options: OutputOptions) -> v1.Output:
    return v1.Output(
        logprobs=params.logprobs,
        echo_prompt=options.echo_prompt,
        return_token_ids=options.return_token_ids,
        max_tokens_per_message=options.max_tokens_per_message,
        max_message_delay=duration(options.max_message_delay),
    )


def add_delta(response: v1.GenerateResponse, delta: Delta, options: OutputOptions) -> None:
    """Put what the client asked for of `delta` behind what `response` has; the field stays unset if that is nothing."""
    if delta.text:
        response.delta.text += delta.text
    if options.return_token_ids and delta.token_ids:
        response.delta.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        response.delta.logprobs.extend(map(_logprob_message, delta.logprobs))
    if delta.finish:
        response.finish.CopyFrom(finish_message(delta.finish))


def _logprob_message(logprob: TokenLogprob) -> v1.TokenLogprob:
    top = [v1.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return v1.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, rank=logprob.rank, top=top)


def finish_message(finish: Finish) -> v1.Finish:
    """How the request ended."""
    usage, timings = finish.usage, finish.timings
    message = v1.Finish(
        reason=v1.FinishReason.Value(f"FINISH_REASON_{finish.reason.value}"),
        usage=v1.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            preemptions=usage.preemptions,
        ),
        timings=v1.Timings(
            queue=duration(timings.queue),
            prefill=duration(timings.prefill),
            decode=duration(timings.decode),
            first_token=duration(timings.first_token),
        ),
    )
    if isinstance(finish.matched_stop, str):
        message.stop_string = finish.matched_stop
    elif finish.matched_stop is not None and finish.reason is FinishReason.STOP_TOKEN:
        message.stop_token_id = finish.matched_stop
    return message


def duration(seconds: float) -> Duration:
    """`seconds` to the nanosecond."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9
