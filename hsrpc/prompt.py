"""What a prompt may be, beside token ids: text with its special tokens, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from hsrpc.errors import InvalidRequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
"""Messages of a conversation, and calls of tools in them, together."""
MAX_TOOLS = 1024
CHAT_HINT = (
    "the model answered text with nothing; it has a chat template, so send it a conversation: `chat` in place of "
    "`text`, hsrpc.Chat in Python, `hsrpc chat` on the command line"
)
"""For the log, where `Finish.is_nothing` of a text."""

Json: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as text; a mere string is one with the defaults."""

    text: str
    add_special_tokens: bool = True
    """The tokenizer adds its own, such as the one that begins a text, which is never there twice."""
    parse_special: bool = True
    """The text of a special token becomes that token; False: plain words."""

    @property
    def num_characters(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool, as the model made it.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    name: str
    arguments: Json = field(default_factory=dict)
    id: str | None = None

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        _check_optional_text("id", self.id)
        if not self.name:
            raise InvalidRequestError("name", "empty; give the name of the tool")
        if not isinstance(self.arguments, Mapping):
            raise InvalidRequestError(
                "arguments", f"{type(self.arguments).__name__}; give an object of names to values"
            )

    def as_dict(self) -> dict[str, object]:
        """As templates read it."""
        call = {} if self.id is None else {"id": self.id}
        return call | {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @classmethod
    def read(cls, value: object) -> ToolCall:
        """A call in the form that `as_dict` gives; arguments may be JSON in a string.

        Raises:
            InvalidRequestError: naming the field.
        """
        if isinstance(value, ToolCall):
            return value
        function = value.get("function") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(function, Mapping):
            raise InvalidRequestError(
                "function", "absent; give {'id': ..., 'function': {'name': ..., 'arguments': ...}}"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = read_object(arguments, "arguments")
        return cls(id=value.get("id"), name=function.get("name", ""), arguments=arguments)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    role: str
    """One of ROLES; a template may know fewer."""
    content: str | None = None
    """None only where there are calls of tools."""
    tool_calls: Sequence[ToolCall] = ()
    """Only of "assistant"."""
    tool_call_id: str | None = None
    """The call that this is the result of; only of "tool"."""
    name: str | None = None
    """Name of the tool, or of who speaks, for templates that read it."""

    def __post_init__(self) -> None:
        _set(self, "tool_calls", tuple(self.tool_calls))
        if self.role not in ROLES:
            raise InvalidRequestError("role", f"{self.role!r} is none; use one of {', '.join(ROLES)}")
        for name in ("content", "tool_call_id", "name"):
            _check_optional_text(name, getattr(self, name))
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError("content", "absent; give text, which may be empty, or tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequestError("tool_calls", f'of role {self.role!r}; only "assistant" calls tools')
        if self.tool_call_id is not None and self.role != "tool":
            raise InvalidRequestError("tool_call_id", f'of role {self.role!r}; only "tool" answers calls')

    def as_dict(self) -> dict[str, object]:
        """As templates read it: what is absent has no key."""
        calls = [call.as_dict() for call in self.tool_calls] or None
        names = {"role": self.role, "content": self.content, "tool_calls": calls}
        names |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return {name: value for name, value in names.items() if value is not None}

    @classmethod
    def read(cls, value: Message | Json) -> Message:
        """A message in the form that `as_dict` gives.

        Raises:
            InvalidRequestError: naming the field.
        """
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequestError("role", f"absent of {value!r}; give a mapping with role and content")
        for name in value:
            if name not in cls.__dataclass_fields__:
                raise InvalidRequestError(str(name), "unknown; use " + ", ".join(cls.__dataclass_fields__))
        calls = []
        for index, call in enumerate(value.get("tool_calls") or ()):  # type: ignore[var-annotated, arg-type]
            with within(f"tool_calls[{index}]"):
                calls.append(ToolCall.read(call))
        return cls(**(dict(value) | {"role": value.get("role"), "tool_calls": calls}))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: the model's own chat template makes a prompt of it.

    What it says is plain words: the text of a special token does not become that token.

    Raises:
        InvalidRequestError: on construction, naming the field, such as messages[2].role.
    """

    messages: Sequence[Message | Json]
    """Messages, or mappings such as {"role": "user", "content": "Hello"}; Messages once it is made."""
    tools: Sequence[Json] = ()
    """Tools that the model may call, as JSON objects such as {"type": "function", "function": {"name": ...}}."""
    add_generation_prompt: bool | None = None
    """The prompt ends with the beginning of the assistant's next message; None: unless `continue_final_message`."""
    continue_final_message: bool = False
    """The output continues the last message, which is not ended."""
    template_parameters: Json = field(default_factory=dict)
    """Parameters of the model's template, such as enable_thinking."""
    num_characters: int = field(init=False, repr=False, compare=False)
    """Characters of all that it says, about."""

    def __post_init__(self) -> None:
        check_count("messages", len(self.messages), MAX_MESSAGES)
        check_count("tools", len(self.tools), MAX_TOOLS)
        if not self.messages:
            raise InvalidRequestError("messages", 'empty; give at least one, such as {"role": "user", "content": "Hi"}')
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message",
                "not together with add_generation_prompt; leave one of them out",
            )
        _set(self, "messages", tuple(_read_messages(self.messages)))
        _set(self, "tools", tuple(self.tools))
        last = self.turns[-1]
        if self.continue_final_message and last.content is None:
            raise InvalidRequestError("continue_final_message", "the last message has no content; give it some")
        if self.add_generation_prompt is None:
            _set(self, "add_generation_prompt", not self.continue_final_message)
        for index, tool in enumerate(self.tools):
            if not isinstance(tool, Mapping):
                raise InvalidRequestError(f"tools[{index}]", f"{type(tool).__name__}; give a JSON object")
        _set(self, "num_characters", sum(self._sizes()))

    @property
    def turns(self) -> Sequence[Message]:
        """The messages."""
        return self.messages  # type: ignore[return-value]  # since it was made

    def _sizes(self) -> Iterator[int]:
        yield _json_size("messages", [turn.as_dict() for turn in self.turns])
        yield _json_size("tools", self.tools)
        yield _json_size("template_parameters", self.template_parameters)


Prompt: TypeAlias = str | Text | Chat | Sequence[int]
"""A string is Text with its defaults; a sequence of integers is token ids."""


def field_of(prompt: Prompt) -> str:
    """The field that brings such a prompt, for errors."""
    if isinstance(prompt, Chat):
        return "messages"
    return "text" if isinstance(prompt, str | Text) else "token_ids"


def told(prompt: Prompt) -> str:
    """What a prompt says, for logs: text, or messages as JSON; nothing of token ids."""
    if isinstance(prompt, Chat):
        return json.dumps([turn.as_dict() for turn in prompt.turns], ensure_ascii=False)
    if isinstance(prompt, Text):
        return prompt.text
    return prompt if isinstance(prompt, str) else ""


def read_object(text: str, field: str) -> Json:
    """The JSON object in `text`.

    Raises:
        InvalidRequestError: naming `field`: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(field, f"not JSON ({error}); give one object") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(field, f"a JSON {type(value).__name__}; give an object")
    return value


def check_count(field: str, count: int, max_count: int) -> None:
    """Refuse a list that is too long.

    Raises:
        InvalidRequestError: naming `field`.
    """
    if count > max_count:
        raise InvalidRequestError(field, f"{count} entries, at most {max_count} are allowed")


def check_unicode(field: str, text: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        InvalidRequestError: naming `field`: it holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequestError(field, f"{found}; give valid Unicode") from None


@contextmanager
def within(path: str) -> Iterator[None]:
    """Errors that leave the block name fields of `path`."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}.{error.field}", error.description) from None


def _read_messages(messages: Sequence[Message | Json]) -> Iterator[Message]:
    count = 0
    for index, message in enumerate(messages):
        with within(f"messages[{index}]"):
            read = Message.read(message)
        count += 1 + len(read.tool_calls)
        check_count("messages", count, MAX_MESSAGES)
        yield read


def _json_size(field: str, value: object) -> int:
    """Characters of `value` as JSON, which templates may make of it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(field, f"no JSON can be made of it ({error}); give strings, numbers, lists") from None
    check_unicode(field, text)
    return len(text)


def _check_optional_text(name: str, value: object) -> None:
    if value is not None:
        _check_text(name, value)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequestError(name, f"{type(value).__name__}; give a string")


def _set(frozen: Chat | Message, name: str, value: object) -> None:
    object.__setattr__(frozen, name, value)
