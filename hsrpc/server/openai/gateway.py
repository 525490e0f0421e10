"""The OpenAI port: a gateway that is kept up beside the server, and what the server knows of it."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection

from hsrpc.errors import ConfigError
from hsrpc.server.config import join_address
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.lifecycle import Health
from hsrpc.server.openai.process import GatewayProcess
from hsrpc.server.openai.settings import check_gateway, read_secrets, router_settings, secret_files
from hsrpc.server.reloaded_file import ReloadedFiles
from hsrpc.server.service import Service

_PERIOD = 1.0
"""Seconds between two looks at a gateway that answers."""
_START_PERIOD = 0.05
"""Seconds between two looks at one that does not yet."""
_ANSWER_SECONDS = 5.0
_SILENCE_SECONDS = 30.0
"""One that has answered before, and then has not for so long, is ended."""
_START_SECONDS = 300.0
"""The same for one that has not answered yet."""
_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before another one is started, by how many in a row have not lived long."""
_LONG_LIFE = 60.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104

_log = logging.getLogger(__name__)


class OpenAiFrontEnd:
    """OpenAI's and Anthropic's APIs over HTTP, by smg, whose calls come back to the server by VllmEngine.

    A front end as `lifecycle.FrontEnd` has it. The port is open while a model is served.
    """

    def __init__(
        self, service: Service, port: int, worker: Callable[[], str], changed: Callable[[], Awaitable[None]]
    ) -> None:
        """`worker` gives the address of the listener for gateways; `changed` is called when `is_ready` is another.

        Raises:
            ConfigError: smg is not installed or has no such parsers, or a file of the security settings is bad.
        """
        check_gateway(service.config)
        self.port = port
        """Once it is bound, if 0 was given."""
        self._host = service.config.openai_host
        """Its address, once it is bound: smg takes no names."""
        self._service = service
        self._config = service.config
        self._worker = worker
        self._changed = changed
        self._files = ReloadedFiles()
        security = service.config.security
        self._secrets = self._files.watch(secret_files(security), lambda: read_secrets(security))
        self._probe_key = secrets.token_urlsafe()
        self._reserved: socket.socket | None = None
        self._processes: set[GatewayProcess] = set()
        self._running: asyncio.Task[None] | None = None
        self._is_ready = False

    @property
    def url(self) -> str:
        """What clients take for OpenAI's base URL."""
        scheme = "https" if self._config.security.tls else "http"
        return f"{scheme}://{join_address(self._config.openai_host, self.port)}/v1"

    @property
    def pids(self) -> Collection[int]:
        """Processes of the gateways that run, also of those that only finish their calls."""
        return {process.pid for process in self._processes}

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def reload(self) -> None:
        """Read certificates and tokens again now, if there are any."""
        if secret_files(self._config.security):
            self._files.reload()

    async def start(self) -> None:
        """Reserve the port; nothing answers there before a model is loaded.

        Raises:
            ConfigError: it cannot be bound.
        """
        self._reserved = _reserve(self._config.openai_host, self.port)
        self._host, self.port, *_ = self._reserved.getsockname()

    async def attach(self, engine: Engine) -> None:
        """Start a gateway for the model of `engine`.

        Raises:
            ConfigError: the model has no tokenizer, which a gateway cannot do without.
        """
        if not await engine.tokenizer.files():
            remedy = "serve a model with one, or leave the port out"
            raise ConfigError("openai_port", self.port, f"{engine.spec.name} has no tokenizer", remedy)
        self._running = asyncio.create_task(self._run(self._service.model_names(engine)))

    async def report(self, health: Health) -> None:
        """Whoever asks the gateway is told by it, as it is by VllmEngine."""

    async def stop(self, seconds: float) -> None:
        """Close the port, once what has been sent has had half of `seconds` to arrive."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        if processes := list(self._processes):
            await asyncio.sleep(seconds / 2)
            for process in processes:
                process.kill()
            await asyncio.wait([process.ended for process in processes])
        if self._reserved is not None:
            self._reserved.close()

    async def _run(self, names: Sequence[str]) -> None:
        """Keep a gateway up: start another where one has ended, or has other secrets than the files."""
        short_lives = 0
        while True:
            started = time.monotonic()
            secrets_then = self._secrets.current()
            try:
                process = await self._start(names)
            except (ConfigError, OSError) as error:
                problem = f"the gateway cannot be started: {error}"
            else:
                is_old = await self._watch(process, names[0], secrets_then)
                await self._set_ready(False)
                if is_old:
                    await self._retire(process)
                    continue
                problem = f"the gateway has ended with {await process.ended}: {' | '.join(process.last_words)}"
            short_lives = 0 if time.monotonic() - started >= _LONG_LIFE else short_lives + 1
            pause = _PAUSES[min(short_lives, len(_PAUSES) - 1)]
            _log.error("%s; another one is started in %g s", problem, pause)
            await asyncio.sleep(pause)

    async def _start(self, names: Sequence[str]) -> GatewayProcess:
        settings = router_settings(
            self._config, self._host, self.port, self._worker(), names=names, probe_key=self._probe_key
        )
        process = await GatewayProcess.start(settings)
        self._processes.add(process)
        process.ended.add_done_callback(lambda _: self._processes.discard(process))
        return process

    async def _watch(self, process: GatewayProcess, model: str, secrets_then: bytes) -> bool:
        """Return once it has ended, or, with True, once its secrets are old."""
        heard, patience = time.monotonic(), _START_SECONDS
        while not process.ended.done():
            answers = await asyncio.to_thread(self._answers, model)
            await self._set_ready(answers and not process.ended.done())
            if answers:
                heard, patience = time.monotonic(), _SILENCE_SECONDS
            elif time.monotonic() - heard > patience:
                _log.error("the gateway does not answer, and is ended")
                process.kill()
            if self._secrets.current() != secrets_then:
                return True
            await asyncio.wait({process.ended}, timeout=_PERIOD if answers else _START_PERIOD)
        return False

    async def _retire(self, process: GatewayProcess) -> None:
        """Have it finish its calls, and return once its port is free."""
        _log.info("tokens or certificates have changed: another gateway takes over")
        process.drain()
        while not process.ended.done() and await asyncio.to_thread(self._is_open):
            await asyncio.wait({process.ended}, timeout=_START_PERIOD)

    async def _set_ready(self, is_ready: bool) -> None:
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            if is_ready:
                _log.info("the OpenAI API is on %s", self.url)
            await self._changed()

    def _answers(self, model: str) -> bool:
        """It has the model and its tokenizer; the server itself is not asked."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._probe_key}"}
        with closing(self._connection()) as connection:
            try:
                connection.request("POST", "/v1/tokenize", json.dumps({"model": model, "prompt": "a"}), headers)
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def _is_open(self) -> bool:
        with closing(self._connection()) as connection:
            try:
                connection.connect()
            except OSError:
                return False
            return True

    def _connection(self) -> HTTPConnection:
        host = _ANYWHERE.get(self._host, self._host)
        if not self._config.security.tls:
            return HTTPConnection(host, self.port, timeout=_ANSWER_SECONDS)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = (
            False,
            ssl.CERT_NONE,
        )  # our own
        return HTTPSConnection(host, self.port, timeout=_ANSWER_SECONDS, context=context)


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that is bound there and does not listen: gateways can, one after the other, and others cannot.

    Raises:
        ConfigError: the address cannot be bound.
    """
    address = join_address(host, port)
    try:
        [(family, kind, protocol, _, found), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        reserved = socket.socket(family, kind, protocol)
    except OSError:
        raise ConfigError("openai_host", host, "no address", "take an address of this machine") from None
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(found)
    except OSError:
        reserved.close()
        remedy = "take an address of this machine and a free port"
        raise ConfigError("openai_port", address, "cannot be bound", remedy) from None
    return reserved
