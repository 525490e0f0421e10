"""Rendered manifests: what `kubectl kustomize` makes of a folder, and what lies in it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "k8s/overlays"
_CLAIMS_OF_DEVICES = ("nvidia.com/gpu", "resourceClaims")
"""Where they stand, a pod asks for a GPU: of the device plugin, or by dynamic resource allocation."""

Manifest: TypeAlias = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization, each a fresh copy."""
    return [manifest for manifest in yaml.safe_load_all(_rendered(folder)) if manifest]


@cache
def _rendered(folder: Path) -> str:
    command = ["kubectl", "kustomize", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Those of some kinds, in order."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pod_spec(workload: Manifest) -> Manifest:
    """The pod's specification in the template of a Deployment or Job."""
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def needs_gpu(workload: Manifest) -> bool:
    """Whether its pods start on nodes with a GPU alone."""
    return any(claim in str(workload["spec"]) for claim in _CLAIMS_OF_DEVICES)
