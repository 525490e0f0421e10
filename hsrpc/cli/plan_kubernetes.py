"""A plan as an overlay of hsrpc's Kubernetes manifests: one kustomization, which `kubectl apply -k` takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path

from hsrpc.config import BUNDLED_MODEL, DeviceKind, EngineConfig, format_bytes, format_rate
from hsrpc.engine.startup import Planned
from hsrpc.errors import ConfigError
from hsrpc.model.hub import model_name
from hsrpc.model.shapes import RANDOM_PREFIX

FILE = "kustomization.yaml"

_GIB, _MIB = 2**30, 2**20
PROCESS_BYTES = {DeviceKind.CUDA: 8 * _GIB, DeviceKind.CPU: 1 * _GIB}
"""Host memory of a GPU's process beside the budgets: the interpreter with torch (0.35 GiB on a CPU), CUDA's libraries
and context, what is packed or converted while loading, requests, and responses that are not read yet. An allowance, not
a measure."""
_CPUS = 8
"""Cores for each GPU: as many threads read and pack weights; serving takes fewer."""
_PIN_RATE = 2e9
"""Bytes a second that CUDA's driver pins."""
_START_SECONDS = 120
"""For what comes beside reading and pinning: imports, calibration, and kernels that are compiled."""
_PATIENCE = 2
"""Times that a start may take as long as it should."""
_PROBE_SECONDS = 5
"""Period of the startup probe in the base."""
_ROLLOUT_SECONDS = 600
"""That a rollout waits on: for a node, for the image and for the volume."""
_LOCAL = "local"
"""Revision of a model that is not the hub's."""
_NOT_FLAGS = ("model", "device", "gpu_memory", "host_memory", "chat_template")
"""Settings that become something else than a flag of their own name and value."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """What a pod needs to make the same plan."""

    planned: Planned
    config: EngineConfig
    """Settings of the plan, with both budgets."""
    read_rate: int
    """Bytes a second that the model is read with."""
    manifests: str
    """Path or URL of hsrpc's manifests, as a kustomization names it."""

    @property
    def num_gpus(self) -> int:
        return self.planned.plan.num_gpus

    @property
    def process_bytes(self) -> int:
        """Host memory beside the budgets, of the processes of all GPUs."""
        return self.num_gpus * PROCESS_BYTES[self.planned.question.machine.kind]

    @property
    def memory(self) -> int:
        """Bytes of the pod, request and limit; on the CPU both budgets come out of it."""
        budgets = self.planned.plan.budgets
        device = budgets.device if self._on_cpu else 0
        return self._host_budget + self.num_gpus * device + self.process_bytes

    @property
    def start_seconds(self) -> int:
        """How long the startup probe waits."""
        read = self.planned.spec.sizes.model_bytes / self.read_rate
        pinned = 0 if self._on_cpu else self.num_gpus * sum(self.planned.plan.host_bytes.values()) / _PIN_RATE
        return math.ceil(_PATIENCE * (_START_SECONDS + read + pinned))

    @property
    def arguments(self) -> list[str]:
        """Flags of the server, beside those of base and components."""
        device, host = self.planned.plan.budgets.device, self._host_budget
        where = ["--device=cpu"] if self._on_cpu else []
        model = [f"--model={self.config.model}"] if self._is_random else []
        sizes = [f"--gpu-memory={_size(device)}", f"--host-memory={_size(host)}"]
        return [*model, *where, *sizes, *_flags(self.config)]

    def text(self) -> str:
        """The kustomization, as YAML."""
        gpu = [] if self._on_cpu else ["gpu", *(["shared-memory"] if self.num_gpus > 1 else [])]
        components = [*gpu, *(["model-volume"] if self._directory else [])]
        lines = [
            *(f"# {' '.join(line.split())}" for line in self._remarks()),  # a folder's name may have anything in it
            "apiVersion: kustomize.config.k8s.io/v1beta1",
            "kind: Kustomization",
            "resources:",
            f"  - {json.dumps(self._named('base'))}",
            *(["components:"] if components else []),
            *(f"  - {json.dumps(self._named(f'components/{name}'))}" for name in components),
            *self._model_map(),
            "patches:",
            "  - target:",
            "      kind: Deployment",
            "      name: hsrpc",
            "    patch: |-",
            *(f"      {line}" for line in self._patch()),
        ]
        return "\n".join(lines) + "\n"

    @property
    def _host_budget(self) -> int:
        """Bytes for all GPUs together, as the setting has it."""
        return int(self.config.host_memory or self.num_gpus * self.planned.plan.budgets.host)

    @property
    def _on_cpu(self) -> bool:
        return self.planned.question.machine.kind is DeviceKind.CPU

    @property
    def _is_random(self) -> bool:
        return self.config.model.startswith(RANDOM_PREFIX)

    @property
    def _directory(self) -> Path | None:
        """The model's, with links followed; None: it is on no volume."""
        directory = self.planned.files.directory
        return None if directory is None or self.config.model == BUNDLED_MODEL else directory.resolve()

    @property
    def _hub_id(self) -> str | None:
        """Name of a model in the hub's cache, org/name; None: it is elsewhere."""
        directory = self._directory
        if directory is None or directory.parent.name != "snapshots":
            return None
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")

    def _named(self, part: str) -> str:
        base, mark, version = self.manifests.partition("?")
        return f"{base.rstrip('/')}/{part}{mark}{version}"

    def _remarks(self) -> Iterator[str]:
        plan, machine, step = self.planned.plan, self.planned.question.machine, self.planned.plan.prediction
        yield f"{self.planned.spec.name} on {machine.name}, by `hsrpc plan --kubernetes`:"
        gpus, count = ("", 1) if self.num_gpus == 1 else (f" on {self.num_gpus} GPUs", self.num_gpus)
        rate = count * step.tokens_per_second
        yield f"{count * step.batch} requests at once{gpus}, {rate:.0f} tokens/s predicted."
        host = ", ".join(f"{use.value} {format_bytes(count * size)}" for use, size in plan.host_bytes.items() if size)
        yield f"Pinned host memory: {host or 'none'}." if not self._on_cpu else f"Host memory: {host or 'none'}."
        budgets = "--gpu-memory, --host-memory" if self._on_cpu else "--host-memory"
        process = "the process" if count == 1 else "the processes"
        yield f"Memory of the pod: {budgets} and {format_bytes(self.process_bytes)} for {process}."
        weights, reads = format_bytes(self.planned.spec.sizes.model_bytes), format_rate(self.read_rate, "B/s")
        yield f"Time to start: {_PATIENCE} times what reading {weights} at {reads}, pinning and compiling should take."
        if self._directory is not None:
            yield "The model is in MODEL_NAME/MODEL_REVISION on the claim hsrpc-models."

    def _model_map(self) -> list[str]:
        """The one place that says which model is on the volume; one of the hub is pinned to its commit."""
        directory, hub_id = self._directory, self._hub_id
        if directory is None:
            return []
        entries = [
            *([] if hub_id is None else [f"MODEL_ID={hub_id}"]),
            f"MODEL_NAME={model_name(directory)}",
            f"MODEL_REVISION={_LOCAL if hub_id is None else directory.name}",
        ]
        literals = (f"      - {json.dumps(entry)}" for entry in entries)
        return ["configMapGenerator:", "  - name: hsrpc-model", "    literals:", *literals]

    def _patch(self) -> Iterator[str]:
        """Operations on the deployment (RFC 6902), as lines of YAML."""
        container = "/spec/template/spec/containers/0"
        for argument in self.arguments:
            yield from _operation("add", f"{container}/args/-", argument)
        if not self._on_cpu:
            yield from _operation("replace", f"{container}/resources/requests/cpu", str(self.num_gpus * _CPUS))
        for kind in ("requests", "limits"):
            if self.num_gpus > 1 and not self._on_cpu:
                yield from _operation("replace", f"{container}/resources/{kind}/nvidia.com~1gpu", self.num_gpus)
            yield from _operation("replace", f"{container}/resources/{kind}/memory", _size(self.memory).rstrip("B"))
        probes = math.ceil(self.start_seconds / _PROBE_SECONDS)
        yield from _operation("replace", f"{container}/startupProbe/failureThreshold", probes)
        seconds = probes * _PROBE_SECONDS + _ROLLOUT_SECONDS
        yield from _operation("replace", "/spec/progressDeadlineSeconds", seconds)


def check_movable(config: EngineConfig) -> None:
    """Check that what the settings name is in a pod too.

    Raises:
        ConfigError: a file of this machine is named.
    """
    if config.chat_template is not None:
        remedy = "leave it out, and mount it in the overlay"
        raise ConfigError("chat_template", config.chat_template, "a file of this machine", remedy)
    if config.model.startswith(RANDOM_PREFIX) and "/" in config.model:
        remedy = "give the model's directory or its id, or a shape by its name"
        raise ConfigError("model", config.model, "a file of this machine", remedy)


def in_whole_mib(config: EngineConfig, planned: Planned) -> EngineConfig:
    """Settings with the GPUs and the budgets of a plan, in units that read well as flags."""
    budgets, gpus = planned.plan.budgets, planned.plan.num_gpus
    whole = {"gpu_memory": budgets.device // _MIB * _MIB, "host_memory": gpus * budgets.host // _MIB * _MIB}
    values = {item.name: getattr(config, item.name) for item in fields(EngineConfig)}
    return EngineConfig(**(values | whole | {"gpus": gpus}))


def seen_from(folder: Path, manifests: str) -> str:
    """Path of the manifests from a folder that an overlay is written to; a URL as it is.

    Raises:
        ConfigError: there are none.
    """
    if "://" in manifests or "?" in manifests:
        return manifests
    if not (Path(manifests) / "base" / FILE).is_file():
        problem = f"there is no base/{FILE} in it"
        raise ConfigError("manifests", manifests, problem, "give k8s/ of a checkout of hsrpc, or its URL for kustomize")
    return os.path.relpath(Path(manifests).resolve(), folder.resolve())


def write(text: str, folder: Path) -> Path:
    """Write a kustomization into a folder, which is made where it is not there; the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output", str(folder), f"cannot be written ({error.strerror})", "give another") from None
    return folder / FILE


def _operation(kind: str, path: str, value: str | int) -> Iterator[str]:
    yield f"- op: {kind}"
    yield f"  path: {path}"
    yield f"  value: {json.dumps(value)}"


def _size(size: int) -> str:
    """Bytes as a flag has them: whole GiB where they are, else MiB."""
    return f"{size // _GIB}GiB" if size % _GIB == 0 else f"{size // _MIB}MiB"


def _flags(config: EngineConfig) -> Iterator[str]:
    """Flags of the settings that are not as by default."""
    for item in fields(EngineConfig):
        value = getattr(config, item.name)
        if item.name in _NOT_FLAGS or value == item.default:
            continue
        name = f"--{item.name.replace('_', '-')}"
        yield name if value is True else f"{name}={value.value if isinstance(value, Enum) else value}"
