"""Servers with TLS and tokens on the loopback, and certificates made for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from hsrpc.client import NO_RETRIES, AsyncClient, CallError
from hsrpc.server import Server, ServerConfig
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine

ALONE = (("grpc.use_local_subchannel_pool", 1),)
"""A channel with these shares no connection with another."""


@dataclass
class Authority:
    """A certificate authority, and a folder for what it issues."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    @property
    def roots(self) -> Path:
        path = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(path)
        return path

    def issue(self, name: str = "server", **settings: Any) -> dict[str, Path]:
        """Certificate and key for 127.0.0.1, in files that a second call for the same name replaces."""
        self.folder.mkdir(exist_ok=True)
        issued = self.authority.issue_cert("127.0.0.1", common_name=name, **settings)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        return {"tls_cert": cert, "tls_key": key}

    def issue_expired(self, name: str = "server") -> dict[str, Path]:
        now = datetime.now(UTC)
        return self.issue(name, not_before=now - timedelta(days=2), not_after=now - timedelta(days=1))


@asynccontextmanager
async def serving(engine: FakeEngine | None = None, **security: Any) -> AsyncIterator[Server]:
    """A server with these settings of SecurityConfig, ready."""
    server = Server(ServerConfig(port=0, security=SecurityConfig(**security)))
    await server.start()
    await server.attach(engine or FakeEngine())
    try:
        yield server
    finally:
        await server.stop()


async def name_of_model(server: Server, **connection: Any) -> str:
    """What a new client with these settings gets."""
    async with AsyncClient(server.address, options=(*ALONE, *NO_RETRIES), **connection) as client:
        return (await client.get_model()).name


async def refusal(server: Server, **connection: Any) -> CallError:
    """The error that a new client with these settings gets."""
    with pytest.raises(CallError) as caught:
        await name_of_model(server, **connection)
    return caught.value


def plain(server: Server) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(server.address, options=ALONE)
