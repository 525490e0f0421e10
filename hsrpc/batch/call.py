"""Bodies of OpenAI's endpoints: which of their parameters are served, and what they ask of an engine.

A further parameter is a row of `_COMMON`, `_CHAT` or `_COMPLETIONS`, or, where it is more than a setting, a place in
`_read_chat` or `_read_completion`. What no table has is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hsrpc.batch.line import Endpoint
from hsrpc.batch.refusal import UnservedError
from hsrpc.constraint import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Chat, Json, Prompt, Text, check_count, check_unicode, within
from hsrpc.request import SamplingParams

MAX_N = 128
MAX_REQUESTS = 2048
"""Prompts of a body times `n`."""
_DEFAULT_MAX_TOKENS = 16
"""What /v1/completions takes by default, as OpenAI has it; a conversation goes on to the end of the context."""

_TOKEN_ID = re.compile(r"[0-9]{1,9}")

Reader: TypeAlias = Callable[[str, object], object]


@dataclass(frozen=True, slots=True)
class Call:
    """What a body asks for: each of its prompts, `n` times over."""

    endpoint: Endpoint
    model: str
    prompts: Sequence[Prompt]
    n: int
    settings: Mapping[str, Any]
    """Settings of `SamplingParams` that the body gives."""
    names: Mapping[str, str]
    """What the body calls each of them."""
    echo: bool = False
    """The prompt comes back in front of the output, with its logprobs where those are wanted."""

    @property
    def num_requests(self) -> int:
        """Requests that it becomes, each of which is a choice of the answer."""
        return len(self.prompts) * self.n

    @property
    def max_tokens(self) -> int | None:
        """Most output tokens of one of them; None: to the end of the context."""
        return self.settings.get("max_tokens")

    def request(self, index: int, seed: int | None) -> tuple[Prompt, dict[str, Any]]:
        """Prompt and settings of one; those of one prompt with a seed differ by it. `seed` is for bodies without."""
        settings = dict(self.settings)
        given = settings.get("seed", seed)
        if given is not None:
            settings["seed"] = (given + index % self.n) % 2**63
        return self.prompts[index // self.n], settings

    def field(self, name: str) -> str:
        """What the body calls a field of a request."""
        root, bracket, rest = name.partition("[")
        if root in ("text", "token_ids"):
            return "prompt" + bracket + rest
        if root in _CONSTRAINTS:
            root = "constraint"
        return self.names.get(root, root) + bracket + rest


def read_call(endpoint: Endpoint, body: Json) -> Call:
    """What `body` asks for; null is as if a parameter were absent.

    Raises:
        InvalidRequestError: naming the parameter; UnservedError where it is one that is not served.
    """
    given = {name: value for name, value in body.items() if value is not None}
    model = _text("model", given.pop("model", None))
    n = _whole("n", given.pop("n", 1))
    if not 1 <= n <= MAX_N:
        raise InvalidRequestError("n", f"{n} is outside [1, {MAX_N}]")
    echo = endpoint is Endpoint.COMPLETIONS and _flag("echo", given.pop("echo", False))
    prompts, settings = _BODIES[endpoint](given)
    if echo:
        _score_prompts(settings)
    elif settings.values.get("max_tokens") == 0:
        remedy = "1 or more, or echo" if endpoint is Endpoint.COMPLETIONS else "1 or more"
        raise InvalidRequestError(settings.names["max_tokens"], f"nothing would come of 0; give {remedy}")
    if len(prompts) * n > MAX_REQUESTS:
        raise InvalidRequestError("n", f"{len(prompts)} prompts, {n} times each, are more than {MAX_REQUESTS} requests")
    call = Call(endpoint, model, prompts, n, settings.values, settings.names, echo)
    try:
        SamplingParams(**call.settings)
    except InvalidRequestError as error:
        raise InvalidRequestError(call.field(error.field), error.description) from None
    return call


@dataclass(frozen=True, slots=True)
class _Settings:
    """Settings, and what the body calls them."""

    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, setting: str, name: str, value: object) -> None:
        """Take a value, of which two names may not say two things."""
        if setting in self.names and self.values[setting] != value:
            raise InvalidRequestError(name, f"not that of {self.names[setting]}; leave one of them out")
        self.values[setting], self.names[setting] = value, name


def _read_chat(given: dict[str, Any]) -> tuple[Sequence[Prompt], _Settings]:
    messages = given.pop("messages", None)
    if not isinstance(messages, list):
        raise InvalidRequestError("messages", "absent or no list; give at least one message")
    options = {field: read(name, given.pop(name)) for name, (field, read) in _CHAT_OPTIONS.items() if name in given}
    chat = Chat([_message(index, message) for index, message in enumerate(messages)], **options)  # type: ignore[arg-type]
    wanted, top = _flag("logprobs", given.pop("logprobs", False)), _whole("top_logprobs", given.pop("top_logprobs", 0))
    if top and not wanted:
        raise InvalidRequestError("top_logprobs", "given without logprobs; give logprobs as true too")
    settings = _settings(given, _CHAT)
    if wanted:
        settings.add("logprobs", "top_logprobs", top)
    return [chat], settings


def _message(index: int, message: object) -> Json:
    """A message as `Chat` reads it: text in parts is text, and what is null is absent."""
    with within(f"messages[{index}]"):
        if not isinstance(message, dict):
            raise InvalidRequestError("role", "absent; give an object with role and content")
        found = {name: value for name, value in message.items() if value is not None}
        if isinstance(found.get("content"), list):
            found["content"] = "\n".join(_part(place, part) for place, part in enumerate(found["content"]))
        return found


def _part(index: int, part: object) -> str:
    with within(f"content[{index}]"):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise InvalidRequestError("type", f'{kind!r} is not served; give parts of type "text"')
        return _text("text", part.get("text"))


def _read_completion(given: dict[str, Any]) -> tuple[Sequence[Prompt], _Settings]:
    prompts = _prompts(given.pop("prompt", None))
    best_of = given.pop("best_of", None)
    if best_of not in (None, 1):
        raise UnservedError("best_of", f"{best_of!r} is not served; leave it out")
    settings = _settings(given, _COMPLETIONS)
    settings.values.setdefault("max_tokens", _DEFAULT_MAX_TOKENS)
    return prompts, settings


def _score_prompts(settings: _Settings) -> None:
    """Let a prompt that comes back be scored: where logprobs are wanted, or nothing else is."""
    values = settings.values
    if "logprobs" in values or values["max_tokens"] == 0:
        settings.add("prompt_logprobs", "logprobs", values.get("logprobs", 0))


def _prompts(value: object) -> list[Prompt]:
    """A prompt, or several: each is text or token ids."""
    if isinstance(value, str):
        return [Text(_text("prompt", value))]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("prompt", "absent or empty; give text, token ids, or a list of either")
    if all(isinstance(each, int) for each in value):
        return [_ids("prompt", value)]
    check_count("prompt", len(value), MAX_REQUESTS)
    return [_prompt(f"prompt[{index}]", each) for index, each in enumerate(value)]


def _prompt(name: str, value: object) -> Prompt:
    if isinstance(value, str):
        return Text(_text(name, value))
    if isinstance(value, list) and value:
        return _ids(name, value)
    raise InvalidRequestError(name, "neither text nor token ids; give one of them")


def _settings(given: Mapping[str, Any], served: Mapping[str, tuple[str, Reader]]) -> _Settings:
    """The settings of what is left of a body."""
    settings = _Settings()
    for name, value in given.items():
        if name in _CONSTRAINED:
            _add_constraint(settings, *_CONSTRAINED[name](name, value))
            continue
        if name in served:
            setting, read = served[name]
            settings.add(setting, name, read(name, value))
        elif name in _INERT:
            if value not in _INERT[name]:
                allowed = " or ".join(map(json.dumps, _INERT[name]))
                remedy = f"give {allowed}, or leave it out" if allowed else "leave it out"
                raise UnservedError(name, f"{json.dumps(value)[:80]} is not served; {remedy}")
        elif name not in _IGNORED:
            raise UnservedError(name, "not served; leave it out")
    return settings


def _add_constraint(settings: _Settings, path: str, make: Callable[[], Constraint | None]) -> None:
    """Take what is made, whose parts the body has at `path`."""
    try:
        constraint = make()
    except InvalidRequestError as error:
        raise InvalidRequestError(
            path + error.field.removeprefix(error.field.partition("[")[0]), error.description
        ) from None
    if constraint is not None:
        settings.add("constraint", path, constraint)


def _response_format(name: str, value: object) -> tuple[str, Callable[[], Constraint | None]]:
    """A format as OpenAI has it; its path, and what it becomes."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        found = f"{json.dumps(kind)[:80]} is not served; give text, json_object or json_schema"
        raise InvalidRequestError(f"{name}.type", found)
    if kind != "json_schema":
        return name, lambda: JsonObject() if kind == "json_object" else None
    described = _object(f"{name}.json_schema", value.get("json_schema"))
    path = f"{name}.json_schema.schema"
    schema = _object(path, described.get("schema"))
    return path, lambda: JsonSchema(schema)


def _structured_outputs(name: str, value: object) -> tuple[str, Callable[[], Constraint | None]]:
    """A constraint as vLLM has it: one of several names, of which others are null; its path, and what it becomes."""
    given = {key: each for key, each in _object(name, value).items() if each is not None}
    if len(given) != 1 or (kind := next(iter(given))) not in _STRUCTURED:
        raise InvalidRequestError(name, f"{sorted(given)} is not served; give one of {', '.join(_STRUCTURED)}")
    path, part = f"{name}.{kind}", given[kind]
    return path, lambda: _STRUCTURED[kind](path, part)


def _json_schema(name: str, value: object) -> Constraint:
    return JsonSchema(value if isinstance(value, str) else _object(name, value))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidRequestError(name, "too large; give a number of a usual size") from None


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "a whole number")
    if not -(2**63) <= value < 2**63:
        raise InvalidRequestError(name, "outside [-2^63, 2^63); give a whole number of a usual size")
    return value


def _id(name: str, value: object) -> int:
    """A token id, which the model may not have."""
    token_id = _whole(name, value)
    if not 0 <= token_id < 2**31:
        raise InvalidRequestError(name, f"{token_id} is no token id; give 0 or more")
    return token_id


def _top_k(name: str, value: object) -> int:
    """-1 is all, as 0 is."""
    top_k = _whole(name, value)
    return 0 if top_k == -1 else top_k


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    check_unicode(name, value)
    return value


def _texts(name: str, value: object) -> list[str]:
    """Strings, or one."""
    values = value if isinstance(value, list) else [value]
    return [_text(name, each) for each in values]


def _ids(name: str, value: object) -> list[int]:
    if not isinstance(value, list):
        raise _wrong(name, value, "a list of token ids")
    return [_id(f"{name}[{index}]", each) for index, each in enumerate(value)]


def _bias(name: str, value: object) -> dict[int, float]:
    """Keys are token ids, as strings."""
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object of token ids")
    if (wrong := next((key for key in value if not _TOKEN_ID.fullmatch(key)), None)) is not None:
        raise InvalidRequestError(name, f"{wrong[:40]!r} is no token id; give whole numbers as keys")
    return {int(key): _number(f"{name}[{key}]", each) for key, each in value.items()}


def _object(name: str, value: object) -> Json:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def _wrong(name: str, value: object, wanted: str) -> InvalidRequestError:
    found = "absent" if value is None else f"a JSON {type(value).__name__}"
    return InvalidRequestError(name, f"{found}; give {wanted}")


_COMMON: Mapping[str, tuple[str, Reader]] = {
    "temperature": ("temperature", _number),
    "top_p": ("top_p", _number),
    "frequency_penalty": ("frequency_penalty", _number),
    "presence_penalty": ("presence_penalty", _number),
    "logit_bias": ("logit_bias", _bias),
    "seed": ("seed", _whole),
    "stop": ("stop", _texts),
    "max_tokens": ("max_tokens", _whole),
    # Beyond OpenAI's, by the names that servers of open models have given them.
    "top_k": ("top_k", _top_k),
    "min_p": ("min_p", _number),
    "repetition_penalty": ("repetition_penalty", _number),
    "min_tokens": ("min_tokens", _whole),
    "stop_token_ids": ("stop_token_ids", _ids),
    "ignore_eos": ("ignore_eos", _flag),
    "skip_special_tokens": ("skip_special_tokens", _flag),
}
"""Name in a body: the setting, and what reads it."""
_CHAT = {**_COMMON, "max_completion_tokens": ("max_tokens", _whole)}
_COMPLETIONS = {**_COMMON, "logprobs": ("logprobs", _whole)}
_CHAT_OPTIONS: Mapping[str, tuple[str, Reader]] = {
    "chat_template_kwargs": ("template_parameters", _object),
    "add_generation_prompt": ("add_generation_prompt", _flag),
    "continue_final_message": ("continue_final_message", _flag),
}
"""Name in a body: the field of `Chat`, and what reads it."""
_STRUCTURED: Mapping[str, Callable[[str, object], Constraint | None]] = {
    "json": _json_schema,
    "json_object": lambda name, value: JsonObject() if _flag(name, value) else None,
    "regex": lambda name, value: Regex(_text(name, value)),
    "grammar": lambda name, value: Grammar(_text(name, value)),
    "choice": lambda name, value: Choice(tuple(_texts(name, value))),
}
_CONSTRAINED = {"response_format": _response_format, "structured_outputs": _structured_outputs}
_CONSTRAINTS = tuple(kind.field for kind in (JsonSchema, JsonObject, Regex, Grammar, Choice))
"""What the engine calls the parts of a constraint."""
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Say nothing of the output."""
_INERT: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Not served, but for these values, which ask for nothing."""
_BODIES = {Endpoint.CHAT: _read_chat, Endpoint.COMPLETIONS: _read_completion}
