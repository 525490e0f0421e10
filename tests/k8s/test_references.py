"""Objects, ports, labels and variables that manifests name are there; what a user makes is in the documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.k8s.references import dangling
from tests.k8s.rendering import NAMES, ROOT, Manifest, find, pod_of, rendered

OUTSIDE = {
    "Secret/hsrpc-tls",
    "Secret/hsrpc-auth",
    "Secret/hsrpc-hub",
    "PersistentVolumeClaim/hsrpc-models",
    "PersistentVolumeClaim/hsrpc-batch",
    "Gateway/hsrpc",
}
"""What no manifest makes."""
GUIDE = Path(ROOT / "docs/kubernetes.md")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_is_there(name):
    """In the same overlay, or made by the user."""
    assert dangling(rendered(name), OUTSIDE) == []


@pytest.mark.parametrize("each", sorted(OUTSIDE))
def test_the_guide_says_what_to_make(each):
    """By its name, and some manifest needs it."""
    assert re.search(rf"\b{each.split('/')[1]}\b", GUIDE.read_text())
    assert any(each in found for name in NAMES for found in dangling(rendered(name), OUTSIDE - {each}))


def server(manifests: list[Manifest]) -> Manifest:
    [container] = pod_of(find(manifests, "Deployment"))["containers"]
    return container


FAULTS: dict[str, tuple[str, Callable[[list[Manifest]], object]]] = {
    "Service/hsrpc: no container has the port rpc": (
        "base",
        lambda all_: find(all_, "Service")["spec"]["ports"][0].update(targetPort="rpc"),
    ),
    "PodDisruptionBudget/hsrpc: no pod bears {'app.kubernetes.io/name': 'hsrcp'}": (
        "base",
        lambda all_: find(all_, "PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"app.kubernetes.io/name": "hsrcp"}}
        ),
    ),
    "Deployment/hsrpc: livenessProbe asks at a port that server has not": (
        "tls",
        lambda all_: server(all_)["livenessProbe"]["grpc"].update(port=50053),
    ),
    "Deployment/hsrpc: no variable MODEL": (
        "model-volume",
        lambda all_: server(all_)["args"].append("--model=/models/$(MODEL)"),
    ),
    "Deployment/hsrpc: no volume cache": (
        "base",
        lambda all_: server(all_)["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
    ),
    "Deployment/hsrpc: there is no Secret/hsrpc-tokens": (
        "auth",
        lambda all_: next(each for each in pod_of(find(all_, "Deployment"))["volumes"] if each["name"] == "auth")[
            "secret"
        ].update(secretName="hsrpc-tokens"),
    ),
    "GRPCRoute/hsrpc: Service/hsrpc has no port 50052": (
        "grpc-route",
        lambda all_: find(all_, "GRPCRoute")["spec"]["rules"][0]["backendRefs"][0].update(port=50052),
    ),
    "InferencePool/hsrpc: there is no Service/picker": (
        "inference-pool",
        lambda all_: find(all_, "InferencePool")["spec"]["endpointPickerRef"].update(name="picker"),
    ),
    "RoleBinding/hsrpc-picker: there is no Role/picker": (
        "inference-pool",
        lambda all_: find(all_, "RoleBinding", "hsrpc-picker")["roleRef"].update(name="picker"),
    ),
    "ScaledObject/hsrpc: there is no Deployment/server": (
        "keda",
        lambda all_: find(all_, "ScaledObject")["spec"]["scaleTargetRef"].update(name="server"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    """Each by what is named, and nothing else."""
    name, change = FAULTS[fault]
    manifests = rendered(name)
    change(manifests)
    assert dangling(manifests, OUTSIDE) == [fault]
