"""The pod security standard `restricted`, as far as a manifest can break it, and what these manifests ask beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.k8s.rendering import Manifest, containers

ALLOWED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim"}
ALLOWED_VOLUMES |= {"projected", "secret"}
SAFE_SYSCTLS = {"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_keepalive_time"}


def violations(spec: Manifest) -> list[str]:
    """What of a pod specification the standard forbids."""
    return [*_of_the_pod(spec), *(each for container in containers(spec) for each in _of_a_container(spec, container))]


def _of_the_pod(spec: Manifest) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is set"
    for volume in spec.get("volumes", []):
        if forbidden := set(volume) - {"name"} - ALLOWED_VOLUMES:
            yield f"volume {volume['name']} is a {', '.join(forbidden)}"
    for sysctl in spec.get("securityContext", {}).get("sysctls", []):
        if sysctl["name"] not in SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']}"


def _of_a_container(spec: Manifest, container: Manifest) -> Iterator[str]:
    name, own = container["name"], container.get("securityContext", {})
    merged: dict[str, Any] = {**spec.get("securityContext", {}), **own}
    if merged.get("runAsNonRoot") is not True:
        yield f"{name}: runAsNonRoot is not true"
    if merged.get("runAsUser") == 0:
        yield f"{name}: runAsUser is 0"
    if merged.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield f"{name}: no seccompProfile"
    if own.get("privileged"):
        yield f"{name}: privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation is not false"
    if own.get("procMount", "Default") != "Default":
        yield f"{name}: procMount {own['procMount']}"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield f"{name}: capabilities are not dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{name}: capabilities {capabilities['add']} are added"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{name}: a hostPort"


def beyond(spec: Manifest) -> list[str]:
    """What else is asked: nothing is written but to volumes, /tmp is one with a bound, and resources are bounded."""
    return [each for container in containers(spec) for each in _beyond(spec, container)]


def _beyond(spec: Manifest, container: Manifest) -> Iterator[str]:
    name = container["name"]
    if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield f"{name}: the root file system can be written"
    mounted = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    if "sizeLimit" not in volumes.get(mounted.get("/tmp", ""), {}).get("emptyDir", {}):
        yield f"{name}: /tmp is no emptyDir with a sizeLimit"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if not {"cpu", "memory"} <= set(requests) or "memory" not in limits:
        yield f"{name}: no requests, or no limit of memory"
