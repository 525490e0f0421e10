"""One thread for the calls of many clients, who take turns."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any, TypeVar, TypeVarTuple

R = TypeVar("R")
Args = TypeVarTuple("Args")


class _Call:
    """A call that waits for its turn, and its result."""

    __slots__ = ("done", "function")

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.done: Future[Any] = Future()


class FairThread:
    """Makes one call at a time. Each client has a line of its own, and the lines take turns, one call each.

    Between two calls of one client there is thus at most one of each other client, and the first of a client waits for
    the one that is under way and at most one of each client that came before. A call whose awaiter was cancelled is not
    made, unless it was begun: then it runs to its end, and nobody hears of it.
    """

    def __init__(self, name: str, *, stack_bytes: int = 0) -> None:
        """`stack_bytes` of the thread; 0: as others."""
        # Holds a turn for each call that waits, and none of them says whose: that is decided when it comes.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        if stack_bytes:
            usual = threading.stack_size(stack_bytes)
            self._executor.submit(int)  # starts the thread
            threading.stack_size(usual)
        self._lock = Lock()
        # In the order of their turns; none is empty.
        self._lines: OrderedDict[str, deque[_Call]] = OrderedDict()

    async def run(self, client: str, function: Callable[[*Args], R], *args: *Args) -> R:
        """The result of `function`, called when it is `client`'s turn.

        Raises:
            RuntimeError: after `close`.
        """
        call = _Call(partial(function, *args))
        with self._lock:
            self._executor.submit(self._take_turn)
            self._lines.setdefault(client, deque()).append(call)
        try:
            result: R = await asyncio.wrap_future(call.done)
        except asyncio.CancelledError:
            self._withdraw(client, call)
            raise
        finally:
            del call  # an error holds this frame: it must not hold the error
        return result

    def close(self) -> None:
        """Ends the thread after the calls that wait."""
        self._executor.shutdown(wait=False)

    def finish(self, function: Callable[[], object]) -> None:
        """Ends the thread after the calls that wait and, last, `function`."""
        self._executor.submit(function)
        self.close()

    def _take_turn(self) -> None:
        call = self._next()
        if call is None or not call.done.set_running_or_notify_cancel():
            return
        try:
            call.done.set_result(call.function())
        except BaseException as error:
            call.done.set_exception(error)
        finally:
            del call  # as above

    def _next(self) -> _Call | None:
        """Whose turn it is; None where those that waited have left."""
        with self._lock:
            if not self._lines:
                return None
            client, line = self._lines.popitem(last=False)
            call = line.popleft()
            if line:
                self._lines[client] = line
            return call

    def _withdraw(self, client: str, call: _Call) -> None:
        """Forget a call that waits: what it holds may be large, and its turn is for others."""
        with self._lock:
            line = self._lines.get(client)
            if line is not None and call in line:
                line.remove(call)
                if not line:
                    del self._lines[client]
