"""The gateway's process: smg with the settings of one line of JSON, as long as its standard input is open.

The settings come that way because some are secret: arguments and the environment are for others to read.
"""

from __future__ import annotations

import json
import os
import sys
from threading import Thread

_TUPLES = ("tenant_api_keys", "control_plane_api_keys")
"""Settings that smg takes as lists of tuples, which JSON does not have."""


def main() -> None:
    """Serve until SIGTERM, or until the process that started this one closes the pipe, or ends."""
    settings = json.loads(sys.stdin.readline())
    settings |= {name: [tuple(each) for each in settings[name]] for name in _TUPLES}
    Thread(target=_end_with_input, daemon=True).start()
    from smg.router import Router
    from smg.router_args import RouterArgs

    Router.from_args(RouterArgs(**settings)).start()


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main()
