"""hsrpc serves language models that do not fit the GPU, embedded in asyncio or over gRPC."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsrpc.config import EngineConfig
    from hsrpc.constraint import Choice, Grammar, JsonObject, JsonSchema, Regex
    from hsrpc.engine.engine import Engine
    from hsrpc.prompt import Chat, Message, Text, ToolCall
    from hsrpc.request import Delta, FinishReason, SamplingParams

__version__ = "0.2.0"
__all__ = [
    "Chat",
    "Choice",
    "Delta",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "Grammar",
    "JsonObject",
    "JsonSchema",
    "Message",
    "Regex",
    "SamplingParams",
    "Text",
    "ToolCall",
    "__version__",
]

_HOMES = {
    "Chat": "hsrpc.prompt",
    "Choice": "hsrpc.constraint",
    "Delta": "hsrpc.request",
    "Engine": "hsrpc.engine.engine",
    "EngineConfig": "hsrpc.config",
    "FinishReason": "hsrpc.request",
    "Grammar": "hsrpc.constraint",
    "JsonObject": "hsrpc.constraint",
    "JsonSchema": "hsrpc.constraint",
    "Message": "hsrpc.prompt",
    "Regex": "hsrpc.constraint",
    "SamplingParams": "hsrpc.request",
    "Text": "hsrpc.prompt",
    "ToolCall": "hsrpc.prompt",
}


def __getattr__(name: str) -> object:
    """Load on first use, so that `import hsrpc.client` needs neither torch nor the engine."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
