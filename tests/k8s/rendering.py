"""Manifests as `kubectl kustomize` renders them: of every overlay, and of every component in overlays of the tests."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hsrpc.config import parse_bytes

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
COMPONENTS = K8S / "components"
MODEL = K8S / "overlays/single-gpu/model"
"""A component of an overlay: the config map that says which model."""
ON_THE_BASE: Mapping[str, Sequence[str]] = {
    "base": (),
    "gpu": ("gpu",),
    "gpu-claim": ("gpu-claim",),
    "shared-memory": ("gpu", "shared-memory"),
    "model-volume": ("model-volume",),
    "model-image": ("model-image",),
    "tls": ("tls",),
    "mutual-tls": ("tls", "mutual-tls"),
    "auth": ("tls", "auth"),
    "every-lock": ("tls", "mutual-tls", "auth"),
    "metrics": ("metrics",),
    "keda": ("metrics", "keda"),
    "hpa": ("metrics", "hpa"),
    "openai": ("openai",),
    "openai-locked": ("openai", "tls", "auth"),
    "envoy": ("envoy",),
    "envoy-openai": ("openai", "envoy"),
    "grpc-route": ("grpc-route",),
    "inference-pool": ("inference-pool",),
    "numa": ("numa",),
    "production": ("gpu", "model-volume", "tls", "auth", "metrics", "keda", "openai", "numa"),
}
"""Overlays made for the tests: the base with components, in this order."""
ALONE = ("batch", "model-download")
"""Components that are overlays' only contents."""

Manifest = dict[str, Any]


def kubectl() -> str:
    """The program: that of the environment, which pip brings, or the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is missing: `make` installs it, but on macOS"
    return found


def kustomize(folder: Path) -> list[Manifest]:
    """What the kustomization in `folder` comes to."""
    command = [kubectl(), "kustomize", str(folder)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def compose(
    *components: Path,
    base: Path | None = K8S / "base",
    generators: Sequence[Mapping[str, Any]] = (),
    patches: Sequence[Mapping[str, Any]] = (),
) -> list[Manifest]:
    """An overlay of a base, or of nothing: components, config maps of its own, patches."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder).resolve()

        def relative(path: Path) -> str:
            return os.path.relpath(path.resolve(), inside)

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [relative(base)] if base else [],
            "components": [relative(component) for component in components],
            "configMapGenerator": list(generators),
            "patches": list(patches),
        }
        (inside / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(inside)


def overlays() -> dict[str, Path]:
    """Every kustomization that can be applied as it is, by its path under `k8s/`."""
    files = (K8S / "overlays").rglob("kustomization.yaml")
    found = {file.parent.relative_to(K8S).as_posix(): file.parent for file in files if is_overlay(file)}
    return dict(sorted(found.items()))


def is_overlay(file: Path) -> bool:
    return yaml.safe_load(file.read_text())["kind"] == "Kustomization"


NAMES = (*overlays(), *ON_THE_BASE, *ALONE)


@cache
def _rendered(name: str) -> list[Manifest]:
    if name in overlays():
        return kustomize(K8S / name)
    components = [COMPONENTS / each for each in ON_THE_BASE.get(name, (name,))]
    needs_model = any("hsrpc-model" in file.read_text() for each in components for file in each.glob("*.yaml"))
    return compose(*components, *([MODEL] if needs_model else []), base=K8S / "base" if name in ON_THE_BASE else None)


def rendered(name: str) -> list[Manifest]:
    """A copy of the manifests of one of `NAMES`, which the caller may change."""
    return copy.deepcopy(_rendered(name))


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def find(manifests: Sequence[Manifest], kind: str, name: str = "hsrpc") -> Manifest:
    [found] = (each for each in manifests if title(each) == f"{kind}/{name}")
    return found


def pod_of(manifest: Manifest) -> Manifest:
    """The pod specification of a Deployment or a Job."""
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def workloads(manifests: Sequence[Manifest]) -> list[Manifest]:
    """What makes pods."""
    return [each for each in manifests if each["kind"] in {"Deployment", "Job"}]


def bytes_of(quantity: str) -> int:
    """What a quantity of Kubernetes such as 2Gi comes to."""
    return parse_bytes(re.sub("i$", "iB", quantity), "quantity")


def containers(spec: Manifest) -> Iterator[Manifest]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]
