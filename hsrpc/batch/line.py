"""Lines of an input, in OpenAI's batch form: custom_id, method, url, body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from hsrpc.batch.refusal import Fault
from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Json, check_unicode

ID_PREFIX = "batch_req_"
_ID_LENGTH = 32


class Endpoint(StrEnum):
    """The `url` of a line."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an input, of which nothing is checked but its form."""

    number: int
    """1 is the first line of the file."""
    id: str
    """The same line has the same one in every run, and no two lines share one."""
    custom_id: str | None
    """None: it has none that could be read."""
    content: tuple[Endpoint, Json] | Fault
    """Endpoint and body, or what is wrong with the line."""
    num_bytes: int

    @property
    def key(self) -> str:
        """Text by which its output is found again."""
        return key_of(self.id, self.custom_id)


def key_of(line_id: str, custom_id: str | None) -> str:
    """Text that is that of no other line: by its custom_id, or where it has none by its id."""
    return f"line {line_id}" if custom_id is None else f"custom_id {custom_id}"


def read_line(number: int, data: bytes) -> Line:
    """The line in `data`, which is not empty."""
    data = data.strip()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return _faulty(number, data, "invalid_json_line", f"not JSON ({_shortened(error)}); give one object a line")
    if not isinstance(value, dict):
        return _faulty(number, data, "invalid_json_line", f"a JSON {type(value).__name__}; give an object")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        found = f"custom_id: {_shown(custom_id)}; give each line a string of its own"
        return _faulty(number, data, "missing_required_parameter", found, "custom_id")
    try:
        check_unicode("custom_id", custom_id)
    except InvalidRequestError as error:
        return _faulty(number, data, "invalid_value", str(error), "custom_id")
    return Line(number, _id(data), custom_id, _content(number, value), len(data))


def too_long(number: int, limit: int) -> Line:
    """The line that is longer than `limit` bytes, and was not read."""
    found = f"longer than {limit} bytes; make it shorter, or give a larger --window"
    return _faulty(number, b"", "invalid_json_line", found)


def _content(number: int, value: Mapping[str, Any]) -> tuple[Endpoint, Json] | Fault:
    method, url, body = value.get("method"), value.get("url"), value.get("body")
    if method != "POST":
        return _fault(number, "invalid_method", f'method: {_shown(method)}; give "POST"', "method")
    if url not in list(Endpoint):
        known = " or ".join(Endpoint)
        return _fault(number, "invalid_url", f"url: {_shown(url)} is not served; give {known}", "url")
    if not isinstance(body, dict):
        return _fault(number, "missing_required_parameter", f"body: {_shown(body)}; give an object", "body")
    return Endpoint(url), body


def _faulty(number: int, data: bytes, code: str, found: str, param: str | None = None) -> Line:
    """A line without a custom_id: its place in the file is part of its id."""
    return Line(number, _id(b"%d\n" % number + data), None, _fault(number, code, found, param), len(data))


def _fault(number: int, code: str, found: str, param: str | None = None) -> Fault:
    return Fault(code, f"line {number}: {found}", number, param)


def _id(data: bytes) -> str:
    return ID_PREFIX + sha256(data).hexdigest()[:_ID_LENGTH]


def _shown(value: object) -> str:
    return "absent" if value is None else _shortened(repr(value))


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
