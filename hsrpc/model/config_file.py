"""A model's config.json, read with types: every refusal names the file, the key, what was expected and found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsrpc.errors import CheckpointError
from hsrpc.model.bounds import MAX_JSON_BYTES
from hsrpc.model.foreign import HEAD_BYTES, check_own

_REMEDY = "correct the file, or serve a model that hsrpc supports"
_MAX_NUMBER = sys.float_info.max
"""A whole number beyond it has no float."""
_MAX_SHOWN = 200
"""Characters of a value that an error shows."""


def shown(value: object) -> str:
    """`value` as an error shows it, from a file that may hold one as long as itself."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """The beginning of a text from a file, for a line that people read."""
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


@dataclass(frozen=True)
class ConfigFile:
    """The values of one JSON object; a null value is an absent one.

    Raises:
        CheckpointError: from every reader, when the value is missing or is not what the reader returns.
    """

    file: str
    values: Mapping[str, object]

    def refuse(self, key: str, expected: str, remedy: str = _REMEDY) -> CheckpointError:
        found = shown(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"{self.file}: {shortened(key)}: expected {expected}, found {found}; {remedy}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse_all(self, keys: Sequence[str], expected: str, found: str, remedy: str = _REMEDY) -> CheckpointError:
        """For values that are only wrong together; of `keys` those are named that the file has."""
        named = ", ".join(f"{key}={shown(self.values[key])}" for key in keys if self.has(key))
        return CheckpointError(f"{self.file}: {named}: expected {expected}, found {found}; {remedy}")

    def integer(self, key: str, default: int | None = None, *, maximum: int) -> int:
        """A size or a count, from 1 to `maximum`, one of the bounds of models."""
        value = self.values.get(key) if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.refuse(key, f"a whole number from 1 to {maximum}")
        return value

    def count(self, key: str, default: int, *, maximum: int) -> int:
        """A whole number from 0 to `maximum`."""
        value = self.values.get(key) if self.has(key) else default
        return 0 if value == 0 and not isinstance(value, bool) else self.integer(key, default, maximum=maximum)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key) if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
            raise self.refuse(key, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.refuse(key, f"a list of {count} positive numbers")
        items = ConfigFile(f"{self.file}: {key}", {str(i): item for i, item in enumerate(value)})
        return tuple(map(items.number, items.values))

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key) if self.has(key) else default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key) if self.has(key) else default
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, "one of " + ", ".join(choices))
        return value

    def section(self, key: str) -> ConfigFile | None:
        """The object under `key`, or None."""
        if not self.has(key):
            return None
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return ConfigFile(f"{self.file}: {key}", value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """The token id, or list of them, under `key`; empty when absent."""
        if not self.has(key):
            return ()
        value = self.values[key]
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self.refuse(key, f"a token id, or a list of them, below vocab_size={vocab_size}")
        return ids


def read_config(path: Path) -> ConfigFile:
    """The JSON object in `path`.

    Raises:
        CheckpointError: no such file, no JSON object in it, or far too large a one.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON_BYTES:
                expected = f"at most {MAX_JSON_BYTES} bytes of JSON"
                raise CheckpointError(f"{path}: expected {expected}, found {size} bytes; fetch the file again")
            content = file.read(size)
        check_own(path, content[:HEAD_BYTES])
        values = json.loads(content)  # bytes: of UTF-8, 16 or 32, with a byte order mark or without
    except OSError as error:
        remedy = "give a model directory in Hugging Face format"
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {error}; fetch the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}; fetch the file again")
    return ConfigFile(str(path), values)
