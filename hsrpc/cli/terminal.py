"""Standard output that does not know all characters: a terminal of one language, or a pipe under `LANG=C`."""

from __future__ import annotations

import io
import json
import sys


def print_any_text() -> None:
    """Let standard output print a question mark for what its encoding lacks, unless the environment says otherwise."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def printable_json(value: object) -> str:
    """`value` in one line that standard output can print without loss: with escapes, where it is not UTF-8."""
    encoding = (sys.stdout.encoding or "ascii").lower().replace("_", "-")
    return json.dumps(value, ensure_ascii=encoding not in ("utf-8", "utf8"))
