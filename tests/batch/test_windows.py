"""Inputs in windows: bounded memory, each line once, what is done left out, two of one custom_id refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.batch.answer import output_line
from hsrpc.batch.call import Call
from hsrpc.batch.input_file import open_lines
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.line import key_of, read_line
from hsrpc.batch.refusal import BatchError, Fault, Refusal
from hsrpc.batch.shard import Shard
from hsrpc.batch.windows import Survey, Windows
from tests.batch.support import completion, write_lines


@pytest.fixture(params=["in.jsonl", "in.jsonl.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def found(windows: Windows) -> list[list[str | None]]:
    return [[job.line.custom_id for job in jobs] for jobs in windows]


def test_windows_hold_so_much_and_no_more(path):
    """Together they hold all lines, in the order of the file where nothing else decides."""
    write_lines(path, [completion(f"r{number}") for number in range(20)])
    windows = Windows(str(path), Ledger(), max_bytes=5 * 4300)
    assert windows.survey() == Survey(20, 0)
    assert found(windows) == [[f"r{number}" for number in range(begin, begin + 5)] for begin in range(0, 20, 5)]


def test_an_input_longer_than_memory_streams(tmp_path):
    """At the peak there is a window, not the file."""
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for number in range(400):
            file.write(b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": ' % number)
            file.write(b'{"model": "m", "prompt": "%s"}}\n' % (b"x" * 20_000))
    windows = Windows(str(path), Ledger(), max_bytes=200_000)
    tracemalloc.start()
    try:
        windows.survey()
        assert sum(len(jobs) for jobs in windows) == 400
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_what_is_done_is_left_out(path):
    """By custom_id, and by place where a line has none."""
    write_lines(path, [completion("a"), b"oops", completion("b"), b"oops"])
    ledger = Ledger()
    ledger.note_done(key_of("", "a"), read_line(1, path_line(path, 0)).id)
    ledger.note_done(read_line(2, b"oops").key, read_line(2, b"oops").id)
    windows = Windows(str(path), ledger)
    assert windows.survey() == Survey(4, 2)
    assert [[job.line.number for job in jobs] for jobs in windows] == [[3, 4]]


def path_line(path: Path, index: int) -> bytes:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()[index]


@pytest.mark.parametrize("is_surveyed", [True, False])
def test_two_lines_of_one_custom_id(path, is_surveyed):
    """Both are named."""
    write_lines(path, [completion("a"), b"", completion("b"), completion("a", n=2)])
    windows = Windows(str(path), Ledger())
    with pytest.raises(BatchError, match="line 4: custom_id 'a' is that of line 1; give each line one of its own"):
        windows.survey() if is_surveyed else found(windows)


def test_an_output_of_another_input(path):
    """Lines that have the custom_ids of others' outputs would be lost."""
    write_lines(path, [completion("a")])
    ledger = Ledger()
    ledger.note_done(key_of("", "a"), "batch_req_other")
    with pytest.raises(BatchError, match="line 1: custom_id 'a' is in the output already, for another request; give"):
        Windows(str(path), ledger).survey()


def test_what_a_line_becomes(path):
    """A call, a refusal of its body, or a fault of its own."""
    write_lines(path, [completion("a"), completion("b", suffix="."), b"oops"])
    [jobs] = Windows(str(path), Ledger())
    assert [type(job.task) for job in sorted(jobs, key=lambda job: job.line.number)] == [Call, Refusal, Fault]


def test_a_line_that_is_too_long(path):
    """Is a fault, and is read no further than it may be; the next one is whole."""
    write_lines(path, [completion("a", prompt="x" * 50_000), completion("b"), completion("c", prompt="x" * 50_000)])
    [jobs] = Windows(str(path), Ledger(), max_bytes=20_000)
    assert [(job.line.number, job.line.custom_id) for job in jobs] == [(2, "b"), (1, None), (3, None)]
    assert "longer than 20000 bytes" in jobs[1].task.message


def test_no_newline_at_the_end(tmp_path):
    """Its last line counts."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(write_lines(path, [completion("a")]).read_bytes().rstrip())
    assert found(Windows(str(path), Ledger())) == [["a"]]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_each_line_is_of_one_shard(path, count):
    """By its number in the file, empty and overlong lines counted; a shard may have no line at all."""
    names = [f"r{number}" for number in range(12)]
    write_lines(path, [*map(completion, names[:5]), b"", b"x" * 9000, *map(completion, names[5:])])
    shards = [Windows(str(path), Ledger(), max_bytes=8000, shard=Shard(index, count)) for index in range(count)]
    surveys = [windows.survey() for windows in shards]
    assert sum(survey.lines for survey in surveys) == 13
    found_names = [name for windows in shards for jobs in found(windows) for name in jobs]
    assert sorted(found_names, key=str) == sorted([*names, None], key=str)
    if count == 3:
        assert [name for jobs in found(shards[1]) for name in jobs] == ["r1", "r4", "r5", "r8", "r11"]


def test_there_is_no_such_shard():
    """The last of eight is 7."""
    for index, count in ((8, 8), (-1, 8), (0, 0)):
        with pytest.raises(ValueError, match=f"there is no shard {index} of {count}"):
            Shard(index, count)


def test_compressed_input_that_ends_too_soon(tmp_path):
    """Says where, and is no end of the input."""
    path = write_lines(tmp_path / "in.gz", [completion(str(number)) for number in range(50)])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BatchError, match=r"in\.gz: damaged after line 49 .*; copy it again"):
        Windows(str(path), Ledger()).survey()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Lines of requests, compressed or not, with some bytes cut out, put in or changed."""
    lines = draw(st.lists(st.sampled_from(["a", "b", "c"]).map(completion).map(json.dumps), max_size=4))
    data = bytearray("\n".join(lines).encode())
    if draw(st.booleans()):
        data = bytearray(gzip.compress(data, mtime=0))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(deadline=None)
@given(st.one_of(damaged(), damaged(), st.binary(max_size=200), st.binary(max_size=200).map(b"\x1f\x8b".__add__)))
def test_any_file_is_lines_or_refused(data):
    """Each of its lines is a call, a refusal or a fault, whose output can be written; or the file is damaged."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in"
        path.write_bytes(data)
        windows, jobs, problem = Windows(str(path), Ledger(), max_bytes=5_000), [], ""
        try:
            windows.survey()
            jobs = [job for window in windows for job in window]
        except BatchError as error:
            problem = str(error).removeprefix(f"{path}: ")
    assert not problem or problem.startswith(("damaged after line", "line "))
    assert len({job.line.number for job in jobs}) == len(jobs)
    for job in jobs:
        assert isinstance(job.task, Call) or json.loads(output_line(job.line, job.task, "r"))["custom_id"] == (
            job.line.custom_id
        )


def test_what_can_be_read_once_is_not_surveyed(tmp_path):
    """A pipe, by its name."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert Windows(str(path), Ledger()).survey() is None


def test_standard_input_that_is_closed(monkeypatch):
    """Says so."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(BatchError, match="standard input is closed; give a file"), open_lines("-", 100):
        pass


def test_an_input_that_is_not_there(tmp_path):
    """The system's own words."""
    with pytest.raises(FileNotFoundError):
        Windows(str(tmp_path / "none"), Ledger()).survey()


def test_a_ledger_takes_many():
    """More than its cache, in a file that is gone with it."""
    ledger = Ledger()
    for number in range(1000):
        ledger.note_done(key_of("", str(number)), f"batch_req_{number}")
    line = read_line(1, io.BytesIO(b'{"custom_id": "x"}').read())
    assert not ledger.is_done(line)
    ledger.close()
