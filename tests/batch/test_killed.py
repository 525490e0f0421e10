"""`hsrpc batch` killed at random points: no line is lost, and none is there twice."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections import Counter
from contextlib import suppress
from itertools import cycle
from pathlib import Path

from hsrpc.batch.output_file import errors_path
from tests.batch import killed
from tests.batch.support import MODEL, completion, custom_ids, read_lines, text_of, write_lines

KILLS = 50
LINES = 300
MAX_SECONDS = 0.08
"""After the process has begun, or has its first output, until it is killed: all lines take longer."""


def test_killed_fifty_times(tmp_path):
    """SIGKILL, then the same command again, until one ends by itself; then another input."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed.__name__])
    rng, kills, amid = random.Random(7), 0, 0

    def run(source: Path, output: Path) -> int:
        ours, theirs = context.Pipe()
        arguments = [str(source), str(output), "--concurrency=4"]
        process = context.Process(target=killed.run_batch, args=(arguments, theirs))
        process.start()
        theirs.close()
        with suppress(EOFError):
            for _ in range(rng.randint(1, 2)):
                ours.recv()
        process.join(rng.uniform(0, MAX_SECONDS) if kills < KILLS else None)
        process.kill()
        process.join()
        return process.exitcode

    for suffix in cycle(("", ".gz")):
        if kills >= KILLS:
            break
        source, output = tmp_path / f"in-{kills}.jsonl{suffix}", tmp_path / f"out-{kills}.jsonl{suffix}"
        write_lines(source, [line(number) for number in range(LINES)])
        while (code := run(source, output)) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            amid += output.exists() and output.stat().st_size > 0
        check(output)
    assert amid > KILLS / 4  # most of those that waited for the first output


def line(number: int) -> dict[str, object]:
    """Some have two requests, some are refused."""
    return completion(f"r{number}", n=1 + number % 2, model="no" if number % 7 == 0 else MODEL)


def check(output: Path) -> None:
    """Each line is there once, in its file, with its own text."""
    errors = errors_path(output)
    assert custom_ids(output, errors) == Counter(f"r{number}" for number in range(LINES))
    assert custom_ids(errors).keys() == {f"r{number}" for number in range(0, LINES, 7)}
    for each in read_lines(output):
        assert text_of(each) == f"say {each['custom_id']}"
