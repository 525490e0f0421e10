"""hsrpc info: versions, the device, and the sizes of a model."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

from hsrpc import __version__
from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config
from hsrpc.config import EngineConfig, format_bytes
from hsrpc.schedule.blocks import BlockKind

_EXAMPLES = """\
  hsrpc info
  hsrpc info --model ./opt-13b --json
"""
_PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "uvloop", "numpy", "triton")


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "info", "show versions, device and model, for bug reports", _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one object")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Collect and print."""
    found = {"hsrpc": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in _PACKAGES} | _host() | _machine_and_model(engine_config(options))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:28} {value}")


def _host() -> dict[str, str]:
    """Memory of the host, and the limits of this process."""
    from hsrpc.device.host_memory import HostMemory, lock_limit

    memory, locked = HostMemory.read(), lock_limit()
    limit = memory.limit
    return {
        "host memory free": format_bytes(memory.free),
        "host memory obtainable": format_bytes(memory.obtainable),
        "memory limit": "none" if limit is None else f"{format_bytes(limit.size)} ({limit.file})",
        "locked memory limit": "none" if locked is None else format_bytes(locked),
    }


def _machine_and_model(config: EngineConfig) -> dict[str, str]:
    from hsrpc.engine.startup import describe_model  # loads torch, which --help does not
    from hsrpc.model.tensor import dtype_name

    spec, device = describe_model(config)
    sizes = spec.sizes
    return {
        "device": device.name,
        "device memory free": format_bytes(device.free_memory),
        "model": spec.name,
        "family": spec.family,
        "dtype": dtype_name(spec.dtype),
        "layers, hidden size": f"{sizes.num_layers}, {sizes.hidden_size}",
        "heads, K and V heads": f"{sizes.num_heads}, {sizes.num_kv_heads}",
        "context length": str(sizes.context_length),
        "weights": format_bytes(sizes.model_bytes),
        "K and V of a token": format_bytes(sizes.token_bytes(BlockKind.KV)),
        "activations of a token": format_bytes(sizes.token_bytes(BlockKind.ACTIVATION)),
        "K and V over activations": f"{sizes.activation_ratio:.2f} (activations pay above 1)",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
