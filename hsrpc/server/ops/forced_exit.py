"""Ends a process that should have ended: a thread that waits for a device would keep the interpreter from exiting."""

from __future__ import annotations

import logging
import os
import threading

EXIT_SECONDS = 20.0
"""Seconds from the end of the last request to that of the process: more than the engine takes to be left."""

_LAST_WORDS_SECONDS = 2.0

_log = logging.getLogger(__name__)


def exit_within(seconds: float, code: int) -> None:
    """Exit with `code` if the process still runs by then, whatever its event loop and threads do."""
    timer = threading.Timer(seconds, _exit, (seconds, code))
    timer.daemon = True
    timer.start()


def _exit(seconds: float, code: int) -> None:
    last_words = threading.Thread(target=_say_last_words, args=(seconds, code), daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_SECONDS)
    os._exit(code)


def _say_last_words(seconds: float, code: int) -> None:
    """May wait for whoever reads the log."""
    _log.critical("still running %s s after the end was asked for; exiting with %s", seconds, code)
    logging.shutdown()
