"""Which connections are cut because they do not read."""

from __future__ import annotations

from contextlib import suppress

import pytest

from hsrpc.server import readers
from hsrpc.server.readers import MAX_STALLS, Readers


@pytest.fixture
def cut() -> list[tuple[str, int]]:
    return []


def stall(found: Readers, connection: str, times: int = 1, *, is_reset: bool = True) -> None:
    for _ in range(times):
        with suppress(ValueError), found.stream(connection):
            found.stalled(connection, is_reset=is_reset)
            raise ValueError("stalled")


def test_stalls_in_a_row_cut_a_connection(cut):
    """Those of one connection, also one after the other; what fails otherwise neither counts nor forgives."""
    found = Readers(lambda *told: cut.append(told))
    stall(found, "a", MAX_STALLS - 1)
    stall(found, "b", MAX_STALLS - 1)
    with pytest.raises(ValueError, match="refused"), found.stream("a"):
        raise ValueError("refused")
    assert not cut
    stall(found, "a")
    assert cut == [("a", MAX_STALLS)]


def test_a_stream_read_to_its_end_begins_a_new_row(cut):
    """However many stalled before."""
    found = Readers(lambda *told: cut.append(told))
    for _ in range(3):
        stall(found, "a", MAX_STALLS - 1)
        with found.stream("a"):
            pass
    assert not cut


def test_what_cannot_be_reset_waits_for_the_other_streams(cut):
    """The connection is cut as the last of them ends."""
    found = Readers(lambda *told: cut.append(told))
    with found.stream("a"):
        stall(found, "a", is_reset=False)
        assert not cut
    assert cut


def test_few_connections_are_remembered(cut, monkeypatch):
    """Those that stalled last, and those that have streams."""
    monkeypatch.setattr(readers, "_MAX_IDLE", 3)
    found = Readers(lambda *told: cut.append(told))
    with found.stream("live"):
        stall(found, "old", MAX_STALLS - 1)
        for name in "abc":
            stall(found, name)
        stall(found, "old")
        assert not cut
        stall(found, "live", MAX_STALLS)
        assert cut == [("live", MAX_STALLS)]
