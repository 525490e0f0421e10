"""What is shown of loading: a bar for each GPU on a terminal, a line for the last of them elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from tqdm import tqdm

from hsrpc.config import EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine import loading_progress
from hsrpc.engine.loading import load_weights
from hsrpc.engine.loading_progress import LoadingProgress
from hsrpc.engine.startup import make_plan
from hsrpc.model.families.registry import create_family


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Messages so far, however soon they come one after the other."""
    monkeypatch.setattr(loading_progress, "_LINE_SECONDS", 0.0)
    with caplog.at_level("INFO", "hsrpc.engine.loading_progress"):
        yield lambda: caplog.messages


def test_layers_are_told_as_they_are_loaded() -> None:
    planned, told = make_plan(EngineConfig(device="cpu")), list[tuple[int, int]]()
    family, stop = create_family(planned.spec, planned.plan.max_model_len), threading.Event()
    source = planned.files.source
    load_weights(family, source, planned.plan, CpuDevice(), stop, progress=lambda *how_far: told.append(how_far))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_lines_tell_of_the_gpu_that_is_last(lines: Callable[[], list[str]]) -> None:
    """One for a tenth of the layers, at most; what is shown on a terminal is not in the log."""
    with LoadingProgress(2, bars=False) as progress:
        for done in range(1, 41):
            progress.note(0, done, 40)
        assert lines() == []
        for done in range(1, 9):
            progress.note(1, done, 40)
    assert lines() == ["GPU 1: loading weights: 4 of 40 layers", "GPU 1: loading weights: 8 of 40 layers"]


def test_lines_of_one_gpu_have_no_number(lines: Callable[[], list[str]]) -> None:
    with LoadingProgress(1, bars=False) as progress:
        progress.note(0, 1, 3)
    assert lines() == ["loading weights: 1 of 3 layers"]


def test_lines_leave_each_other_time(lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads in a moment says nothing."""
    monkeypatch.setattr(loading_progress, "_LINE_SECONDS", 3600.0)
    with LoadingProgress(1, bars=False) as progress:
        for done in range(1, 41):
            progress.note(0, done, 40)
    assert lines() == []


def test_each_gpu_has_a_bar(capsys: pytest.CaptureFixture[str], lines: Callable[[], list[str]]) -> None:
    """And none is left on the terminal, also where loading fails."""

    def load() -> None:
        with LoadingProgress(2, bars=True) as progress:
            for gpu, done in ((0, 3), (1, 1), (1, 2)):
                progress.note(gpu, done, 4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load()
    shown = capsys.readouterr().err
    assert "GPU 0: loading weights" in shown
    assert "GPU 1: loading weights" in shown
    assert "/4" in shown
    assert not tqdm._instances
    assert lines() == []
