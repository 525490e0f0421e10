"""Property tests draw the same examples in every run, and an engine that ends leaves its garbage for later."""

from __future__ import annotations

import gc
import signal
from types import SimpleNamespace

import pytest
from hypothesis import settings

from hsrpc.engine.gpus import one

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci")


def pytest_configure() -> None:
    """Programs that tests start can be interrupted, also where a shell runs the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def garbage_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collection at an engine's end looks at all of torch and transformers, for longer than most tests take."""
    monkeypatch.setattr(one, "gc", SimpleNamespace(unfreeze=gc.unfreeze, collect=lambda: 0))
