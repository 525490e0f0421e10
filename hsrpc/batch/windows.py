"""An input in windows: as many lines at a time as memory is allowed for, each window in the order in which it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from hsrpc.batch.call import Call, read_call
from hsrpc.batch.input_file import can_read_twice, open_lines
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.line import Line
from hsrpc.batch.order import Job, arranged
from hsrpc.batch.refusal import Fault, Refusal
from hsrpc.batch.shard import WHOLE, Shard
from hsrpc.errors import InvalidRequestError

DEFAULT_BYTES = 2**26
_OBJECT_BYTES = 4096
"""Memory that a line takes beside its text, about."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first look at an input has found."""

    lines: int
    done: int
    """Lines that an output has already."""


class Windows:
    """The lines of a shard of the input `name` that no output has, in windows of `max_bytes` at most.

    One thread at a time may use it.

    Raises:
        OSError, BatchError: from all methods, the input cannot be read, or two lines have one custom_id.
    """

    def __init__(self, name: str, ledger: Ledger, max_bytes: int = DEFAULT_BYTES, shard: Shard = WHOLE) -> None:
        self._name = name
        self._shard = shard
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._is_surveyed = False

    def survey(self) -> Survey | None:
        """Read it all, and check that no custom_id is there twice; None: it can be read only once, and is not read."""
        if not can_read_twice(self._name):
            return None
        lines = done = 0
        with open_lines(self._name, self._max_bytes, self._shard) as found:
            for line in found:
                lines += 1
                self._ledger.note_seen(line)
                done += self._ledger.is_done(line)
        self._is_surveyed = True
        return Survey(lines, done)

    def __iter__(self) -> Iterator[list[Job]]:
        """The windows; the custom_ids of an input that was not surveyed are checked as they come."""
        jobs: list[Job] = []
        num_bytes = 0
        with ExitStack() as stack:
            for line in stack.enter_context(open_lines(self._name, self._max_bytes, self._shard)):
                if not self._is_surveyed:
                    self._ledger.note_seen(line)
                if self._ledger.is_done(line):
                    continue
                size = line.num_bytes + _OBJECT_BYTES
                if jobs and num_bytes + size > self._max_bytes:
                    yield arranged(jobs)
                    jobs, num_bytes = [], 0
                jobs.append(Job(line, _task(line)))
                num_bytes += size
        if jobs:
            yield arranged(jobs)


def _task(line: Line) -> Call | Refusal | Fault:
    if isinstance(line.content, Fault):
        return line.content
    try:
        return read_call(*line.content)
    except InvalidRequestError as error:
        return Refusal.of(error)
