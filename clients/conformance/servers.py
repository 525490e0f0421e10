"""Servers for the cases: `hsrpc serve` on free ports of this machine, with certificates and tokens of the run's own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Self

import trustme

from clients.conformance.cases import Identity, ServerKind
from clients.conformance.direct import Access, Direct
from clients.conformance.result import Json

ROOT = Path(__file__).parents[2]
TOKEN = "conformance-token-0123456789abcdef"
_READY_SECONDS = 120
_STOP_SECONDS = 30
_FULL_SECONDS = 30
_FULL = (1, 3)
"""Requests that run and wait at a server of which no more may wait."""


@dataclass(frozen=True)
class Papers:
    """Certificates and tokens, in files of one folder."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)
    stranger: trustme.CA = field(default_factory=trustme.CA)

    @cached_property
    def ca(self) -> Path:
        return self._write("ca.pem", self.authority.cert_pem.bytes())

    @cached_property
    def wrong_ca(self) -> Path:
        return self._write("wrong-ca.pem", self.stranger.cert_pem.bytes())

    @cached_property
    def server(self) -> tuple[Path, Path]:
        return self._issue("server")

    @cached_property
    def client(self) -> tuple[Path, Path]:
        return self._issue("client")

    @cached_property
    def tokens(self) -> Path:
        return self._write("tokens", f"conformance {TOKEN}\n".encode())

    def _issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for this machine."""
        issued = self.authority.issue_cert("127.0.0.1", "localhost", common_name=name)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return self._write(f"{name}.pem", chain), self._write(f"{name}.key", issued.private_key_pem.bytes())

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path


class RunningServer:
    """One `hsrpc serve`."""

    def __init__(self, name: str, kind: ServerKind, papers: Papers) -> None:
        self.kind = kind
        self._papers = papers
        self._log_path = papers.folder / f"{name}.log"
        self._log = self._log_path.open("a", encoding="utf-8")
        self._process = self._start(port=0)

    def wait_ready(self) -> None:
        """Return once it has its model.

        Raises:
            RuntimeError: it has ended, or has no model in time; with its log.
        """
        line = _stdout(self._process).readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server ended:\n{self.log}")
        self.address = line.split()[2]
        self.direct = Direct(self.address, self._own_access())
        try:
            self.direct.wait_ready(_READY_SECONDS)
        except TimeoutError:
            raise RuntimeError(f"the server has no model after {_READY_SECONDS} s:\n{self.log}") from None

    @property
    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8")

    @property
    def num_refusals(self) -> int:
        """Calls so far that found the queue full, or the wait too long."""
        return sum("status=RESOURCE_EXHAUSTED" in line for line in self.log.splitlines())

    def restart(self) -> None:
        """End the server and start it again at the same port."""
        self._end()
        self._process = self._start(port=int(self.address.rpartition(":")[2]))
        self.wait_ready()

    def stop(self) -> None:
        self._end()
        self._log.close()

    def access(self, identity: Identity) -> Json:
        """`tls` and `token` of a request to a client's program."""
        return {"tls": self._tls(identity) if self.kind.tls else None, "token": self._token(identity)}

    def _tls(self, identity: Identity) -> Json | None:
        ca = {"right": self._papers.ca, "wrong": self._papers.wrong_ca}.get(identity.ca)
        if ca is None:
            return None
        shown = self.kind.client_ca and identity.certificate == "right"
        cert, key = map(str, self._papers.client) if shown else (None, None)
        return {"ca": str(ca), "cert": cert, "key": key}

    def _token(self, identity: Identity) -> str | None:
        return {"right": TOKEN, "wrong": TOKEN[::-1]}.get(identity.token) if self.kind.token else None

    @contextmanager
    def occupied(self, max_tokens: int) -> Iterator[None]:
        """Keeps the server busy with calls of this many tokens, one after the other."""
        over = threading.Event()
        request = {"text": "Once upon a time", "stopping": {"maxTokens": max_tokens, "ignoreEos": True}}
        blockers = [threading.Thread(target=self._block, args=(request, over)) for _ in range(sum(_FULL))]
        for blocker in blockers:
            blocker.start()
        try:
            if not until(lambda: self.direct.load() == _FULL, _FULL_SECONDS):
                raise RuntimeError(f"{sum(_FULL)} calls do not fill the server:\n{self.log}")
            yield
        finally:
            over.set()
            for blocker in blockers:
                blocker.join()

    def _block(self, request: Json, over: threading.Event) -> None:
        while not over.is_set():
            self.direct.generate_until(request, over)

    def _start(self, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hsrpc.cli.main", "serve", "--device=cpu", f"--port={port}", *self._flags()]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log, text=True)  # noqa: S603

    def _flags(self) -> list[str]:
        flags = list(self.kind.flags)
        if self.kind.tls:
            cert, key = self._papers.server
            flags += [f"--tls-cert={cert}", f"--tls-key={key}"]
        if self.kind.client_ca:
            flags += [f"--tls-client-ca={self._papers.ca}"]
        if self.kind.token:
            flags += [f"--auth-tokens={self._papers.tokens}"]
        return flags

    def _own_access(self) -> Access:
        cert, key = self._papers.client if self.kind.client_ca else (None, None)
        return Access(
            ca=self._papers.ca.read_bytes() if self.kind.tls else None,
            certificate=cert.read_bytes() if cert else None,
            key=key.read_bytes() if key else None,
            token=TOKEN if self.kind.token else None,
        )

    def _end(self) -> None:
        if hasattr(self, "direct"):
            self.direct.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _stdout(self._process).close()


def _stdout(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


class Servers:
    """The servers of a run, by name; each is started with the first that needs it, and serves all languages."""

    def __init__(self, kinds: Mapping[str, ServerKind], folder: Path) -> None:
        self._kinds = kinds
        self._papers = Papers(folder)
        self._running: dict[str, RunningServer] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for server in self._running.values():
                stack.callback(server.stop)

    def start(self, names: Sequence[str]) -> None:
        """Start those that do not run yet, all at once, and wait until they are ready."""
        new = [name for name in dict.fromkeys(names) if name not in self._running]
        for name in new:
            self._running[name] = RunningServer(name, self._kinds[name], self._papers)
        for name in new:
            self._running[name].wait_ready()

    def __getitem__(self, name: str) -> RunningServer:
        return self._running[name]


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
