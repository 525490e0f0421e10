"""Which lines there are and which are done, in a temporary file: there may be more of them than memory holds."""

from __future__ import annotations

import sqlite3
from threading import Lock

from hsrpc.batch.line import Line
from hsrpc.batch.refusal import BatchError

_CACHE_KIB = 65_536


class Ledger:
    """The lines of an input that were seen, and those of its outputs.

    A thread that still reads the input may ask after it is closed, and gets sqlite3.ProgrammingError.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        """Held while the files are used: sqlite3 crashes where they are closed meanwhile."""
        self._files = sqlite3.connect("", check_same_thread=False)  # a temporary one, deleted when it is closed
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
            self._files.execute(f"PRAGMA {setting}")
        self._files.execute("CREATE TABLE done (key TEXT PRIMARY KEY, id TEXT) WITHOUT ROWID")
        self._files.execute("CREATE TABLE seen (key TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def close(self) -> None:
        with self._lock:
            self._files.close()

    def note_done(self, key: str, line_id: str) -> None:
        """An output holds this line."""
        with self._lock:
            self._files.execute("INSERT OR IGNORE INTO done VALUES (?, ?)", (key, line_id))

    def note_seen(self, line: Line) -> None:
        """The input holds this line.

        Raises:
            BatchError: another one has its custom_id.
        """
        with self._lock:
            try:
                self._files.execute("INSERT INTO seen VALUES (?, ?)", (line.key, line.number))
            except sqlite3.IntegrityError:
                [first] = self._files.execute("SELECT number FROM seen WHERE key = ?", (line.key,)).fetchone()
                found = f"custom_id {line.custom_id!r} is that of line {first}"
                raise BatchError(f"line {line.number}: {found}; give each line one of its own") from None

    def is_done(self, line: Line) -> bool:
        """Whether an output has it.

        Raises:
            BatchError: an output has another line with its custom_id.
        """
        with self._lock:
            found = self._files.execute("SELECT id FROM done WHERE key = ?", (line.key,)).fetchone()
        if found is not None and found[0] != line.id:
            problem = f"custom_id {line.custom_id!r} is in the output already, for another request"
            raise BatchError(f"line {line.number}: {problem}; give another OUT, or that request another custom_id")
        return found is not None
