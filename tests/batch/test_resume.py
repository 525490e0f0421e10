"""A run that ends anywhere, and files that are torn anywhere: together the runs have each line once."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.batch import outputs as module
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.output_file import errors_path
from hsrpc.batch.outputs import Outputs
from hsrpc.batch.run import Runner
from hsrpc.batch.windows import Windows
from hsrpc.errors import EngineFaultError
from tests.batch.support import MODEL, StubSource, completion, custom_ids, read_lines, write_lines

LINES = 12


def line(number: int) -> object:
    """Some have several requests, some are refused, one is no request."""
    if number == 5:
        return b"oops"
    return completion(f"r{number}", n=1 + number % 3, model="no" if number % 4 == 0 else MODEL)


def run(source: Path, output: Path, dies_at: int | None, concurrency: int) -> None:
    """One run, of which the engine dies at a line; None: at none."""
    stub = StubSource()
    if dies_at is not None:
        stub.failures[f"say r{dies_at}"] = [EngineFaultError("died")]
    ledger = Ledger()
    with suppress(EngineFaultError), Outputs(output, errors_path(output)) as outputs:
        outputs.resume(ledger)
        windows = Windows(str(source), ledger, max_bytes=3 * 4400)
        windows.survey()
        asyncio.run(Runner(stub, outputs, concurrency=concurrency).run(iter(windows)))
    ledger.close()


DEATHS = st.lists(st.tuples(st.integers(0, LINES - 1), st.floats(0, 1), st.floats(0, 1)), max_size=4)


@settings(max_examples=40)
@given(st.sampled_from(["out.jsonl", "out.jsonl.gz"]), DEATHS, st.integers(1, 5))
def test_each_line_is_there_once(name, deaths, concurrency):
    """Whatever is done again."""
    with TemporaryDirectory() as folder, patch.object(os, "fsync"), patch.object(module, "GATHER_SECONDS", 0.0):
        source, output = write_lines(Path(folder, "in"), map(line, range(LINES))), Path(folder, name)
        for dies_at, left, errors_left in deaths:
            run(source, output, dies_at, concurrency)
            for path, part in ((output, left), (errors_path(output), errors_left)):
                if path.exists():
                    os.truncate(path, round(part * path.stat().st_size))
        run(source, output, None, concurrency)
        names = [f"r{number}" if number != 5 else None for number in range(LINES)]
        assert custom_ids(output, errors_path(output)) == Counter(names)
        assert len(read_lines(errors_path(output))) == 4
