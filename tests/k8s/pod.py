"""A pod as the kubelet would start it, moved to this machine: what it runs, with which arguments and environment.

Nothing is changed but where things are: mounted folders are folders of a test, and ports are free ones of this machine.
Both stand in `Place`, and only whole paths and ports are replaced. What a manifest asks for and is not known here is
refused. Not looked at: users, read-only file systems, CPU, network policies, and what the scheduler needs.
"""

from __future__ import annotations

import base64
import random
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.k8s.image import find_image
from tests.k8s.rendering import Manifest, title

ADDRESS = "127.0.0.1"
"""Address of the pod, its node and every service."""
NAMESPACE = "default"
_PORT_OPTION = re.compile(r"--(?:[\w-]+-)?port")
_PORT_ARGUMENT = re.compile(rf"^{_PORT_OPTION.pattern}[=\n](\d+)$", re.MULTILINE)
_CONTAINER_FIELDS = {
    *("name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "ports", "resources", "volumeMounts"),
    *("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "securityContext", "restartPolicy"),
    *("workingDir", "terminationMessagePolicy"),
}


class UnknownError(Exception):
    """A manifest has something that this model of Kubernetes does not."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a container's paths and ports are on this machine: all in which it differs from one of a cluster."""

    paths: Mapping[str, Path]
    ports: Mapping[int, int]

    def path(self, text: str) -> str:
        """`text` with folders of this machine for mounted ones, where a whole path begins with one."""
        if not self.paths:
            return text
        mounts = "|".join(map(re.escape, sorted(self.paths, key=len, reverse=True)))
        return re.sub(rf"(?<![\w./-])({mounts})(?=$|[^\w.-])", lambda found: str(self.paths[found[1]]), text)

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Arguments with paths and ports of this machine: --port=N, --metrics-port N and HOST:N."""
        moved, option = [], ""
        for argument in map(self.path, arguments):
            name, equals, value = argument.partition("=")
            if _PORT_OPTION.fullmatch(name) and equals:
                moved.append(f"{name}={self._port(value)}")
            elif _PORT_OPTION.fullmatch(option):
                moved.append(self._port(argument))
            else:
                moved.append(self._address(argument))
            option = argument
        return moved

    def variable(self, name: str, value: str) -> str:
        """Value of a variable; one that ends in _PORT is a port."""
        return self._port(value) if name.endswith("_PORT") and value.isdecimal() else self._address(self.path(value))

    def _port(self, text: str) -> str:
        return str(self.ports.get(int(text), text)) if text.isdecimal() else text

    def _address(self, text: str) -> str:
        return re.sub(r"(?<=[\w\]]):(\d+)$", lambda found: f":{self._port(found[1])}", text)


@dataclass(frozen=True, slots=True)
class Container:
    """One process of a pod, ready to be started."""

    name: str
    command: list[str]
    env: dict[str, str]
    folder: Path
    """Working directory."""
    memory: int | None
    """Bytes of its limit; None: it has none."""
    restarts: bool
    """Whatever its exit code, it is started again."""
    place: Place
    spec: Manifest

    def port(self, name_or_number: str | int) -> int:
        """A port on this machine, by its number in the pod or by the name that the container gave it."""
        numbers = {each["name"]: each["containerPort"] for each in self.spec.get("ports", []) if "name" in each}
        number = numbers[name_or_number] if isinstance(name_or_number, str) else name_or_number
        return self.place.ports.get(number, number)


@dataclass(frozen=True, slots=True)
class Pod:
    """Containers in the order in which they start, sidecars first, and how long they may take to end."""

    sidecars: list[Container]
    containers: list[Container]
    grace: float
    """Seconds."""
    left_out: list[str]
    """Names of containers whose image is not this repository's."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a pod finds around it: objects that it names, folders behind its claims, and a folder for what it writes."""

    manifests: Sequence[Manifest]
    folder: Path
    claims: Mapping[str, Path] = field(default_factory=dict)
    """Folders of persistent volume claims, by name."""

    def pod(self, template: Manifest, name: str = "hsrpc-0", index: int | None = None) -> Pod:
        """The pod of a workload's template; `index`: of an indexed job.

        Raises:
            UnknownError: it has something that cannot be modelled.
        """
        return _Builder(self, template, name, index).pod()

    def pods(self, job: Manifest) -> list[Pod]:
        """The pods of an indexed job, each with its index.

        Raises:
            UnknownError: it is none, or its pods have something that cannot be modelled.
        """
        if job["spec"].get("completionMode") != "Indexed":
            raise UnknownError(f"{title(job)} is no indexed job")
        name = job["metadata"]["name"]
        return [self.pod(job["spec"]["template"], f"{name}-{each}", each) for each in range(job["spec"]["completions"])]

    def data(self, kind: str, name: str, *, optional: bool = False) -> dict[str, bytes]:
        """Entries of a ConfigMap or Secret."""
        for manifest in self.manifests:
            if title(manifest) == f"{kind}/{name}":
                encoded = {**manifest.get("binaryData", {}), **(manifest.get("data", {}) if kind == "Secret" else {})}
                plain = {**manifest.get("stringData", {}), **(manifest.get("data", {}) if kind != "Secret" else {})}
                decoded = {key: base64.b64decode(value) for key, value in encoded.items()}
                return decoded | {key: value.encode() for key, value in plain.items()}
        if optional:
            return {}
        raise UnknownError(f"{kind} {name} is not among the manifests")


@dataclass(frozen=True, slots=True)
class _Builder:
    cluster: Cluster
    template: Manifest
    name: str
    index: int | None

    def pod(self) -> Pod:
        spec = self.template["spec"]
        initial, ports = spec.get("initContainers", []), self._ports(spec)
        if wrong := [each["name"] for each in initial if each.get("restartPolicy") != "Always"]:
            raise UnknownError(f"init containers that run to their end: {wrong}")
        volumes = {volume["name"]: self._volume(volume) for volume in spec.get("volumes", [])}
        left_out = [each["name"] for each in self._all(spec) if find_image(each["image"]) is None]
        sidecars = [self._container(each, volumes, ports) for each in initial if each["name"] not in left_out]
        containers = [
            self._container(each, volumes, ports) for each in spec["containers"] if each["name"] not in left_out
        ]
        return Pod(sidecars, containers, float(spec.get("terminationGracePeriodSeconds", 30)), left_out)

    def _all(self, spec: Manifest) -> list[Manifest]:
        return [*spec.get("initContainers", []), *spec["containers"]]

    def _ports(self, spec: Manifest) -> dict[int, int]:
        """A free port of this machine for each that containers, probes or arguments name."""
        numbers: set[int] = set()
        for container in self._all(spec):
            numbers |= {port["containerPort"] for port in container.get("ports", [])}
            probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")]
            asked = (value.get("port") for probe in probes for value in probe.values() if isinstance(value, dict))
            numbers |= {port for port in asked if isinstance(port, int)}
            text = "\n".join([*container.get("command", []), *container.get("args", [])])
            numbers |= {
                int(found[1]) for found in re.finditer(rf"^{_PORT_OPTION.pattern}[=\n](\d+)$", text, re.MULTILINE)
            }
        return dict(zip(sorted(numbers - {0}), _free_ports(), strict=False))

    def _container(self, spec: Manifest, volumes: Mapping[str, Path], ports: Mapping[int, int]) -> Container:
        if unknown := spec.keys() - _CONTAINER_FIELDS:
            raise UnknownError(f"container {spec['name']} has {sorted(unknown)}")
        image = find_image(spec["image"])
        assert image is not None
        mounts = {mount["mountPath"].rstrip("/"): self._mount(mount, volumes) for mount in spec.get("volumeMounts", [])}
        place = Place(mounts, ports)
        given = self._environment(spec)
        command = [_expanded(part, given) for part in spec.get("command", image.entrypoint)]
        default = [] if "command" in spec else image.arguments
        arguments = [_expanded(part, given) for part in spec.get("args", default)]
        env = {name: place.variable(name, value) for name, value in (image.env | given).items()}
        folder = (
            Path(place.path(spec["workingDir"])) if "workingDir" in spec else self._new_folder(f"{spec['name']}-cwd")
        )
        return Container(
            name=spec["name"],
            command=[*place.arguments(command), *place.arguments(arguments)],
            env=env | {"HOSTNAME": self.name},
            folder=folder,
            memory=_quantity(spec.get("resources", {}).get("limits", {}).get("memory")),
            restarts="Always" in (spec.get("restartPolicy"), self.template["spec"].get("restartPolicy", "Always")),
            place=place,
            spec=spec,
        )

    def _mount(self, mount: Manifest, volumes: Mapping[str, Path]) -> Path:
        return volumes[mount["name"]] / str(mount.get("subPath", ""))

    def _environment(self, spec: Manifest) -> dict[str, str]:
        """Variables of services, then those of `envFrom`, then those of `env`, each with those before it."""
        env = dict(self._service_variables())
        env |= {} if self.index is None else {"JOB_COMPLETION_INDEX": str(self.index)}
        for source in spec.get("envFrom", []):
            kind, key = ("Secret", "secretRef") if "secretRef" in source else ("ConfigMap", "configMapRef")
            entries = self.cluster.data(kind, source[key]["name"], optional=source[key].get("optional", False))
            env |= {source.get("prefix", "") + name: value.decode() for name, value in entries.items()}
        for variable in spec.get("env", []):
            if "valueFrom" not in variable:
                env[variable["name"]] = _expanded(variable.get("value", ""), env)
            elif (value := self._value(variable["valueFrom"], spec)) is not None:
                env[variable["name"]] = value
        return env

    def _service_variables(self) -> Iterator[tuple[str, str]]:
        yield "KUBERNETES_SERVICE_HOST", ADDRESS
        yield "KUBERNETES_SERVICE_PORT", "443"
        if not self.template["spec"].get("enableServiceLinks", True):
            return
        for service in self.cluster.manifests:
            if service["kind"] != "Service" or service["spec"].get("clusterIP") == "None":
                continue
            name, port = service["metadata"]["name"].upper().replace("-", "_"), service["spec"]["ports"][0]["port"]
            yield f"{name}_SERVICE_HOST", ADDRESS
            yield f"{name}_SERVICE_PORT", str(port)
            yield f"{name}_PORT", f"tcp://{ADDRESS}:{port}"

    def _value(self, source: Manifest, spec: Manifest) -> str | None:
        [(kind, what)] = source.items()
        match kind:
            case "fieldRef":
                return self._field(what["fieldPath"])
            case "resourceFieldRef":
                group, _, name = what["resource"].partition(".")
                amount = _quantity(spec["resources"][group][name]) or 0
                return str(-(-amount // (_quantity(what.get("divisor", "1")) or 1)))
            case "configMapKeyRef" | "secretKeyRef":
                optional = what.get("optional", False)
                data = self.cluster.data(
                    "Secret" if kind == "secretKeyRef" else "ConfigMap", what["name"], optional=optional
                )
                if what["key"] not in data and not optional:
                    raise UnknownError(f"{what['name']} has no key {what['key']}")
                return data[what["key"]].decode() if what["key"] in data else None
        raise UnknownError(f"valueFrom {kind}")

    def _field(self, path: str) -> str:
        metadata, spec = self.template.get("metadata", {}), self.template["spec"]
        known: dict[str, str] = {
            "metadata.name": self.name,
            "metadata.namespace": NAMESPACE,
            "metadata.uid": "00000000-0000-0000-0000-000000000000",
            "spec.nodeName": "node",
            "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
            **dict.fromkeys(("status.podIP", "status.podIPs", "status.hostIP", "status.hostIPs"), ADDRESS),
        }
        maps = {
            "labels": metadata.get("labels", {}),
            "annotations": metadata.get("annotations", {}),
        }
        if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str(maps[found[1]].get(found[2], ""))
        if path not in known:
            raise UnknownError(f"field {path}")
        return known[path]

    def _volume(self, volume: Manifest) -> Path:
        name = volume["name"]
        [(kind, source)] = ((key, value) for key, value in volume.items() if key != "name")
        match kind:
            case "persistentVolumeClaim":
                if source["claimName"] not in self.cluster.claims:
                    raise UnknownError(f"claim {source['claimName']}: no folder is given for it")
                return self.cluster.claims[source["claimName"]]
            case "emptyDir":
                return self._new_folder(name)
            case "configMap" | "secret":
                return self._write(self._new_folder(name), kind, source)
            case "projected":
                folder = self._new_folder(name)
                for part in source["sources"]:
                    [(projected, entries)] = part.items()
                    self._write(folder, projected, entries)
                return folder
        raise UnknownError(f"volume {name} of kind {kind}")

    def _write(self, folder: Path, kind: str, source: Manifest) -> Path:
        """The files of a ConfigMap or Secret, with its modes."""
        if kind not in ("configMap", "secret"):
            raise UnknownError(f"projection of {kind}")
        name = source.get("name") or source["secretName"]
        data = self.cluster.data(
            "Secret" if kind == "secret" else "ConfigMap", name, optional=source.get("optional", False)
        )
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            file = folder / item["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data[item["key"]])
            file.chmod(item.get("mode", source.get("defaultMode", 0o644)))
        return folder

    def _new_folder(self, name: str) -> Path:
        folder = self.cluster.folder / self.name / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _expanded(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` replaced where the variable is there, and `$$` one `$`."""

    def value(found: re.Match[str]) -> str:
        return env.get(found[1], found[0]) if found[1] else "$"

    return re.sub(r"\$\$|\$\(([^)]+)\)", value, text)


_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _quantity(quantity: Any) -> int | None:
    """A quantity as Kubernetes writes it, whole: 2Gi is 2147483648; None: none is given."""
    if quantity is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGT]i?|Ki)?", str(quantity))
    if found is None:
        raise UnknownError(f"quantity {quantity}")
    scale = 0.001 if found[2] == "m" else _SUFFIXES.get(found[2] or "", 1)
    return -int(-float(found[1]) * scale // 1)


def _free_ports() -> Iterator[int]:
    """Ports that nothing listens on, below those that the system gives to others meanwhile."""
    for port in random.sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe:
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
        yield port
