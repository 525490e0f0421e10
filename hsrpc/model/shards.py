"""Files numbered as model-00001-of-00003.safetensors: which belong together, and whether all are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hsrpc.errors import CheckpointError

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<suffix>\.\w+)")


def is_one_set(names: Iterable[str]) -> bool:
    """Whether all of these files are numbered, and of one set."""
    matches = map(_NUMBERED.fullmatch, names)
    sets = {match and (match["stem"], match["count"], match["suffix"]) for match in matches}
    return len(sets) == 1 and None not in sets


def numbered_set(name: str) -> list[str]:
    """The names of the set that a file belongs to, in order: itself alone, if it is not numbered."""
    match = _NUMBERED.fullmatch(name)
    return [name] if match is None else list(_names(match))


def check_complete(directory: Path, names: set[str]) -> None:
    """Check that with each numbered file all others of its set are there.

    Raises:
        CheckpointError: one is missing.
    """
    for match in filter(None, map(_NUMBERED.fullmatch, sorted(names))):
        for wanted in _names(match):
            if wanted not in names:
                expected = f"{wanted} beside {match.string}"
                raise CheckpointError(f"{directory}: expected {expected}, found none; fetch the missing file")


def _names(match: re.Match[str]) -> Iterator[str]:
    for number in range(1, int(match["count"]) + 1):
        yield f"{match['stem']}-{number:0{len(match['number'])}}-of-{match['count']}{match['suffix']}"
