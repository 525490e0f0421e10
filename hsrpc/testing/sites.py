"""Where in the code something happens: exact places for messages, and names of sites that survive an edit."""

from __future__ import annotations

import dis
import re
import sys
from functools import cache
from types import CodeType, FrameType
from typing import NamedTuple

_PACKAGE = "hsrpc."
_NAMELESS = re.compile(r"\.<locals>\.<\w+>")
_BETWEEN = ("hsrpc.device.device", "hsrpc.device.uploads", "hsrpc.testing.", "torch", "contextlib", "functools")
"""Modules between whoever uses a device and the one who asks."""


class Place(NamedTuple):
    """A call in the code."""

    module: str
    code: CodeType
    offset: int
    """Offset of the instruction, whose line is looked up only when somebody reads it, since that takes long."""

    @property
    def function(self) -> str:
        return _function(self.module, self.code)

    def __str__(self) -> str:
        lines = (line for start, end, line in self.code.co_lines() if start <= self.offset < end)
        return f"{self.function}:{next(lines, None)}"


def user_place() -> Place:
    """Where a device was used: the innermost frame that is neither its own nor torch's."""
    frame = sys._getframe(1)
    while (module := frame.f_globals["__name__"]).startswith(_BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return Place(module, frame.f_code, frame.f_lasti)


def site_of(frame: FrameType, method: str) -> str:
    """Name of the function that runs in `frame`, and where it calls `method` several times, which call this is."""
    return _site(frame.f_globals["__name__"], frame.f_code, frame.f_lasti, method)


@cache
def _site(module: str, code: CodeType, offset: int, method: str) -> str:
    calls = [each.offset for each in dis.get_instructions(code) if each.argval == method]
    name = _function(module, code)
    return name if len(calls) < 2 else f"{name} #{sum(call < offset for call in calls)}"


def _function(module: str, code: CodeType) -> str:
    """Name of a function; comprehensions and lambdas belong to the function around them, as from Python 3.12 on."""
    return f"{module.removeprefix(_PACKAGE)}.{_NAMELESS.sub('', code.co_qualname)}"
