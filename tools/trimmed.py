"""`hsrpc` whose resident memory can be measured: once it has got SIGRTMIN, what is resident is held by something.

The allocator of the C library keeps one arena, and gives free memory back to the system at the signal. With an arena
for each thread a server that was flooded seems to hold some 40 MiB more after each flood, nearly all of it free.

    python tools/trimmed.py serve ...
"""

from __future__ import annotations

import ctypes
import runpy
import signal

_M_ARENA_MAX = -8
"""Parameter of mallopt."""


def main() -> None:
    """Become `hsrpc`."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_ARENA_MAX, 1)
    signal.signal(signal.SIGRTMIN, lambda *_: libc.malloc_trim(0))
    runpy.run_module("hsrpc.cli.main", run_name="__main__")


if __name__ == "__main__":
    main()
