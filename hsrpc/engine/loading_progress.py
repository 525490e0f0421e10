"""What is shown of loading, of one GPU or several: a bar for each on a terminal, elsewhere lines of the log."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from time import monotonic
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

_log = logging.getLogger(__name__)

_LINE_SECONDS = 5.0
"""Between lines, at least; and there is one for a tenth of the layers, at most."""


class LoadingProgress:
    """Shows how many layers each GPU has loaded, while it is entered. The lines tell of the GPU that is last."""

    def __init__(self, num_gpus: int, *, bars: bool) -> None:
        self._done = [0] * num_gpus
        self._shows_bars = bars
        self._bars: dict[int, tqdm[NoReturn]] = {}
        """By GPU; each begins with its first layer."""
        self._open = ExitStack()
        self._told = 0
        """Tenths."""
        self._next = monotonic() + _LINE_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def note(self, gpu: int, done: int, total: int) -> None:
        """A GPU has loaded `done` of `total` layers; all notes come from one thread."""
        self._done[gpu] = done
        if not self._shows_bars:
            self._tell(total)
            return
        if gpu not in self._bars:
            self._bars[gpu] = self._open.enter_context(
                tqdm(total=total, desc=self._title(gpu), unit="layer", position=gpu, leave=False)
            )
        self._bars[gpu].update(done - self._bars[gpu].n)

    def _title(self, gpu: int) -> str:
        return "loading weights" if len(self._done) == 1 else f"GPU {gpu}: loading weights"

    def _tell(self, total: int) -> None:
        done, now = min(self._done), monotonic()
        if 10 * done // total <= self._told or now < self._next:
            return
        self._told, self._next = 10 * done // total, now + _LINE_SECONDS
        _log.info("%s: %d of %d layers", self._title(self._done.index(done)), done, total)
