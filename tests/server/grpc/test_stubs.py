"""The generated stubs and what the package says it needs."""

from __future__ import annotations

import re
import tomllib

import pytest

from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import ROOT


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def declared_floor(package: str) -> tuple[int, ...]:
    """The oldest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [requirement] = [item for item in project["dependencies"] if re.match(rf"{package}\b", item)]
    return version_of(requirement.partition(">=")[2])


def test_stubs_run_with_the_oldest_grpcio():
    """Stubs refuse a grpcio older than their generator, so it must be no newer than the declared floor."""
    assert version_of(generation_pb2_grpc.GRPC_GENERATED_VERSION) <= declared_floor("grpcio")


@pytest.mark.parametrize("name", ["generation", "model", "server"])
def test_messages_run_with_the_oldest_protobuf(name):
    """Messages refuse a protobuf older than their generator, or two major versions newer."""
    text = (ROOT / "hsrpc" / "v1" / f"{name}_pb2.py").read_text()
    generated = re.search(r"# Protobuf Python Version: ([\d.]+)", text)
    assert generated is not None
    assert version_of(generated[1]) <= declared_floor("protobuf")
