"""What manifests name in each other: whatever is named must be there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.k8s.rendering import Manifest, containers, pod_of, title, workloads

VARIABLE = re.compile(r"\$\((\w+)\)")
OF_KUBERNETES = {"JOB_COMPLETION_INDEX"}
"""Variables that Kubernetes sets in the pods of a job with indexes."""


def dangling(manifests: Sequence[Manifest], outside: set[str]) -> list[str]:
    """What is named and is neither there nor in `outside`: objects by kind and name, ports, labels, variables."""
    return [f"{title(each)}: {found}" for each in manifests for found in _Names(manifests, outside).of(each)]


class _Names:
    def __init__(self, manifests: Sequence[Manifest], outside: set[str]) -> None:
        self._all = manifests
        self._titles = {title(each) for each in manifests} | outside
        self._of_kind: Mapping[str, Callable[[Manifest], Iterator[str]]] = {
            "Deployment": self._workload,
            "Job": self._workload,
            "Service": self._service,
            "PodDisruptionBudget": lambda each: self._selected(each["spec"]["selector"]["matchLabels"]),
            "NetworkPolicy": self._network_policy,
            "PodMonitor": self._pod_monitor,
            "ScaledObject": lambda each: self._object("Deployment", each["spec"]["scaleTargetRef"]["name"]),
            "HorizontalPodAutoscaler": lambda each: self._object(**_reference(each["spec"]["scaleTargetRef"])),
            "RoleBinding": self._role_binding,
            "GRPCRoute": self._route,
            "HTTPRoute": self._route,
            "InferencePool": self._pool,
        }

    def of(self, manifest: Manifest) -> Iterator[str]:
        yield from self._of_kind.get(manifest["kind"], lambda _: iter(()))(manifest)

    def _object(self, kind: str, name: str) -> Iterator[str]:
        if f"{kind}/{name}" not in self._titles:
            yield f"there is no {kind}/{name}"

    def _pods(self, labels: Mapping[str, str]) -> list[Manifest]:
        """Specifications of the pods that bear `labels`."""
        templates = (each["spec"]["template"] for each in workloads(self._all))
        return [each["spec"] for each in templates if labels.items() <= each["metadata"]["labels"].items()]

    def _selected(self, labels: Mapping[str, str]) -> Iterator[str]:
        if not self._pods(labels):
            yield f"no pod bears {dict(labels)}"

    def _port(self, labels: Mapping[str, str], port: str | int) -> Iterator[str]:
        """`port`, by name or number, must be one of each pod that bears `labels`."""
        yield from self._selected(labels)
        for spec in self._pods(labels):
            ports = [each for container in containers(spec) for each in container.get("ports", [])]
            if port not in {each.get("name") for each in ports} | {each["containerPort"] for each in ports}:
                yield f"no container has the port {port}"

    def _workload(self, manifest: Manifest) -> Iterator[str]:
        spec = pod_of(manifest)
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        for selector in [manifest["spec"].get("selector"), *_spread(spec)]:
            if selector is not None and not selector["matchLabels"].items() <= labels.items():
                yield f"{selector['matchLabels']} are not the labels of its pods"
        if "serviceAccountName" in spec:
            yield from self._object("ServiceAccount", spec["serviceAccountName"])
        for claim in spec.get("resourceClaims", []):
            yield from self._object("ResourceClaimTemplate", claim["resourceClaimTemplateName"])
        for volume in spec.get("volumes", []):
            yield from self._volume(volume)
        for container in containers(spec):
            yield from self._container(spec, container)
        mounted = {mount["name"] for container in containers(spec) for mount in container.get("volumeMounts", [])}
        yield from (f"nobody mounts {each['name']}" for each in spec.get("volumes", []) if each["name"] not in mounted)

    def _volume(self, volume: Manifest) -> Iterator[str]:
        if "configMap" in volume:
            yield from self._object("ConfigMap", volume["configMap"]["name"])
        if "secret" in volume:
            yield from self._object("Secret", volume["secret"]["secretName"])
        if "persistentVolumeClaim" in volume:
            yield from self._object("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])

    def _container(self, spec: Manifest, container: Manifest) -> Iterator[str]:
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        yield from (f"no volume {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in volumes)
        claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
        for claim in container.get("resources", {}).get("claims", []):
            if claim["name"] not in claims:
                yield f"no resource claim {claim['name']}"
        ports = {each["containerPort"] for each in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container and container[probe]["grpc"]["port"] not in ports:
                yield f"{probe} asks at a port that {container['name']} has not"
        known = set(OF_KUBERNETES)
        for source in container.get("envFrom", []):
            name = source["configMapRef"]["name"]
            yield from self._object("ConfigMap", name)
            known |= {key for each in self._all if title(each) == f"ConfigMap/{name}" for key in each["data"]}
        for variable in container.get("env", []):
            known.add(variable["name"])
            for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if field in variable.get("valueFrom", {}):
                    yield from self._object(kind, variable["valueFrom"][field]["name"])
        words = [*container.get("command", []), *container.get("args", [])]
        yield from (f"no variable {each}" for word in words for each in VARIABLE.findall(word) if each not in known)

    def _service(self, manifest: Manifest) -> Iterator[str]:
        for port in manifest["spec"]["ports"]:
            yield from self._port(manifest["spec"]["selector"], port.get("targetPort", port["port"]))

    def _network_policy(self, manifest: Manifest) -> Iterator[str]:
        labels = manifest["spec"]["podSelector"]["matchLabels"]
        for rule in manifest["spec"].get("ingress", []):
            for port in rule["ports"]:
                yield from self._port(labels, port["port"])
        for rule in manifest["spec"].get("egress", []):
            for peer in rule.get("to", []):
                for port in rule["ports"]:
                    yield from self._port(peer["podSelector"]["matchLabels"], port["port"])

    def _pod_monitor(self, manifest: Manifest) -> Iterator[str]:
        for endpoint in manifest["spec"]["podMetricsEndpoints"]:
            yield from self._port(manifest["spec"]["selector"]["matchLabels"], endpoint["port"])

    def _role_binding(self, manifest: Manifest) -> Iterator[str]:
        yield from self._object(**_reference(manifest["roleRef"]))
        for subject in manifest["subjects"]:
            yield from self._object(**_reference(subject))

    def _route(self, manifest: Manifest) -> Iterator[str]:
        for parent in manifest["spec"]["parentRefs"]:
            yield from self._object("Gateway", parent["name"])
        for rule in manifest["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                kind = backend.get("kind", "Service")
                yield from self._object(kind, backend["name"])
                if kind == "Service":
                    yield from self._service_port(backend["name"], backend["port"])

    def _service_port(self, name: str, port: int) -> Iterator[str]:
        for service in (each for each in self._all if title(each) == f"Service/{name}"):
            if port not in {each["port"] for each in service["spec"]["ports"]}:
                yield f"Service/{name} has no port {port}"

    def _pool(self, manifest: Manifest) -> Iterator[str]:
        for port in manifest["spec"]["targetPorts"]:
            yield from self._port(manifest["spec"]["selector"]["matchLabels"], port["number"])
        picker = manifest["spec"]["endpointPickerRef"]
        yield from self._object("Service", picker["name"])
        yield from self._service_port(picker["name"], picker["port"]["number"])


def _reference(reference: Manifest) -> dict[str, str]:
    return {"kind": reference["kind"], "name": reference["name"]}


def _spread(spec: Manifest) -> Iterator[Manifest]:
    yield from (each["labelSelector"] for each in spec.get("topologySpreadConstraints", []))
