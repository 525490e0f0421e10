"""Ends a process that should have ended: a thread that waits for a device would keep the interpreter from exiting."""

from __future__ import annotations

import logging
import os
import signal
import threading

EXIT_SECONDS = 20.0
"""Seconds from the end of the last request to that of the process: more than the engine takes to be left."""

LOADING_EXIT_SECONDS = 1.0
"""Seconds from a signal while loading to the end of the process: there is nobody to be told, and nothing to lose."""
_LAST_WORDS_SECONDS = 2.0

_log = logging.getLogger(__name__)


def exit_within(seconds: float, code: int) -> None:
    """Exit with `code` if the process still runs by then, whatever its event loop and threads do."""
    timer = threading.Timer(seconds, _exit, (seconds, code))
    timer.daemon = True
    timer.start()


def set_up_signals() -> None:
    """Let SIGTERM alone end the process, with 143, until an event loop takes signals over; call it in the main thread.

    The default action of SIGTERM would do that too, except to process 1, which a container's is. That of the signals
    ignored here would end the process without a drain.
    """
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _exit(seconds: float, code: int) -> None:
    last_words = threading.Thread(target=_say_last_words, args=(seconds, code), daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_SECONDS)
    os._exit(code)


def _say_last_words(seconds: float, code: int) -> None:
    """May wait for whoever reads the log."""
    _log.critical("still running %s s after the end was asked for; exiting with %s", seconds, code)
    logging.shutdown()
