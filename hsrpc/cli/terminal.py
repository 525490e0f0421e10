"""Standard output that lacks characters, as a terminal of one language does; standard error that nobody reads."""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from threading import Thread

from hsrpc.server.ops.log_queue import FLUSH_SECONDS, write_to_stderr


def print_any_text() -> None:
    """Let standard output print a question mark for what its encoding lacks, unless the environment says otherwise."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def printable_json(value: object) -> str:
    """`value` in one line that standard output can print without loss: with escapes, where it is not UTF-8."""
    encoding = (sys.stdout.encoding or "ascii").lower().replace("_", "-")
    return json.dumps(value, ensure_ascii=encoding not in ("utf-8", "utf8"))


def print_error(line: str) -> None:
    """Write a line to standard error; it is lost where nobody takes it within `FLUSH_SECONDS`, as of a full pipe."""
    if sys.stderr is None:  # closed: its number may be that of another file by now
        return
    data = f"{line}\n".encode(sys.stderr.encoding, errors="backslashreplace")
    writing = Thread(target=_write_error, args=(data,), daemon=True)
    writing.start()
    writing.join(FLUSH_SECONDS)


def _write_error(data: bytes) -> None:
    with suppress(OSError):
        write_to_stderr(data)
