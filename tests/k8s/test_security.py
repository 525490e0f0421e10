"""Pods are as restricted as the standard has it, and nobody reaches them whom the network policies do not name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.k8s.pod_security import beyond, violations
from tests.k8s.rendering import NAMES, Manifest, containers, find, pod_of, rendered, title, workloads

WITH_TOKEN = {"Deployment/hsrpc-picker"}
"""What talks to the API server."""


@pytest.mark.parametrize("name", NAMES)
def test_pods_are_restricted(name):
    """By the pod security standard, and a little more."""
    for workload in workloads(rendered(name)):
        assert violations(pod_of(workload)) == []
        assert beyond(pod_of(workload)) == []


@pytest.mark.parametrize("name", NAMES)
def test_pods_hold_no_token(name):
    """Except those that need one; no service account gives its own away."""
    manifests = rendered(name)
    for workload in workloads(manifests):
        assert pod_of(workload)["automountServiceAccountToken"] is (title(workload) in WITH_TOKEN)
    for account in (each for each in manifests if each["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_has_a_network_policy(name):
    """One that says who comes in and what goes out."""
    manifests = rendered(name)
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for workload in workloads(manifests):
        labels = workload["spec"]["template"]["metadata"]["labels"].items()
        [policy] = (each for each in policies if each["podSelector"]["matchLabels"].items() <= labels)
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule.get("from") for rule in policy.get("ingress", []))


@pytest.mark.parametrize("name", NAMES)
def test_a_server_reaches_nothing(name):
    """The model is on a volume."""
    for manifest in rendered(name):
        if title(manifest) in {"NetworkPolicy/hsrpc", "NetworkPolicy/hsrpc-batch"}:
            assert "egress" not in manifest["spec"]


def container(change: Callable[[Manifest], object]) -> Callable[[Manifest], None]:
    def apply(spec: Manifest) -> None:
        for each in containers(spec):
            change(each)

    return apply


FAULTS: dict[str, Callable[[Manifest], object]] = {
    "hostNetwork is set": lambda spec: spec.update(hostNetwork=True),
    "hostPID is set": lambda spec: spec.update(hostPID=True),
    "volume tmp is a hostPath": lambda spec: spec.update(volumes=[{"name": "tmp", "hostPath": {"path": "/tmp"}}]),
    "sysctl kernel.msgmax": lambda spec: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
    "server: runAsNonRoot is not true": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "server: runAsUser is 0": lambda spec: spec["securityContext"].update(runAsUser=0),
    "server: no seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "server: privileged": container(lambda each: each["securityContext"].update(privileged=True)),
    "server: allowPrivilegeEscalation is not false": container(
        lambda each: each["securityContext"].pop("allowPrivilegeEscalation")
    ),
    "server: procMount Unmasked": container(lambda each: each["securityContext"].update(procMount="Unmasked")),
    "server: capabilities are not dropped": container(
        lambda each: each["securityContext"].update(capabilities={"drop": ["NET_RAW"]})
    ),
    "server: capabilities ['IPC_LOCK'] are added": container(
        lambda each: each["securityContext"]["capabilities"].update(add=["IPC_LOCK"])
    ),
    "server: a hostPort": container(lambda each: each["ports"][0].update(hostPort=50051)),
    "server: the root file system can be written": container(
        lambda each: each["securityContext"].pop("readOnlyRootFilesystem")
    ),
    "server: /tmp is no emptyDir with a sizeLimit": lambda spec: spec["volumes"][0].update(emptyDir={}),
    "server: no requests, or no limit of memory": container(lambda each: each["resources"]["limits"].pop("memory")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    """Each by its name, and nothing else."""
    spec = pod_of(find(rendered("base"), "Deployment"))
    changed = copy.deepcopy(spec)
    FAULTS[fault](changed)
    assert [*violations(spec), *beyond(spec)] == []
    found = [*violations(changed), *beyond(changed)]
    assert [each for each in found if "/tmp" not in each or "/tmp" in fault] == [fault]
