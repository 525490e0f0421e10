"""From a constraint to the notation that llguidance compiles, and from its errors to what is wrong where."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import llguidance

from hsrpc.constraint import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=250_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_items_in_row=20_000,
    verbose_errors=False,
)
"""A quarter of the library's own work to begin with and in a step, and less than a tenth of its states (a kilobyte or
two each): with its own, a step of `((a{1000}){1000}){1000}` takes 0.7 s and 190 MB before it is given up. Ten times its
rows: 1,000 properties that may be left out need 4,000."""
_WHITE_SPACE: JsonCompileOptions = {"whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,32}"}
"""Between tokens of JSON: models that would go on with white space for ever cannot."""
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_MANY = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords of objects of schemas."""
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ONE = ("items", "additionalProperties", "additionalItems")
_SHARED = ("$defs", "definitions", "$schema")
"""What a part of a schema may refer to."""
_SEARCH_SECONDS = 0.5
_SHOWN = 300
"""Characters of an error."""


def read_constraint(field: str, text: str) -> Constraint:
    """The constraint of that field and text."""
    match field:
        case JsonSchema.field:
            return JsonSchema(text)
        case JsonObject.field:
            return JsonObject()
        case Regex.field:
            return Regex(text)
        case Grammar.field:
            return Grammar(text)
        case _:
            return Choice(json.loads(text))


def compilable(constraint: Constraint) -> str:
    """The text of a constraint in a notation that llguidance can compile.

    Takes as long as the constraint likes, and all memory and stack.

    Raises:
        InvalidRequestError: it cannot; says what is wrong, and where.
    """
    try:
        notation = _notation(constraint)
    except ValueError as error:
        raise InvalidRequestError(constraint.field, _shortened(str(error))) from None
    if found := llguidance.LLMatcher.validate_grammar(notation, limits=LIMITS):
        raise InvalidRequestError(constraint.field, _describe(constraint, found))
    return notation


def _notation(constraint: Constraint) -> str:
    match constraint:
        case JsonSchema() | JsonObject():
            return _json(constraint.text)
        case Regex():
            return llguidance.LLMatcher.grammar_from_regex(constraint.text)
        case Choice():
            texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in constraint.choices)
            return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}\n")
        case Grammar():
            return _lark(constraint)


def _json(schema: str) -> str:
    """With white space as the schema says itself, by the words that llguidance has for it, or as people write it."""
    found = json.loads(schema)
    if not isinstance(found, dict):  # true is {}, false has no options
        return _json("{}") if found else llguidance.LLMatcher.grammar_from_json_schema(schema)
    own = found.get("x-guidance")
    says = isinstance(own, dict) and any(name.startswith("whitespace") for name in own)
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={} if says else _WHITE_SPACE)


def _lark(constraint: Grammar) -> str:
    if not _GBNF.search(constraint.text):
        return llguidance.LLMatcher.grammar_from_lark(constraint.text)
    return llguidance.grammar_from("gbnf", constraint.text)


def _describe(constraint: Constraint, error: str) -> str:
    """What is wrong, and where, in a line."""
    if isinstance(constraint, JsonSchema):
        return f"at {_pointer(constraint, error)}: {_shortened(_last_words(error))}"
    if isinstance(constraint, Grammar) and (found := _PLACE.search(error)):
        return f"line {found[1]}, column {found[2]}: {_shortened(_last_words(error, found[3]))}"
    return _shortened(_last_words(error))


def _last_words(error: str, otherwise: str | None = None) -> str:
    """The gist of an error, whose lines show the whole of an expression; of one in an expression, where it is."""
    lines = error.splitlines()
    gist = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if gist is None:
        return otherwise or (lines[0] if lines else error)
    mark = next((line for line in lines if line.strip(" ^") == "" and "^" in line), None)
    return gist if mark is None else f"{gist}, at character {mark.index('^') - 4} of the expression"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _pointer(constraint: JsonSchema, error: str) -> str:
    """JSON pointer to the smallest part of a schema that has the same error, as far as half a second goes."""
    schema, pointer, end = json.loads(constraint.text), "", time.monotonic() + _SEARCH_SECONDS
    shared = {name: schema[name] for name in _SHARED if isinstance(schema, dict) and name in schema}
    part: Any = schema
    while True:
        for path, child in _parts(part):
            if time.monotonic() > end:
                break
            if _error({**shared, **child} if isinstance(child, dict) else child) == error:
                part, pointer = child, f"{pointer}/{path}"
                break
        else:
            return pointer or "the root"
        if time.monotonic() > end:
            return pointer or "the root"


def _parts(schema: object) -> Iterator[tuple[str, object]]:
    """Schemas in a schema, by the path to each; those that are referred to come last."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in sorted(schema.items(), key=lambda item: item[0] in _SHARED):
        if keyword in _MANY and isinstance(value, Mapping):
            for name, child in value.items():
                escaped = name.replace("~", "~0").replace("/", "~1")
                yield f"{keyword}/{escaped}", child
        elif keyword in _LISTS and isinstance(value, list):
            for index, child in enumerate(value):
                yield f"{keyword}/{index}", child
        elif keyword in _ONE and isinstance(value, dict):
            yield keyword, value


def _error(schema: object) -> str:
    return llguidance.LLMatcher.validate_grammar(_json(json.dumps(schema)), limits=LIMITS)
