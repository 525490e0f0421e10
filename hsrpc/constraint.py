"""What an output may be: JSON by a schema, any JSON object, a regular expression, a grammar, one of some texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from hsrpc.errors import InvalidRequestError

MAX_BYTES = 131_072
"""Bytes of the UTF-8 text of a schema, an expression, a grammar, or all choices together."""
MAX_CHOICES = 1024
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that a JSON Schema describes, given as its text or as what `json.loads` makes of that.

    Between tokens of JSON there may be a space, or a new line with up to 32 spaces and tabs; nothing where the schema
    has "x-guidance": {"whitespace_flexible": false}.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    schema: str | bool | Mapping[str, object]

    field: ClassVar[str] = "json_schema"

    def __post_init__(self) -> None:
        _check_text(self.field, self.text)
        try:
            found = json.loads(self.text)
        except RecursionError:
            raise InvalidRequestError(self.field, "nested too deeply; give a flatter schema") from None
        except ValueError as error:
            raise InvalidRequestError(self.field, f"not JSON: {error}") from None
        if not isinstance(found, dict | bool):
            raise InvalidRequestError(self.field, f"a JSON {type(found).__name__}; give an object, such as {{}}")

    @property
    def text(self) -> str:
        """The schema as JSON, its keys in the order given: outputs have theirs in that order."""
        if isinstance(self.schema, str):
            return self.schema
        try:
            return json.dumps(self.schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(self.field, f"not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""

    field: ClassVar[str] = "json_object"

    @property
    def text(self) -> str:
        """The schema that says so."""
        return '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class Regex:
    """What a regular expression matches as a whole, in the syntax of Rust's `regex`: no look-around, no \\1.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    pattern: str

    field: ClassVar[str] = "regex"

    def __post_init__(self) -> None:
        _check_text(self.field, self.pattern)

    @property
    def text(self) -> str:
        return self.pattern


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a context-free grammar derives: Lark's notation, from the rule `start`, or llama.cpp's GBNF, from `root`.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    grammar: str

    field: ClassVar[str] = "grammar"

    def __post_init__(self) -> None:
        _check_text(self.field, self.grammar)

    @property
    def text(self) -> str:
        return self.grammar


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    choices: Sequence[str]

    field: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        if isinstance(self.choices, str):
            raise InvalidRequestError(self.field, "one string; give a list of strings")
        if not 1 <= len(self.choices) <= MAX_CHOICES:
            raise InvalidRequestError(self.field, f"{len(self.choices)} texts; give 1 to {MAX_CHOICES}")
        for index, choice in enumerate(self.choices):
            _check_text(f"{self.field}[{index}]", choice)
        if (size := len(self.text.encode())) > MAX_BYTES:
            raise InvalidRequestError(self.field, f"{size} bytes in all; at most {MAX_BYTES} are allowed")

    @property
    def text(self) -> str:
        """All of them as a list in JSON."""
        return json.dumps(list(self.choices), ensure_ascii=False)


Constraint: TypeAlias = JsonSchema | JsonObject | Regex | Grammar | Choice


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError(field, f"{str(text)[:_SHOWN]!r} is no string; give one")
    if not text:
        raise InvalidRequestError(field, "empty; give a text, or leave it out")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequestError(field, f"half of a surrogate pair at {error.start}; give valid Unicode") from None
    if size > MAX_BYTES:
        raise InvalidRequestError(field, f"{size} bytes; at most {MAX_BYTES} are allowed")
