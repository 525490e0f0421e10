"""The event loop of a process that runs an engine."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

SWITCH_SECONDS = 0.0001
"""Seconds after which a thread must let another have the interpreter. The engine's threads run Python as well as copies
and kernels, and with Python's own 5 ms each of them keeps the event loop waiting for as long."""


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main` on uvloop, which the other threads of the process do not keep waiting."""
    sys.setswitchinterval(SWITCH_SECONDS)
    result: T = uvloop.run(main)
    return result
