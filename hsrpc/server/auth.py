"""Who calls, by the bearer tokens of a file; the tokens themselves are neither kept nor logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

from hsrpc.errors import ConfigError
from hsrpc.server.errors import UnauthenticatedError
from hsrpc.server.reloaded_file import ReloadedFiles, read_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")
_GRANTS = re.compile(r"(?:max-priority=(-?[0-9]{1,9}))?")
_REPORT_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose a token is, and what it grants."""

    name: str
    max_priority: int | None = None
    """Most urgent that its requests may be; None: as for everybody."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Holders by the SHA-256 of their tokens: digests have one length, and the tokens themselves are not kept."""

    entries: tuple[tuple[bytes, Holder], ...]

    def holder_of(self, token: str) -> Holder | None:
        """The client that `token` belongs to. Takes as long whichever entry it is, and for none."""
        digest = _digest(token)
        found = None
        for known, holder in self.entries:
            if hmac.compare_digest(known, digest):
                found = holder
        return found


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file, by their digests.

    Raises:
        ConfigError: as `read_holders`.
    """
    return Tokens(tuple((_digest(token), holder) for token, holder in read_holders(path).items()))


def read_holders(path: Path) -> dict[str, Holder]:
    """The tokens of a file with `name token [max-priority=N]` a line, and whose they are. They are not to be kept.

    `#` begins a comment line, a name may have several tokens.

    Raises:
        ConfigError: it cannot be read, others may read it, a line is wrong, or none has a token. Its message never
            has one.
    """
    holders: dict[str, Holder] = {}
    data = read_file(path, "auth_tokens", secret=True).decode("utf-8", errors="replace")
    for number, line in enumerate(data.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or not _NAME.fullmatch(words[0]) or not _TOKEN.fullmatch(words[1]):
            remedy = "write `name token`: 1 to 64 of A-Z a-z 0-9 . _ @ -, and 16 to 512 of A-Z a-z 0-9 . _ ~ + / -"
            raise ConfigError("auth_tokens", str(path), f"line {number} is no name and token", remedy)
        grants = _GRANTS.fullmatch(" ".join(words[2:]))
        if grants is None:
            remedy = "write nothing more, or max-priority=N with a whole number, such as max-priority=-3"
            raise ConfigError("auth_tokens", str(path), f"line {number} has more than name, token and grant", remedy)
        holder = Holder(words[0], None if grants[1] is None else int(grants[1]))
        first = holders.setdefault(words[1], holder)
        if first != holder:
            problem, remedy = f"line {number} has the token of {first.name!r}", "give each client a token of its own"
            raise ConfigError("auth_tokens", str(path), problem, f"{remedy}, and write each once")
    if not holders:
        raise ConfigError("auth_tokens", str(path), "no tokens in it", "add a line `name token` for each client")
    return holders


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class RefusalLog:
    """Counts refusals, and logs one line for all those of some seconds: strangers must not fill the disk."""

    def __init__(self, why: str) -> None:
        self._why = why
        self._refused = 0
        self._reported = -math.inf

    def note(self) -> None:
        """A call is refused."""
        self._refused += 1
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            _log.warning("%d calls refused %s", self._refused, self._why)
            self._refused, self._reported = 0, time.monotonic()


class Authenticator:
    """Knows clients by the tokens of a file, which is read again when it changes.

    Raises:
        ConfigError: on construction, what `read_tokens` raises.
    """

    def __init__(self, path: Path, files: ReloadedFiles) -> None:
        self._tokens = files.watch([path], lambda: read_tokens(path))
        self._refusals = RefusalLog("for want of a known token")

    def holder_of(self, token: str | None) -> Holder:
        """The client that brings `token`.

        Raises:
            UnauthenticatedError: it brings none, or one that is not in the file.
        """
        holder = self._tokens.current().holder_of(token) if token else None
        if holder is None:
            self._refusals.note()
            raise UnauthenticatedError("the token is unknown" if token else "no token")
        return holder
