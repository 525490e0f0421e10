"""What the clients send and receive: settings to messages, responses to the dataclasses of an embedded engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Protocol, TypedDict, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from hsrpc.client_proxy import Proxy
from hsrpc.constraint import Choice, Constraint, JsonObject
from hsrpc.errors import HsrpcError, InvalidRequestError
from hsrpc.prompt import Chat, Prompt, Text
from hsrpc.request import Delta, Finish, FinishReason, Timings, TokenLogprob, Usage
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import model_pb2, prompt_pb2, server_pb2

_MAX_SECONDS = 1e9
"""Thirty years: more than any server waits, and within what all of gRPC's clocks can count."""


class Settings(TypedDict, total=False):
    """Settings of a generation, as in `SamplingParams` and the message `Output`; times in seconds."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    time_limit: float
    constraint: Constraint | None
    logprobs: int
    prompt_logprobs: int
    skip_special_tokens: bool
    echo_prompt: bool
    return_token_ids: bool
    max_tokens_per_message: int
    max_message_delay: float
    priority: int
    request_id: str
    cache_salt: str
    model: str
    timeout: float
    """Seconds after which the call ends with DEADLINE_EXCEEDED and its work is stopped."""


class CallError(HsrpcError):
    """A call ended with a status that is not OK.

    `fields` says what is wrong with which field, `reason` is to switch on, within `domain`, and has `metadata`;
    `retry_after` is in seconds. All are filled in only where googleapis-common-protos is installed.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes | None = None) -> None:
        self.code = code
        self.message = message
        self.fields: dict[str, str] = {}
        self.reason: str | None = None
        self.domain: str | None = None
        self.metadata: dict[str, str] = {}
        self.retry_after: float | None = None
        if details:
            self._read_details(details)
        super().__init__(f"{code.name}: {message}")

    def _read_details(self, details: bytes) -> None:
        try:
            status_pb2 = import_module("google.rpc.status_pb2")
            kinds = import_module("google.rpc.error_details_pb2")
        except ModuleNotFoundError:
            return
        bad, info, retry = kinds.BadRequest(), kinds.ErrorInfo(), kinds.RetryInfo()
        for detail in status_pb2.Status.FromString(details).details:
            if detail.Unpack(bad):
                self.fields = {violation.field: violation.description for violation in bad.field_violations}
            elif detail.Unpack(info):
                self.reason, self.domain, self.metadata = info.reason, info.domain, dict(info.metadata)
            elif detail.Unpack(retry):
                self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole output of a request."""

    start: v1.Start
    """Facts about the prompt, and the settings in effect."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the prompt's tokens but the first."""


@contextmanager
def call_errors(proxy: Proxy | None) -> Iterator[None]:
    """Raises CallError for grpc's own errors; where no server was reached, with what `proxy` has to do with it."""
    try:
        yield
    except grpc.RpcError as error:
        metadata = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
        details = next((value for key, value in metadata if key == "grpc-status-details-bin"), None)
        message = error.details() or ""
        if proxy is not None and error.code() is grpc.StatusCode.UNAVAILABLE and details is None:
            message = f"{message}; {proxy}"
        raise CallError(error.code(), message, details) from None


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


@contextmanager
def closing_call(call: _Cancellable) -> Iterator[None]:
    """Cancels the call at the end, so that a stream that is left early ends at the server too."""
    try:
        yield
    finally:
        call.cancel()


def watch_load_request(interval: float) -> server_pb2.WatchLoadRequest:
    """The message for reports every `interval` seconds.

    Raises:
        InvalidRequestError: the interval is no time.
    """
    return server_pb2.WatchLoadRequest(interval=_duration("interval", interval))


def generate_request(prompt: Prompt, settings: Settings) -> v1.GenerateRequest:
    """The message for `prompt`.

    Raises:
        TypeError: a setting is unknown.
        InvalidRequestError: a time is negative, not finite or too long.
    """
    request = v1.GenerateRequest()
    if isinstance(prompt, str | Text | Chat):
        _set_prompt(request, prompt)
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    homes: tuple[Message, ...] = (request, request.sampling, request.stopping, request.output)
    for name, value in settings.items():
        if name == "timeout":
            check_seconds(name, settings["timeout"])
            continue
        if name == "constraint":
            _set_constraint(request, settings["constraint"])
            continue
        home = next((home for home in homes if name in home.DESCRIPTOR.fields_by_name), None)
        if home is None:
            raise TypeError(f"{name!r} is no setting; use one of " + ", ".join(Settings.__annotations__))
        _set(home, name, value)
    return request


def tokenize_request(prompt: str | Text | Chat) -> model_pb2.TokenizeRequest:
    """The message that asks for the token ids of `prompt`."""
    request = model_pb2.TokenizeRequest()
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: v1.GenerateRequest | model_pb2.TokenizeRequest, prompt: str | Text | Chat) -> None:
    if isinstance(prompt, Chat):
        _set_chat(request.chat, prompt)
    elif isinstance(prompt, Text):
        request.text = prompt.text
        request.text_options.add_special_tokens = prompt.add_special_tokens
        request.text_options.parse_special = prompt.parse_special
    else:
        request.text = prompt


def _set_chat(message: prompt_pb2.Chat, chat: Chat) -> None:
    for turn in chat.turns:
        calls = [
            prompt_pb2.ToolCall(id=call.id, name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False))
            for call in turn.tool_calls
        ]
        message.messages.add(
            role=turn.role, content=turn.content, tool_calls=calls, tool_call_id=turn.tool_call_id, name=turn.name
        )
    message.tools.extend(json.dumps(tool, ensure_ascii=False) for tool in chat.tools)
    if chat.add_generation_prompt is not None:
        message.add_generation_prompt = chat.add_generation_prompt
    message.continue_final_message = chat.continue_final_message
    if chat.template_parameters:
        ParseDict(dict(chat.template_parameters), message.template_parameters)


def _set_constraint(request: v1.GenerateRequest, constraint: Constraint | None) -> None:
    match constraint:
        case None:
            pass
        case Choice():
            request.constraint.choice.texts.extend(constraint.choices)
        case JsonObject():
            request.constraint.json_object.SetInParent()
        case _:
            setattr(request.constraint, constraint.field, constraint.text)


def _set(home: Message, name: str, value: object) -> None:
    if name in ("time_limit", "max_message_delay") and isinstance(value, int | float):
        getattr(home, name).CopyFrom(_duration(name, value))
    elif isinstance(value, Mapping):
        getattr(home, name).update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        getattr(home, name).extend(value)
    else:
        setattr(home, name, value)


def check_seconds(name: str, seconds: float) -> float:
    """`seconds`, if they are a time that a message can carry.

    Raises:
        InvalidRequestError: naming the argument.
    """
    if not 0 <= seconds <= _MAX_SECONDS:
        raise InvalidRequestError(name, f"{seconds!r} is no time to wait; give seconds, 0 to {_MAX_SECONDS:.0e}")
    return seconds


def _duration(name: str, seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(check_seconds(name, seconds) * 1e9))
    return message


def read_delta(response: v1.GenerateResponse) -> Delta:
    """What is new in `response`."""
    return Delta(
        text=response.delta.text,
        token_ids=tuple(response.delta.token_ids),
        logprobs=tuple(map(_read_logprob, response.delta.logprobs)),
        finish=_read_finish(response.finish) if response.HasField("finish") else None,
        prompt_logprobs=tuple(map(_read_logprob, response.delta.prompt_logprobs)),
    )


def _read_logprob(item: v1.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(item.token_id, item.logprob, item.rank, tuple((top.token_id, top.logprob) for top in item.top))


def _read_finish(finish: v1.Finish) -> Finish:
    usage, timings = finish.usage, finish.timings
    matched = finish.WhichOneof("matched")
    return Finish(
        reason=FinishReason(v1.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_")),
        usage=Usage(**{field.name: getattr(usage, field.name) for field in fields(Usage)}),
        timings=Timings(*map(_seconds, (timings.queue, timings.prefill, timings.decode, timings.first_token))),
        matched_stop=getattr(finish, matched) if matched else None,
    )


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9
