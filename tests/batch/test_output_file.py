"""Files of output after any kill: what was written whole is there, what was torn is gone, all else is as it was."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsrpc.batch import output_file
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.output_file import OutputFile, errors_path
from hsrpc.batch.outputs import Outputs
from hsrpc.batch.refusal import BatchError
from tests.batch.support import read_lines

NAMES = ("out.jsonl", "out.jsonl.gz")


def line(number: int, text: str = "") -> bytes:
    return json.dumps({"id": f"batch_req_{number}", "custom_id": str(number), "text": text}).encode() + b"\n"


def write(path: Path, blocks: list[list[bytes]]) -> list[int]:
    """Sizes of the file after each block."""
    file, sizes = OutputFile(path), [0]
    for block in blocks:
        file.append(block)
        sizes.append(path.stat().st_size)
    file.close()
    return sizes


def resume(path: Path, *more: bytes) -> list[str]:
    """The custom_ids that are found, and then more lines written."""
    file = OutputFile(path)
    try:
        found = [written.custom_id for written in file.resume()]
        if more:
            file.append(list(more))
        return found
    finally:
        file.close()


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


BLOCKS = st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=3), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(blocks=BLOCKS, data=st.data())
def test_a_file_that_was_torn_anywhere(path, blocks, data):
    """Whole blocks are found, in order; of lines those that are whole. What comes after is read with them."""
    path.unlink(missing_ok=True)
    numbers = iter(range(1000))
    lines = [[line(next(numbers), text) for text in block] for block in blocks]
    with patch.object(os, "fsync"):  # tears nothing here
        sizes = write(path, lines)
        size = data.draw(st.integers(0, sizes[-1]), "bytes left")
        os.truncate(path, size)
        if data.draw(st.booleans(), "then zeros"):  # as some file systems leave after a loss of power
            with path.open("ab") as file:
                file.write(bytes(data.draw(st.integers(1, 40))))
        found = resume(path, line(5000))
    whole = sum(len(block) for block, end in zip(lines, sizes[1:], strict=True) if end <= size)
    if path.suffix == ".jsonl":
        whole = b"".join(part for block in lines for part in block)[:size].count(b"\n")
    assert found == [str(number) for number in range(whole)]
    assert [each["custom_id"] for each in read_lines(path)] == [*found, "5000"]


def test_zeros_in_the_middle_are_cut_with_all_behind_them(tmp_path):
    """A block that was never stored, before one that was."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(0) + bytes(30) + b"\n" + line(2))
    assert resume(path) == ["0"]
    assert path.read_bytes() == line(0)


@pytest.mark.parametrize(
    "content",
    [
        *(b"precious", b"precious\n", b'{"id": 5}\n', b"[]\n", b'{"id": "mine"', b"\x1f\x8bx"),
        gzip.compress(b"precious", mtime=0)[:-4],
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(path, content):
    """It is refused, whether it ends in a line or not."""
    path.write_bytes(content)
    with pytest.raises(BatchError, match=r"out\.jsonl.*give another file"):
        resume(path)
    assert path.read_bytes() == content


def test_a_line_of_something_else_within_compressed_lines(tmp_path):
    """As in a plain file."""
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(gzip.compress(line(0) + b"precious\n"))
    with pytest.raises(BatchError, match="line 2 is no output of a batch"):
        resume(path)


def test_much_damage_is_not_cut(path, monkeypatch):
    """More than a kill leaves may be another's work."""
    monkeypatch.setattr(output_file, "_MAX_TORN", 10)
    write(path, [[line(0)], [line(1)]])
    os.truncate(path, path.stat().st_size - 5)
    before = path.read_bytes()
    with pytest.raises(BatchError, match="more than a kill leaves"):
        resume(path)
    assert path.read_bytes() == before


def test_a_file_has_one_writer(path):
    """Another is refused until the first has ended."""
    first = OutputFile(path)
    with pytest.raises(BatchError, match="another run writes it"):
        OutputFile(path)
    first.close()
    OutputFile(path).close()


def test_each_block_is_synced(path, monkeypatch):
    """After it was written, before `append` returns."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    write(path, [[line(0), line(1)], [line(2)]])
    assert synced[-1] == path.stat().st_size
    assert len(synced) == 3  # the folder, then each block


def test_a_short_write_goes_on(path, monkeypatch):
    """The system may take a part of a block at a time."""
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[:7]))
    write(path, [[line(0), line(1)]])
    monkeypatch.undo()
    assert resume(path) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("a/out.jsonl", "a/out.errors.jsonl"),
        ("out.jsonl.gz", "out.errors.jsonl.gz"),
        ("out", "out.errors"),
        ("v1.2.jsonl", "v1.2.errors.jsonl"),
    ],
)
def test_errors_have_a_file_beside(name, errors):
    """It ends as the other does, compressed or not."""
    assert errors_path(Path(name)) == Path(errors)


def test_outputs_go_to_two_files(path):
    """In the order they came; that for errors is there once there are any."""
    errors = errors_path(path)
    with Outputs(path, errors) as outputs:
        for number in range(50):
            outputs.put(line(number), is_error=False)
    assert not errors.exists()
    with Outputs(path, errors) as outputs:
        assert outputs.resume(Ledger()) == 50
        outputs.put(line(50), is_error=True)
    assert [each["custom_id"] for each in read_lines(path)] == [str(number) for number in range(50)]
    assert [each["custom_id"] for each in read_lines(errors)] == ["50"]
    with Outputs(path, errors) as outputs:
        assert outputs.resume(Ledger()) == 51


def test_compressed_lines_wait_for_others(tmp_path):
    """Few blocks, and not a member a line."""
    path = tmp_path / "out.jsonl.gz"
    with Outputs(path, errors_path(path)) as outputs:
        for number in range(200):
            outputs.put(line(number, "the same text"), is_error=False)
    assert path.stat().st_size < 4000


def test_a_full_disk_ends_a_run(path, monkeypatch):
    """At the next line, and at the end."""

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    outputs = Outputs(path, errors_path(path))
    monkeypatch.setattr(os, "write", fail)

    def give() -> None:
        with outputs:
            outputs.put(line(0), is_error=False)

    with pytest.raises(OSError, match="No space left"):
        give()
    with pytest.raises(OSError, match="No space left"):
        outputs.put(line(1), is_error=False)
