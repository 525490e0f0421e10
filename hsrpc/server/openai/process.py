"""A gateway's process as the server sees it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

from hsrpc.server.openai import child

_MAX_LINE = 2**20
"""Bytes of a line of its log; longer ones are passed over."""
_NOWHERE = "http://127.0.0.1:0"
_NO_CONNECTIONS = {"HF_HUB_OFFLINE": "1", "MCP_HTTP_PROXY": _NOWHERE, "MCP_HTTPS_PROXY": _NOWHERE, "MCP_NO_PROXY": ""}
"""Requests may name servers of tools, by MCP, and smg would connect to whatever they name: there it finds nothing."""
_LAST_WORDS = 8
"""Lines that are told when it ends by itself."""

_log = logging.getLogger(__name__)


class GatewayProcess:
    """smg, which ends with this process, however that ends. Its log is ours, at level debug."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._said: deque[str] = deque(maxlen=_LAST_WORDS)
        self.ended = asyncio.create_task(self._run())
        """Its exit code, once it has ended and all that it said is read."""

    @classmethod
    async def start(cls, settings: Mapping[str, object]) -> GatewayProcess:
        """One with these settings of smg's `RouterArgs`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", child.__name__),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            limit=_MAX_LINE,
            start_new_session=True,  # Ctrl-C is for the server, which ends this when it has no more use for it
            env=os.environ | _NO_CONNECTIONS,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> Sequence[str]:
        """The end of its log."""
        return tuple(self._said)

    def drain(self) -> None:
        """Have it end once its calls have."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _run(self) -> int:
        await self._read()
        return await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # too long
                continue
            if not line:
                return
            self._said.append(_message(line))
            _log.debug("smg: %s", self._said[-1])


def _message(line: bytes) -> str:
    """What a line says, without its fields: these may hold words of a prompt."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, TypeError, KeyError):
        return line.decode(errors="replace").strip()
