"""The cases, as cases.yaml has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from clients.conformance.result import Json

FILE = Path(__file__).with_name("cases.yaml")

Tokenize = Callable[[str], Sequence[int]]
_Kind = TypeVar("_Kind")


class Pause(StrEnum):
    """What is done between the repeats of a case, while its client stays open."""

    IDLE = "idle"
    """The server's load must come back to zero, with most of the work not done."""
    RESTART = "restart"
    """The server is ended and started again, at the same port."""


class Occupied(StrEnum):
    """How long the runner keeps a server busy with calls of its own."""

    UNTIL_REFUSED = "until refused"
    THROUGHOUT = "throughout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """How a server is started."""

    flags: Sequence[str] = ()
    tls: bool = False
    client_ca: bool = False
    token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the client trusts and shows: `right`, `wrong` or `none`. It has nothing that the server has no use for."""

    ca: str = "right"
    certificate: str = "right"
    token: str = "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedError:
    """What an error must say; None: anything."""

    code: str
    field: str | None = None
    description: str | None = None
    """Words of what is said of the field."""
    reason: str | None = None
    domain: str | None = None
    retry_delay: bool = False
    """A time after which to try again is there, and is positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the results must be; without `error` and `cancelled` they equal those of a direct call, too."""

    error: ExpectedError | None = None
    cancelled: bool = False
    min_deltas: int = 0
    contains: Sequence[str] = ()
    finish: str | None = None
    stop_string: str | None = None
    logprobs: int | None = None
    """Tokens that have them."""
    refusals: int = 0
    """Calls that the server must have refused meanwhile, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request of a client's program, and what must come of it."""

    name: str
    about: str
    call: str
    request: Json
    server: str = "open"
    client: Identity = Identity()
    deadline_s: float | None = None
    cancel_after: int | None = None
    streams: int = 1
    repeat: int = 1
    pause: Pause | None = None
    occupied: Occupied | None = None
    expect: Expected = Expected()

    @classmethod
    def read(cls, entry: Json) -> Self:
        error = entry.get("expect", {}).get("error")
        expect = {**entry.get("expect", {}), "error": error and _read(ExpectedError, error)}
        nested = {
            "client": _read(Identity, entry.get("client", {})),
            "pause": Pause(entry["pause"]) if "pause" in entry else None,
            "occupied": Occupied(entry["occupied"]) if "occupied" in entry else None,
            "expect": _read(Expected, expect),
        }
        return _read(cls, {**entry, **nested})


@dataclass(frozen=True, slots=True)
class Suite:
    """All cases, and the servers that they need."""

    servers: Mapping[str, ServerKind]
    cases: Sequence[Case]

    @classmethod
    def load(cls) -> Self:
        """What cases.yaml says."""
        document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
        servers = {name: _read(ServerKind, kind) for name, kind in document["servers"].items()}
        return cls(servers, tuple(Case.read(entry) for entry in document["cases"]))

    def named(self, names: Sequence[str]) -> Self:
        """The suite with these cases alone.

        Raises:
            ValueError: there is no case of a name.
        """
        known = {case.name: case for case in self.cases}
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is no case; there are: {', '.join(map(repr, known))}")
        return type(self)(self.servers, tuple(known[name] for name in names))


def _read(kind: type[_Kind], entry: Json) -> _Kind:
    """An instance of a dataclass, whose fields `entry` names."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(entry) - known:
        raise ValueError(f"cases.yaml: {', '.join(sorted(unknown))} in {entry}: use {', '.join(sorted(known))}")
    return kind(**entry)


def filled_in(value: Any, tokenize: Tokenize) -> Any:
    """A request with what stands for something else replaced.

    `{$tokens: TEXT}` is the ids of a text, `{$bias: {text: TEXT, by: X}}` a logit bias for each of them, and
    `{$repeat: {text: TEXT, times: N}}` a text of that many copies.
    """
    if isinstance(value, list):
        return [filled_in(each, tokenize) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tokens" in value:
        return list(tokenize(value["$tokens"]))
    if "$bias" in value:
        return {str(token_id): value["$bias"]["by"] for token_id in tokenize(value["$bias"]["text"])}
    if "$repeat" in value:
        return value["$repeat"]["text"] * value["$repeat"]["times"]
    return {name: filled_in(each, tokenize) for name, each in value.items()}
