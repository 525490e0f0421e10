"""Calls reset by the server: grpc.aio gives a handler no means to do it.

A handler runs in a task of its own, made by the task that holds the call for grpc and waits for its end. Once both have
ended nothing refers to the call any more: grpc's core then cancels it, which resets its stream, whatever waits to be
sent, and frees that. The first call of a server and its latest are exceptions: its loop still refers to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

_HOLDS, _HANDLES = "_schedule_rpc_coro", "_handle_exceptions"
"""Names of grpc's coroutines that hold a call, and that run its handler."""

Task = asyncio.Task[Any]
TaskFactory = Callable[..., Any]


class _Ends(NamedTuple):
    first: ReferenceType[Task]
    latest: ReferenceType[Task]


_makers: WeakKeyDictionary[Task, ReferenceType[Task]] = WeakKeyDictionary()
"""The task that holds a call, by the one that handles it; the server's, by the one that holds one."""
_ends: WeakKeyDictionary[Task, _Ends] = WeakKeyDictionary()
"""Tasks that hold the first call and the latest, by the server's task."""


class _NotingCalls:
    """A task factory that makes tasks as `make` does, and notes which hold and which handle calls."""

    def __init__(self, make: TaskFactory) -> None:
        self._make = make

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **settings: Any) -> Task:
        task: Task = self._make(loop, coro, **settings)
        name = getattr(coro, "__name__", "")
        maker = asyncio.current_task(loop) if name in (_HOLDS, _HANDLES) else None
        if maker is not None:
            _makers[task] = ref(maker)
            if name == _HOLDS:
                _ends[maker] = _Ends(_ends[maker].first if maker in _ends else ref(task), ref(task))
        return task


def _plain(loop: asyncio.AbstractEventLoop, coro: Any, **settings: Any) -> Task:
    return asyncio.Task(coro, loop=loop, **settings)


def note_calls() -> None:
    """Note the calls that come on this event loop from now on, so that they can be reset."""
    loop = asyncio.get_running_loop()
    present = loop.get_task_factory()
    if not isinstance(present, _NotingCalls):
        noting: Any = _NotingCalls(present or _plain)
        loop.set_task_factory(noting)


def reset(handling: Task) -> bool:
    """Reset the call that a task handles, as soon as that has ended, which it should do now.

    False: the stream is not reset now. Of a server's latest call it will be once another has come.
    """
    holding = _maker(handling)
    server = _maker(holding) if holding else None
    if holding is None or server is None:
        return False
    holding.cancel()
    return all(end() is not holding for end in _ends[server])


def _maker(task: Task) -> Task | None:
    maker = _makers.get(task)
    return maker() if maker else None
