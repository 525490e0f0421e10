"""How a client reaches a server: TLS, the token it shows, and options of the channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import grpc
import grpc.aio

from hsrpc.client_proxy import is_loopback

Option = tuple[str, str | int]
FileName = str | PathLike[str]

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}
DEFAULTS: tuple[Option, ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.per_rpc_retry_buffer_size", 4 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
"""Options that a client has unless it is given others of these names.

Calls go to every address of the target in turn, such as to all pods of a headless service. One that was refused, or
reached no server, is made again, before its first message only, after the time that the server asks for; with prompts
of any size that a server takes. A server that is gone without a word is found out within 40 s, by pings that the server
allows, and one that is back within a second."""

NO_RETRIES: tuple[Option, ...] = (("grpc.enable_retries", 0),)
"""Options with which each call is made once: for who has a way of its own to try again, or counts refusals."""

DIRECT: tuple[Option, ...] = (("grpc.enable_http_proxy", 0),)
"""Options with which calls go through no proxy, whatever the environment says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Settings of a client's connection.

    Raises:
        ValueError: on construction, when the settings contradict each other.
        OSError: a file cannot be read.
    """

    credentials: grpc.ChannelCredentials | None = None
    """Credentials of your own, in place of the files; `grpc.ssl_channel_credentials()` trusts the system's roots."""
    token: str | None = None
    """Sent with every call as `authorization: Bearer TOKEN`; without TLS it travels in the clear."""
    tls_ca: FileName | None = None
    """PEM file of the roots that the server's certificate must come from; turns TLS on."""
    tls_cert: FileName | None = None
    """PEM file of the client's own certificate, for servers that ask for one."""
    tls_key: FileName | None = None
    """PEM file of its private key."""
    options: Sequence[Option] = ()
    """Arguments of the gRPC channel, such as `NO_RETRIES`, before those of `DEFAULTS`. Servers on this machine are
    reached without a proxy."""

    def __post_init__(self) -> None:
        files = (self.tls_ca, self.tls_cert, self.tls_key)
        if self.credentials is not None and any(files):
            raise ValueError("credentials: given together with TLS files; give one of them")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert, tls_key: one without the other; give both, or neither")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token):
            raise ValueError("token: empty, or not printable ASCII; give the token alone, without a newline")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call brings along."""
        return (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()

    def channel(self, target: str) -> grpc.Channel:
        """A channel to `target`, for ordinary code."""
        credentials, options = self._credentials(), self._options(target)
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, credentials, options)

    def aio_opener(self, target: str) -> Callable[[], grpc.aio.Channel]:
        """Opens a channel to `target` on the running event loop. The files are read now."""
        credentials, options = self._credentials(), self._options(target)
        if credentials is None:
            return partial(grpc.aio.insecure_channel, target, options)
        return partial(grpc.aio.secure_channel, target, credentials, options)

    def _options(self, target: str) -> list[Option]:
        """The caller's own come first: gRPC takes the first of a name."""
        return [*self.options, *DEFAULTS, *(DIRECT if is_loopback(target) else ())]

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not (self.tls_ca or self.tls_cert):
            return self.credentials
        return grpc.ssl_channel_credentials(_read(self.tls_ca), _read(self.tls_key), _read(self.tls_cert))


def _read(path: FileName | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
