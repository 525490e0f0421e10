"""hsrpc info: what a bug report needs."""

from __future__ import annotations

import json
import platform

import torch

from hsrpc import __version__


def test_json_has_versions_device_and_model(hsrpc):
    """One flat object: versions, the device, and the bundled model's sizes."""
    ran = hsrpc("info", "--device=cpu", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert (found["hsrpc"], found["python"]) == (__version__, platform.python_version())
    assert found["torch"] == torch.__version__
    assert {"platform", "device", "device memory free", "transformers", "grpcio", "protobuf", "uvloop"} <= set(found)
    assert (found["model"], found["family"], found["dtype"]) == ("storyteller", "opt", "float32")
    assert (found["layers, hidden size"], found["heads, K and V heads"]) == ("4, 256", "4, 4")
    assert found["context length"] == "512"
    assert found["K and V over activations"].startswith("2.00 ")
    assert found["host memory free"].endswith("iB")
    assert {"host memory obtainable", "memory limit", "locked memory limit"} <= set(found)
    assert all(isinstance(value, str) for value in found.values())


def test_text_has_the_same_facts_a_line_each(hsrpc):
    """Without --json each fact is a line."""
    facts = json.loads(hsrpc("info", "--device=cpu", "--json").out)
    lines = hsrpc("info", "--device=cpu").out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == list(facts)
    assert f"{'weights':28} {facts['weights']}" in lines


def test_a_shape_has_sizes_too(hsrpc):
    """A model with few K and V heads shows a ratio below 1."""
    found = json.loads(hsrpc("info", "--device=cpu", "--model=random:llama-3-8b", "--dtype=bfloat16", "--json").out)
    assert (found["family"], found["dtype"], found["heads, K and V heads"]) == ("llama", "bfloat16", "32, 8")
    assert found["K and V over activations"].startswith("0.50 ")


def test_a_package_that_is_missing_is_said_to_be(hsrpc, monkeypatch):
    """An optional package that is not installed is no error."""
    monkeypatch.setattr("hsrpc.cli.info._PACKAGES", ("no-such-package",))
    found = json.loads(hsrpc("info", "--device=cpu", "--json").out)
    assert found["no-such-package"] == "not installed"
