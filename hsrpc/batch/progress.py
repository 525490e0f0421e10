"""How far a batch is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, NoReturn, Protocol

from hsrpc.batch.run import Tally

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 30.0
"""Between lines where there is no terminal."""


class Progress(Protocol):
    """Is told what a run has done."""

    def note(self, tally: Tally) -> None: ...
    def close(self) -> None: ...


def show_progress(total: int | None, done: int, tell: Callable[[str], object]) -> Progress:
    """A bar on standard error, or lines for `tell`: of `total` (None: nobody knows), `done` were done before."""
    if sys.stderr is not None and sys.stderr.isatty():
        with suppress(ModuleNotFoundError):  # an installation without the extra `engine`
            return _Bar(total, done)
    return _Lines(total, done, tell)


class _Rate:
    """Tokens a second since it was made."""

    def __init__(self) -> None:
        self._began = monotonic()

    @property
    def seconds(self) -> float:
        return max(1e-9, monotonic() - self._began)

    def told(self, tally: Tally) -> str:
        """Rate and errors, for people."""
        errors = f", {tally.errors} in error" if tally.errors else ""
        return f"{tally.completion_tokens / self.seconds:.1f} tokens/s{errors}"


class _Bar:
    def __init__(self, total: int | None, done: int) -> None:
        from tqdm import tqdm

        self._bar: tqdm[NoReturn] = tqdm(total=total, initial=done, desc="batch", unit="line", smoothing=0.1)
        self._rate = _Rate()
        self._done = done

    def note(self, tally: Tally) -> None:
        self._bar.set_postfix_str(self._rate.told(tally), refresh=False)
        self._bar.update(self._done + tally.lines - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, total: int | None, done: int, tell: Callable[[str], object]) -> None:
        self._total, self._done, self._tell = total, done, tell
        self._rate = _Rate()
        self._next = monotonic() + LINE_SECONDS

    def note(self, tally: Tally) -> None:
        if monotonic() < self._next:
            return
        self._next = monotonic() + LINE_SECONDS
        lines = self._done + tally.lines
        of = "" if self._total is None else f" of {self._total}"
        left = ""
        if self._total is not None and tally.lines:
            left = f", {told_time((self._total - lines) * self._rate.seconds / tally.lines)} left"
        self._tell(f"hsrpc: {lines}{of} lines, {self._rate.told(tally)}{left}")

    def close(self) -> None:
        pass


def told_time(seconds: float) -> str:
    """Seconds as people read them: 90 s, 25 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
