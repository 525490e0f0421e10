"""The guide and the index: what they name is there, and their examples are rendered."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import yaml

from hsrpc.cli.main import build_parser
from tests.k8s.rendering import COMPONENTS, K8S, MODEL, ROOT, compose, find, kustomize, overlays, pod_of
from tests.k8s.test_metrics import documented, faults
from tests.k8s.test_schemas import NEWEST, validate_all

GUIDE = (ROOT / "docs/kubernetes.md").read_text()
INDEX = (K8S / "README.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)]
OF_OTHERS = {"build-arg", "cert", "for", "from-file", "key", "model-server-metrics-port", "timeout"}
"""Flags of kubectl, docker and the picker."""


def block(kind: str) -> Any:
    [found] = (each for each in BLOCKS if each.get("kind") == kind)
    return found


def test_the_index_has_every_component_and_overlay():
    """And no other."""
    rows = set(re.findall(r"^\| `([\w/-]+)` \|", INDEX, re.MULTILINE))
    folders = {name for name in overlays() if not name.endswith("/download")}
    assert rows == {folder.name for folder in COMPONENTS.iterdir()} | folders


def test_folders_that_the_documents_name_exist():
    """Those that are to be applied."""
    named = set(re.findall(r"\bk8s/(?:overlays|components)/[\w./-]*\w", GUIDE + INDEX))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_flags_that_the_guide_names_exist():
    """Flags of `hsrpc serve`, `plan` and `batch`, but for those of other programs."""
    commands = build_parser()._subparsers._group_actions[0].choices
    known = {each for name in ("serve", "plan", "batch", "generate") for each in commands[name]._option_string_actions}
    named = {f"--{name}" for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", GUIDE) if name not in OF_OTHERS}
    assert len(named) > 10
    assert named - known == set()


def test_an_overlay_of_one_s_own_is_rendered(tmp_path):
    """As the guide has it, beside a checkout of this repository."""
    (tmp_path / "hsrpc").mkdir()
    shutil.copytree(K8S, tmp_path / "hsrpc/k8s")
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(yaml.safe_dump(block("Kustomization")))
    shutil.copy(K8S / "overlays/single-gpu/deployment.yaml", own / "sizes.yaml")
    manifests = kustomize(own)
    validate_all(manifests, NEWEST)
    deployment = find(manifests, "Deployment")
    [server] = pod_of(deployment)["containers"]
    assert deployment["metadata"]["namespace"] == "hsrpc"
    assert server["image"] == "registry.example.com/hsrpc:0.2.0-cuda"
    assert server["args"][-1] == "--host-memory=96GiB"


def test_an_image_of_a_model_is_named_by_a_patch():
    """As the guide has it."""
    patch = yaml.safe_dump(block("Deployment"))
    spec = pod_of(find(compose(COMPONENTS / "model-image", MODEL, patches=[{"patch": patch}]), "Deployment"))
    [volume] = (each for each in spec["volumes"] if each["name"] == "model")
    assert volume["image"]["reference"].startswith("registry.example.com/models/qwen3-32b@sha256:")


@pytest.mark.parametrize("path", re.findall(r"- (\{op: .*\})(?=[`\n])", GUIDE))
def test_operations_are_rendered(path):
    """Single ones, in the guide's text."""
    patch = {"patch": f"- {path}", "target": {"kind": "Deployment", "name": "hsrpc"}}
    validate_all(compose(patches=[patch]), NEWEST)


def test_the_adapter_s_rule_asks_for_what_there_is():
    """By the name that the autoscaler has."""
    [rule] = next(each["rules"] for each in BLOCKS if "rules" in each)
    assert faults(rule["seriesQuery"]) == []
    assert rule["name"]["as"] in documented()
