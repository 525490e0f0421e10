"""Settings of the gRPC server: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hsrpc.config import Seconds
from hsrpc.errors import ConfigError
from hsrpc.server.security import SecurityConfig

MAX_MESSAGE_TOKENS = 1024
"""Tokens in a message, at most: with all logprobs, a tenth of the 4 MiB that clients take by default."""
MAX_MESSAGE_TEXT = 256 * 1024
"""Characters in a message, at most: of up to four bytes, a quarter of those 4 MiB."""
MAX_MESSAGE_DELAY = 60.0
"""Seconds."""
SERVER_TIMES = {
    "drain_timeout": Seconds(0.0),
    "request_timeout": Seconds(0.001),
    "write_timeout": Seconds(0.001),
    "step_timeout": Seconds(0.001),
    "max_message_delay": Seconds(0.0, MAX_MESSAGE_DELAY),
}
"""What the times of `ServerConfig` may be."""
_COUNTS = ("max_message_bytes", "max_streams_per_connection", "max_unsent_bytes", "max_unsent_bytes_per_connection")

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and how the server listens.

    Raises:
        ConfigError: on construction, naming the field, its value and the remedy.
    """

    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 or :: lets other machines in, which needs TLS and authentication, or `insecure`."""
    served_model_names: tuple[str, ...] = ()
    """Names that the `model` of a request may have; answers say the first. Empty: the model's own alone."""
    port: int = 50051
    """0 takes a free one."""
    vllm_engine: bool = False
    """Serve vllm.grpc.engine.VllmEngine too, which gateways speak; needs the extra `hsrpc[gateway]`."""
    openai_port: int | None = None
    """Port of OpenAI's and Anthropic's APIs, by a gateway; 0 takes a free one, None has none. Needs the same extra."""
    openai_host: str = "127.0.0.1"
    """Address of that port; what holds for `host` holds for it, and of authentication it knows tokens alone."""
    tool_call_parser: str | None = None
    """Name that the gateway has for the notation in which the model calls tools; None: as it guesses by the model."""
    reasoning_parser: str | None = None
    """The same for how the model marks its reasoning."""
    drain_timeout: float = 30.0
    """Seconds that running requests may take to end after the first SIGTERM or SIGINT."""
    request_timeout: float = 30.0
    """Seconds from the start of a call in which its request must have come whole."""
    write_timeout: float = 30.0
    """Seconds that a client may leave its stream unread, once the transport's buffers are full."""
    step_timeout: float = 300.0
    """Seconds that a step may take before health says that the process should be restarted."""
    metrics_port: int | None = None
    """Port of the Prometheus metrics; 0 takes a free one, None has none."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics, which are in plain text and ask for no token, whatever `host` is."""
    log_prompts: bool = False
    """A request's line in the log has its prompt."""
    otel_endpoint: str | None = None
    """URL that spans are sent to, such as http://localhost:4318/v1/traces; None: as the OTEL_* variables say."""
    max_message_bytes: int = 4 * 1024**2
    """Largest request taken, bytes."""
    max_tokens_per_message: int = MAX_MESSAGE_TOKENS
    """Tokens in a message, at most, where a request sets no number."""
    max_message_delay: float = 0.0
    """Seconds, where a request sets none; 0 sends at once, except that very many streams gather for up to 50 ms."""
    max_streams_per_connection: int = 4096
    """Most calls that one connection has at once; a client keeps more than that to itself."""
    max_priority: int = -8
    """Most urgent that a request may be, where the client's token grants nothing else; smaller is more urgent."""
    max_unsent_bytes: int = 256 * 1024**2
    """Most bytes of messages that clients have not taken yet; beyond it those that have waited longest end."""
    max_unsent_bytes_per_connection: int = 16 * 1024**2
    """Most of those bytes on one connection; beyond it messages wait for others of the connection."""
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        for name in self.served_model_names:
            if not _MODEL_NAME.fullmatch(name):
                remedy = "give names of A-Z a-z 0-9 . _ : / @ + -, such as org/name"
                raise ConfigError("served_model_name", name, "no name of a model", remedy)
        for name in ("port", "metrics_port", "openai_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65_535:
                raise ConfigError(name, getattr(self, name), "not a port", "give 0 to 65535")
        for name, allowed in SERVER_TIMES.items():
            allowed.check(name, getattr(self, name))
        if not -(2**31) <= self.max_priority < 2**31:
            raise ConfigError("max_priority", self.max_priority, "no priority", "give -2147483648 to 2147483647")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "not positive", "give 1 or more")
        if not 1 <= self.max_tokens_per_message <= MAX_MESSAGE_TOKENS:
            raise ConfigError(
                "max_tokens_per_message", self.max_tokens_per_message, "out of range", f"give 1 to {MAX_MESSAGE_TOKENS}"
            )
        self.security.check_exposure(self.host)
        if self.openai_port is not None:
            self.security.check_http_exposure(self.openai_host)

    @property
    def bind_address(self) -> str:
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
