"""How far a batch is, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from hsrpc.batch import progress
from hsrpc.batch.progress import show_progress, told_time
from hsrpc.batch.run import Tally


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    """Lines, those of earlier runs among them, tokens a second and errors."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = show_progress(10, 4, print)
    bar.note(Tally(lines=3, errors=1, completion_tokens=50))
    bar.close()
    last = terminal.getvalue().rpartition("\r")[2]
    assert "7/10" in last
    assert "tokens/s, 1 in error" in last


@pytest.mark.parametrize(("total", "told"), [(10, "hsrpc: 7 of 10 lines, "), (None, "hsrpc: 7 lines, ")])
def test_lines_elsewhere(monkeypatch, total, told):
    """One now and then, with rate and time left where that can be known."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    shown = show_progress(total, 4, lines.append)
    shown.note(Tally(lines=3, completion_tokens=50))
    shown.close()
    [line] = lines
    assert line.startswith(told)
    assert line.endswith(" left") == (total is not None)


def test_lines_are_few(monkeypatch):
    """Not one for each that is done."""
    lines: list[str] = []
    show_progress(10, 0, lines.append).note(Tally(lines=3))
    assert lines == []


def test_times():
    """As people read them."""
    assert [told_time(seconds) for seconds in (5.2, 600, 40_000)] == ["5 s", "10 min", "11.1 h"]
