"""The two files of a batch, outputs and errors, written on a thread of its own: the event loop waits for no disk."""

from __future__ import annotations

from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import NamedTuple, Self

from hsrpc.batch.ledger import Ledger
from hsrpc.batch.line import key_of
from hsrpc.batch.output_file import OutputFile, StandardOutput, Store

GATHER_SECONDS = 1.0
"""For which lines wait for others where they are compressed: few large blocks get smaller than many small ones."""


class _Given(NamedTuple):
    line: bytes
    is_error: bool


class Outputs:
    """Takes lines of output until it is left: those of one write go to their files together, in the order they came.

    `output` None is standard output. The file `errors` is made with the first line for it.

    Raises:
        OSError, BatchError: on construction, a file cannot be had.
    """

    def __init__(self, output: Path | None, errors: Path) -> None:
        self.written = 0
        """Lines that are in their files."""
        self._errors_path = errors
        self._output: Store = StandardOutput() if output is None else OutputFile(output)
        self._errors: Store | None = OutputFile(errors) if errors.exists() else None
        self._gather_seconds = GATHER_SECONDS if output is not None and output.suffix == ".gz" else 0.0
        self._queue: SimpleQueue[_Given | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = Thread(target=self._run, name="hsrpc-batch-output", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was given.

        Raises:
            OSError: it could not be written.
        """
        self._queue.put(None)
        self._thread.join()
        for store in (self._output, self._errors):
            if store is not None:
                store.close()
        if error is None:
            self._check()

    def resume(self, ledger: Ledger) -> int:
        """Tell `ledger` of the lines that are there already; returns their number. Before the first `put`.

        Raises:
            BatchError: a file holds something else.
        """
        count = 0
        for store in (self._output, self._errors):
            for written in store.resume() if store is not None else ():
                ledger.note_done(key_of(*written), written.id)
                count += 1
        return count

    def put(self, line: bytes, *, is_error: bool) -> None:
        """Take a line, which is on its way to its file then.

        Raises:
            OSError: one before it could not be written.
        """
        self._check()
        self._queue.put(_Given(line, is_error))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            goes_on = True
            while goes_on:
                goes_on, given = self._gather()
                for is_error in (False, True):
                    lines = [each.line for each in given if each.is_error == is_error]
                    if lines:
                        self._store(is_error).append(lines)
                        self.written += len(lines)
        except Exception as error:  # raised again where more is given, and at the end
            self._failure = error

    def _gather(self) -> tuple[bool, list[_Given]]:
        """Whether more will come, and what has come by now."""
        given: list[_Given] = []
        item = self._queue.get()
        until = monotonic() + self._gather_seconds
        while item is not None:
            given.append(item)
            try:
                item = self._queue.get(timeout=max(0.0, until - monotonic()))
            except Empty:
                return True, given
        return False, given

    def _store(self, is_error: bool) -> Store:
        if not is_error:
            return self._output
        if self._errors is None:
            self._errors = OutputFile(self._errors_path)
        return self._errors
