"""Files that are read again when they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsrpc.errors import ConfigError
from hsrpc.server import reloaded_file
from hsrpc.server.reloaded_file import Reloaded, ReloadedFiles, read_file


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


@pytest.fixture
def reloaded(path) -> Reloaded[bytes]:
    return ReloadedFiles().watch([path], lambda: read_file(path, "file", secret=False))


def test_files_are_not_looked_at_for_every_call(path, reloaded, monkeypatch):
    """A change is seen once the time between two looks has passed, and not before."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 1000.0)
    path.write_text("two")
    assert reloaded.current() == b"one"
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    assert reloaded.current() == b"two"


def test_a_file_may_be_renamed_over_or_be_away_for_a_while(path, reloaded, monkeypatch, caplog):
    """What was read stays while the file is away, said once; a new file in its place counts, even of the same size."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    path.unlink()
    assert [reloaded.current() for _ in range(3)] == [b"one"] * 3
    assert caplog.text.count("what was read before stays") == 1
    (path.parent / "new").write_text("two")
    (path.parent / "new").rename(path)
    assert reloaded.current() == b"two"


def test_a_link_that_is_turned_counts_as_a_change(tmp_path, monkeypatch):
    """Kubernetes replaces a mounted secret by turning a link to another folder."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    link = tmp_path / "data"
    link.symlink_to("one")
    reloaded = ReloadedFiles().watch([link / "file"], lambda: read_file(link / "file", "file", secret=False))
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(link)
    assert reloaded.current() == b"two"


def test_large_files_are_refused(path):
    """What is larger than 1 MiB is no certificate and no list of tokens."""
    path.write_bytes(bytes(1024**2 + 1))
    with pytest.raises(ConfigError, match=r"file='.*': larger than 1 MiB"):
        read_file(path, "file", secret=False)
