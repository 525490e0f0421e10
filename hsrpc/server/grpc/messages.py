"""Between messages and what the service takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value

from hsrpc.constraint import MAX_CHOICES, Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import MAX_MESSAGES, MAX_TOOLS, Chat, Text, check_count, read_object
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
from hsrpc.server.config import ServerConfig
from hsrpc.server.grpc.field_paths import named_by
from hsrpc.server.pacing import Pace, choose_pace
from hsrpc.server.service import Submission
from hsrpc.server.stream import Stream
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import model_pb2, prompt_pb2

_MAX_DURATION = 315_576_000_000
"""Seconds: ten thousand years, the range of google.protobuf.Duration."""
_MAX_NANOS = 999_999_999
_MAX_PARAMETERS = 65_536
"""Bytes of a template's parameters."""
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
_MAX_SALT = 256
"""Bytes of what says whose cached tokens a request may share."""
_TEXT_OPTIONS = ("add_special_tokens", "parse_special")
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_SECTIONS: dict[str, type[Message]] = {
    "sampling": v1.Sampling,
    "stopping": v1.Stopping,
    "output": v1.Output,
    "chat": prompt_pb2.Chat,
    "constraint": v1.Constraint,
}
_PATHS = {
    "token_ids": "token_ids.ids",
    **{field.name: f"{name}.{field.name}" for name, kind in _SECTIONS.items() for field in kind.DESCRIPTOR.fields},
    "choice": "constraint.choice.texts",
}
"""Where a request has what the engine calls by a name of its own."""


ModelRequest = v1.GenerateRequest | model_pb2.GetModelRequest | model_pb2.TokenizeRequest | model_pb2.DetokenizeRequest


def model_of(request: ModelRequest) -> str | None:
    """The model that is asked for; None: the one that is loaded."""
    return request.model if request.HasField("model") else None


def read_submission(request: v1.GenerateRequest, config: ServerConfig, defaults: SamplingParams) -> Submission:
    """What is asked for; where the request does not say, as `config` and `defaults` have it.

    Raises:
        InvalidRequestError: naming the field by its path in the message.
    """
    with field_paths():
        pace = read_pace(request.output, config)
        params = read_params(request, defaults)
    request_id = request.request_id if request.HasField("request_id") else None
    return Submission(read_prompt(request), params, pace, request_id, _read_salt(request.cache_salt))


def _read_salt(salt: str) -> str:
    if len(salt.encode()) > _MAX_SALT:
        raise InvalidRequestError("cache_salt", f"longer than {_MAX_SALT} bytes; give a shorter one, such as a UUID")
    return salt


def field_paths() -> AbstractContextManager[None]:
    """Errors that leave the block name fields by their path in the message: temperature is sampling.temperature."""
    return named_by(_PATHS)


def read_prompt(request: v1.GenerateRequest) -> Text | Chat | Sequence[int]:
    """The prompt; token ids are not copied: their number has not been checked.

    Raises:
        InvalidRequestError: there is none, or a conversation is wrong.
    """
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidRequestError("input", "no prompt; set text, token_ids or chat")
    if given != "text":
        _check_no_text_options(request, given)
        if given == "chat":
            return read_chat(request.chat)
    if not (request.text if given == "text" else request.token_ids.ids):
        raise InvalidRequestError(given, "empty; give at least one token")
    return read_text(request.text, request.text_options) if given == "text" else request.token_ids.ids


def read_text_or_chat(request: model_pb2.TokenizeRequest) -> Text | Chat:
    """What is to be turned into token ids.

    Raises:
        InvalidRequestError: both are set, or a conversation is wrong.
    """
    if not request.HasField("chat"):
        return read_text(request.text, request.text_options)
    if request.text:
        raise InvalidRequestError("text", "chat is set too; leave one of them out")
    _check_no_text_options(request, "chat")
    return read_chat(request.chat)


def _check_no_text_options(request: v1.GenerateRequest | model_pb2.TokenizeRequest, given: str) -> None:
    if request.HasField("text_options"):
        raise InvalidRequestError("text_options", f"they are about text, and the prompt is {given}; leave them out")


def read_text(text: str, options: prompt_pb2.TextOptions) -> Text:
    """A prompt of text."""
    return Text(text, **_given(options, _TEXT_OPTIONS))


def read_chat(message: prompt_pb2.Chat) -> Chat:
    """A conversation.

    Raises:
        InvalidRequestError: naming the field by its path in a request.
    """
    with field_paths():
        _check_chat_counts(message)
        return Chat(
            [_message_dict(turn) for turn in message.messages],
            tools=[read_object(tool, f"tools[{index}]") for index, tool in enumerate(message.tools)],
            template_parameters={name: _plain(value) for name, value in message.template_parameters.fields.items()},
            **_given(message, ("add_generation_prompt", "continue_final_message")),
        )


def _check_chat_counts(message: prompt_pb2.Chat) -> None:
    """Refuse what is long before it is copied."""
    num_calls = sum(len(turn.tool_calls) for turn in message.messages)
    check_count("messages", len(message.messages) + num_calls, MAX_MESSAGES)
    check_count("tools", len(message.tools), MAX_TOOLS)
    if (size := message.template_parameters.ByteSize()) > _MAX_PARAMETERS:
        raise InvalidRequestError("template_parameters", f"{size} bytes; at most {_MAX_PARAMETERS} are allowed")


def _message_dict(turn: prompt_pb2.Message) -> dict[str, object]:
    calls = [
        {**_given(call, ("id",)), "function": {"name": call.name, "arguments": call.arguments}}
        for call in turn.tool_calls
    ]
    return {"role": turn.role, "tool_calls": calls, **_given(turn, ("content", "tool_call_id", "name"))}


def _plain(value: Value) -> object:
    """A JSON value; numbers that are whole are integers, as people write them."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {name: _plain(item) for name, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def read_params(request: v1.GenerateRequest, defaults: SamplingParams) -> SamplingParams:
    """What the request sets, the rest as in `defaults`.

    Raises:
        InvalidRequestError: naming the field.
    """
    sampling, stopping, output = request.sampling, request.stopping, request.output
    _check_counts(request)
    settings = _given(sampling, _SAMPLING) | _given(stopping, _STOPPING)
    if stopping.HasField("time_limit"):
        settings["time_limit"] = read_seconds(stopping.time_limit, "time_limit")
    settings |= _given(output, ("logprobs", "prompt_logprobs", "skip_special_tokens"))
    settings |= {"logit_bias": dict(sampling.logit_bias), "priority": request.priority}
    settings |= {"stop": tuple(stopping.stop), "stop_token_ids": tuple(stopping.stop_token_ids)}
    settings["constraint"] = _read_constraint(request.constraint) if request.HasField("constraint") else None
    return replace(defaults, **settings)


def _read_constraint(constraint: v1.Constraint) -> Constraint:
    match constraint.WhichOneof("kind"):
        case "json_schema":
            return JsonSchema(constraint.json_schema)
        case "json_object":
            return JsonObject()
        case "regex":
            return Regex(constraint.regex)
        case "grammar":
            return Grammar(constraint.grammar)
        case "choice":
            return Choice(tuple(constraint.choice.texts))
        case _:
            raise InvalidRequestError(
                "constraint", "of no kind; set json_schema, json_object, regex, grammar or choice"
            )


def _check_counts(request: v1.GenerateRequest) -> None:
    """Refuse long lists before they are copied."""
    for path, count, max_count in (
        ("stopping.stop", len(request.stopping.stop), MAX_STOP_STRINGS),
        ("stopping.stop_token_ids", len(request.stopping.stop_token_ids), MAX_STOP_TOKEN_IDS),
        ("sampling.logit_bias", len(request.sampling.logit_bias), MAX_LOGIT_BIAS),
        ("constraint.choice.texts", len(request.constraint.choice.texts), MAX_CHOICES),
    ):
        if count > max_count:
            raise InvalidRequestError(path, f"{count} entries, at most {max_count} are allowed")


def _given(message: Message, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def read_pace(output: v1.Output, config: ServerConfig) -> Pace:
    """How the output is to be sent.

    Raises:
        InvalidRequestError: naming the field.
    """
    tokens = output.max_tokens_per_message if output.HasField("max_tokens_per_message") else None
    is_given = output.HasField("max_message_delay")
    delay = read_seconds(output.max_message_delay, "max_message_delay") if is_given else None
    return choose_pace(config, tokens, delay)


def start_message(stream: Stream, model: str, output: v1.Output) -> v1.Start:
    """Facts about the prompt, and the settings in effect."""
    params = stream.params
    return v1.Start(
        request_id=stream.request_id,
        model=model,
        prompt_tokens=len(stream.prompt_token_ids),
        sampling=_sampling_message(params),
        stopping=_stopping_message(params),
        output=_output_message(params, stream.pace, output),
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


def _output_message(params: SamplingParams, pace: Pace, output: v1.Output) -> v1.Output:
    return v1.Output(
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        echo_prompt=output.echo_prompt,
        return_token_ids=output.return_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        max_tokens_per_message=pace.max_tokens,
        max_message_delay=duration(pace.max_delay),
    )


def add_delta(response: v1.GenerateResponse, delta: Delta, output: v1.Output) -> None:
    """Put what the client asked for of `delta` behind what `response` has; the field stays unset if that is nothing."""
    if delta.text:
        response.delta.text += delta.text
    if output.return_token_ids and delta.token_ids:
        response.delta.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        response.delta.logprobs.extend(map(_logprob_message, delta.logprobs))
    if delta.prompt_logprobs:
        response.delta.prompt_logprobs.extend(map(_logprob_message, delta.prompt_logprobs))
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
            cached_tokens=usage.cached_tokens,
            drafted_tokens=usage.drafted_tokens,
            accepted_tokens=usage.accepted_tokens,
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


def read_seconds(message: Duration, field: str) -> float:
    """Seconds of a duration that is well formed, as its own documentation has it.

    Raises:
        InvalidRequestError: naming `field`: a part is out of range, or the signs differ.
    """
    seconds, nanos = message.seconds, message.nanos
    if abs(seconds) > _MAX_DURATION:
        raise InvalidRequestError(field, f"seconds={seconds} is outside [-{_MAX_DURATION}, {_MAX_DURATION}]")
    if abs(nanos) > _MAX_NANOS:
        raise InvalidRequestError(field, f"nanos={nanos} is outside [-{_MAX_NANOS}, {_MAX_NANOS}]; carry into seconds")
    if seconds * nanos < 0:
        raise InvalidRequestError(field, f"seconds={seconds} and nanos={nanos} differ in sign; give both the same")
    return seconds + nanos / 1e9
