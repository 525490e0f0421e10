"""Raw results under `benchmarks/results`: where each file comes from, and what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
"""One folder a question, one file a case: `{"header": {...}, "result": ...}`, or other keys beside the header."""
RECORDED = " (recorded)"
"""Behind a commit: it added the file; the code that ran is its own or its parent's."""
_PATTERNS = {"commit": rf"[0-9a-f]{{7,40}}\+?({re.escape(RECORDED)})?", "date": r"\d{4}-\d\d-\d\d"}


@dataclass(frozen=True, slots=True)
class Header:
    """Where a result comes from; every field is a text that says something."""

    commit: str
    """Short hash of the code that ran, `+` behind it where files differed."""
    command: str
    """Line that makes the file again, or "not kept"."""
    date: str
    """Day of the run or of that commit, as 2026-11-28."""
    machine: str
    torch: str
    """Version, or "not used"."""


class Record(NamedTuple):
    """One file of results."""

    name: str
    """Path below `RESULTS` without its suffix, such as `policies/opt-13b`."""
    header: Header
    result: Any
    """What the benchmark wrote: the value of `result`, or all keys but the header."""


def names() -> list[str]:
    """All files of results, in order."""
    return sorted(file.relative_to(RESULTS).with_suffix("").as_posix() for file in RESULTS.rglob("*.json"))


def read(name: str) -> Record:
    """The file of that name. ValueError: its header lacks a field, or has one that says nothing."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("header"), dict):
        raise ValueError(f'{name}: has no header; make it {{"header": {{...}}, "result": what the benchmark wrote}}')
    header = _header(name, content.pop("header"))
    return Record(name, header, content.get("result", content))


def _header(name: str, values: dict[str, object]) -> Header:
    wanted = [item.name for item in fields(Header)]
    if set(values) != set(wanted):
        raise ValueError(f"{name}: the header must have {', '.join(wanted)}; it has {', '.join(values) or 'nothing'}")
    for field, value in values.items():
        if not isinstance(value, str) or not re.fullmatch(_PATTERNS.get(field, r"\S.*"), value):
            raise ValueError(f"{name}: the header's {field} is {value!r}; write what is known, or 'not kept'")
    return Header(**{field: str(value) for field, value in values.items()})
