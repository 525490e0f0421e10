"""Every manifest is valid by a strict schema: of Kubernetes, oldest and newest version, or of its own project."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from tests.k8s.rendering import NAMES, Manifest, find, rendered

OLDEST = "1.30"
NEWEST = "1.37"
OLDEST_OF = {"gpu-claim": "1.34", "model-image": "1.33"}
"""Versions of components that need a newer one."""
SCHEMAS = Path(__file__).parent / "schemas"


@cache
def validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator | None:
    """For a custom resource; None: it is of Kubernetes itself."""
    path = SCHEMAS / f"{kind}_{api_version.replace('/', '_')}.json".lower()
    return jsonschema.Draft202012Validator(json.loads(path.read_text())) if path.exists() else None


def validate(manifest: Manifest, version: str) -> None:
    """Check one manifest.

    Raises:
        jsonschema.ValidationError: a field is unknown, missing or of the wrong type.
    """
    custom = validator(manifest["kind"], manifest["apiVersion"])
    if custom is not None:
        custom.validate(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def validate_all(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        validate(manifest, version)


@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_valid(name):
    """No field is unknown, missing or of the wrong type."""
    for version in (OLDEST_OF.get(name, OLDEST), NEWEST):
        validate_all(rendered(name), version)


@pytest.mark.parametrize("name", OLDEST_OF)
def test_an_older_version_is_too_old(name):
    """The versions above are not later than they need to be."""
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError)):
        validate_all(rendered(name), OLDEST)


def test_every_custom_kind_is_used():
    """No schema is left over."""
    kinds = {(each["kind"], each["apiVersion"]) for name in NAMES for each in rendered(name)}
    used = {f"{kind}_{version.replace('/', '_')}.json".lower() for kind, version in kinds}
    assert {path.name for path in SCHEMAS.glob("*.json")} <= used


WRONG = {
    "a misspelt field": ("Deployment", ("spec", "replica"), 2),
    "a wrong type": ("Deployment", ("spec", "replicas"), "two"),
    "a misspelt field of a custom resource": ("ScaledObject", ("spec", "maxReplicas"), 4),
    "a wrong type in one": ("ScaledObject", ("spec", "maxReplicaCount"), "four"),
    "a field of a pod monitor": ("PodMonitor", ("spec", "endpoints"), []),
    "a label of an alert": ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "severity"), "critical"),
    "a field of a route": ("GRPCRoute", ("spec", "rules", 0, "backends"), []),
    "a route's number": ("GRPCRoute", ("spec", "rules", 0, "backendRefs", 0, "port"), "grpc"),
    "a timeout that is none": ("HTTPRoute", ("spec", "rules", 0, "timeouts", "request"), "forever"),
    "a pool's older field": ("InferencePool", ("spec", "extensionRef"), {"name": "hsrpc-picker"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_schemas_are_strict(case):
    """A fault in any kind is found."""
    kind, (*path, last), value = WRONG[case]
    holder = next(name for name in NAMES if any(each["kind"] == kind for each in rendered(name)))
    manifest = find(rendered(holder), kind)
    validate(manifest, NEWEST)
    parent = manifest
    for key in path:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest, NEWEST)
