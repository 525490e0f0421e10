"""One result of a call, as a client's program reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

Json = dict[str, Any]


class Logprob(NamedTuple):
    """A token's logprob, its rank, and the most probable tokens at its place."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    @classmethod
    def read(cls, entry: Json) -> Self:
        top = tuple((int(each["token_id"]), float(each["logprob"])) for each in entry["top"])
        return cls(int(entry["token_id"]), float(entry["logprob"]), int(entry["rank"]), top)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error with its details decoded."""

    code: str
    message: str
    fields: Sequence[tuple[str, str]]
    """Each field that is wrong, and what is."""
    retry_delay_s: float | None
    reason: str | None
    domain: str | None
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, entry: Json) -> Self:
        fields = tuple((each["field"], each["description"]) for each in entry["fields"])
        known = {name: entry[name] for name in ("code", "message", "retry_delay_s", "reason", "domain", "metadata")}
        return cls(fields=fields, **known)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one call."""

    text: str
    deltas: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    stop_string: str | None
    cancelled: bool = False
    error: Failure | None = None

    @classmethod
    def read(cls, entry: Json) -> Self:
        """The result in an answer.

        Raises:
            KeyError, TypeError, ValueError: a part of it is not there, or is something else.
        """
        return cls(
            text=entry["text"],
            deltas=int(entry["deltas"]),
            token_ids=tuple(map(int, entry["token_ids"])),
            logprobs=tuple(map(Logprob.read, entry["logprobs"])),
            prompt_tokens=int(entry["prompt_tokens"]),
            completion_tokens=int(entry["completion_tokens"]),
            finish_reason=entry["finish_reason"],
            stop_string=entry["stop_string"],
            cancelled=bool(entry["cancelled"]),
            error=Failure.read(entry["error"]) if entry["error"] is not None else None,
        )
