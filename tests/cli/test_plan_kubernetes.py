"""hsrpc plan --kubernetes: an overlay that renders, starts, and makes the plan that was printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hsrpc.cli.main import build_parser
from hsrpc.cli.options import engine_config
from hsrpc.cli.plan_kubernetes import PROCESS_BYTES
from hsrpc.config import BUNDLED_MODEL, DeviceKind, parse_bytes
from hsrpc.engine.startup import plan_for
from hsrpc.plan.known_machines import find_machine
from tests.k8s.kubelet import start
from tests.k8s.pod import Cluster, Container
from tests.k8s.rendering import K8S, ROOT, Manifest, bytes_of, find, kustomize, pod_of, rendered

KUBERNETES = "1.30"
ELSEWHERE = ("--hardware=rtx3090", "--gpu-memory=3GiB", "--host-memory=16GiB", "--max-batch=16", "--max-model-len=1024")
SHAPE = ("--model=random:opt-1.3b", *ELSEWHERE)
HERE = ("--device=cpu", "--gpu-memory=64MiB", "--host-memory=96MiB", "--max-model-len=128")


@pytest.fixture
def overlay(hsrpc, tmp_path):
    """Writes the overlay of a plan, and renders it: `overlay("--model=...")`."""

    def make(*options: str) -> list[Manifest]:
        ran = hsrpc("plan", *options, "--kubernetes", f"--manifests={K8S}", f"--output={tmp_path / 'overlay'}")
        assert (ran.code, ran.out) == (0, ""), ran.err
        assert ran.err.endswith(
            f"saved {tmp_path}/overlay/kustomization.yaml; next: kubectl apply -k {tmp_path}/overlay\n"
        )
        return kustomize(tmp_path / "overlay")

    return make


def container_of(manifests: list[Manifest], folder: Path, **claims: Path) -> Container:
    deployment = find(manifests, "Deployment")
    named = {name.replace("_", "-"): path for name, path in claims.items()}
    [container] = Cluster(manifests, folder, named).pod(deployment["spec"]["template"]).containers
    return container


def planned_in(container: Container, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of the pod's server, on the machine that was planned for."""
    for name, value in container.env.items():
        if name.startswith("HSRPC_"):
            monkeypatch.setenv(name, value)
    options = build_parser().parse_args(container.command[1:])
    return plan_for(find_machine("rtx3090"), engine_config(options)).plan


def printed(hsrpc, *options: str) -> Any:
    return json.loads(hsrpc("plan", *options, "--json", "--no-advice").out)


def assert_same(plan: Any, found: dict[str, Any]) -> None:
    """The plan of a pod is the one that was printed."""
    assert {use.value: size for use, size in plan.device_bytes.items()} == found["device_bytes"]
    assert {use.value: size for use, size in plan.host_bytes.items()} == found["host_bytes"]
    assert plan.max_model_len == found["max_model_len"]
    assert plan.prediction.tokens_per_second == pytest.approx(found["prediction"]["tokens_per_second"])


def test_a_pod_makes_the_plan_that_is_printed(hsrpc, overlay, tmp_path, monkeypatch):
    """Its flags parse by the server's own parser, those that were given beside the budgets among them."""
    options = (*SHAPE, "--cache-policy=kv", "--expected-context=512", "--weight-coding=none")
    container = container_of(overlay(*options), tmp_path)
    assert {"--cache-policy=kv", "--expected-context=512", "--weight-coding=none"} <= set(container.command)
    assert_same(planned_in(container, monkeypatch), printed(hsrpc, *options))


def test_the_manifests_are_valid_and_ask_for_what_the_plan_takes(overlay):
    """One GPU; as much memory requested as allowed, for the pinned pools and the process; time to read the model."""
    manifests = overlay(*SHAPE, "--read-rate=10MB")
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    deployment = find(manifests, "Deployment")
    [server] = pod_of(deployment)["containers"]
    requests, limits = server["resources"]["requests"], server["resources"]["limits"]
    assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == 1
    assert requests["memory"] == limits["memory"] == "24Gi"
    assert requests["cpu"] == "8"
    seconds = server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"]
    assert 2 * 2.6e9 / 10e6 < seconds < 2 * 2.6e9 / 10e6 + 300
    assert deployment["spec"]["progressDeadlineSeconds"] > seconds


def test_several_gpus_are_of_one_pod(hsrpc, overlay, tmp_path, monkeypatch):
    """As many as are planned for: memory for all of their budgets and processes, and what these share."""
    options = (*SHAPE, "--gpus=2")
    manifests = overlay(*options)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    [server] = pod_of(find(manifests, "Deployment"))["containers"]
    requests, limits = server["resources"]["requests"], server["resources"]["limits"]
    assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == 2
    assert (requests["cpu"], requests["memory"], limits["memory"]) == ("16", "32Gi", "32Gi")
    assert "/dev/shm" in {mount["mountPath"] for mount in server["volumeMounts"]}
    container = container_of(manifests, tmp_path)
    assert {"--gpus=2", "--host-memory=16GiB", "--gpu-memory=3GiB"} <= set(container.command)
    plan = planned_in(container, monkeypatch)
    assert plan.num_gpus == 2
    assert_same(plan, printed(hsrpc, *options))


def test_defaults_become_numbers_that_a_pod_finds_everywhere(hsrpc, overlay, tmp_path, monkeypatch):
    """Shares of what is free are of another node's; whole MiB stand in their place, for the same plan."""
    container = container_of(overlay(*SHAPE[:2], *SHAPE[4:]), tmp_path)
    [device] = [word for word in container.command if word.startswith("--gpu-memory=")]
    [host] = [word for word in container.command if word.startswith("--host-memory=")]
    assert (device, host) == ("--gpu-memory=21196MiB", "--host-memory=52428MiB")
    plan = planned_in(container, monkeypatch)
    assert (plan.budgets.device, plan.budgets.host) == (21196 * 2**20, 52428 * 2**20)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("place", "entries"),
    [
        ("stories", {"MODEL_NAME": "stories", "MODEL_REVISION": "local"}),
        ("two\nlines: 1", {"MODEL_NAME": "two\nlines: 1", "MODEL_REVISION": "local"}),
        (
            f"hub/models--org--Tales/snapshots/{COMMIT}",
            {"MODEL_ID": "org/Tales", "MODEL_NAME": "Tales", "MODEL_REVISION": COMMIT},
        ),
    ],
    ids=["directory", "odd", "hub"],
)
def test_a_model_on_a_volume(place, entries, hsrpc, overlay, tmp_path, monkeypatch):
    """Mounted where the server reads it, in a folder of its name; a model of the hub is pinned to its commit."""
    model, volume = tmp_path / place, tmp_path / "volume"
    on_volume = volume / entries["MODEL_NAME"] / entries["MODEL_REVISION"]
    shutil.copytree(BUNDLED_MODEL, model)
    shutil.copytree(BUNDLED_MODEL, on_volume)
    options = (f"--model={model}", *ELSEWHERE, "--max-model-len=256")
    manifests = overlay(*options)
    assert [each["data"] for each in manifests if each["kind"] == "ConfigMap"] == [entries]
    container = container_of(manifests, tmp_path, hsrpc_models=volume)
    assert f"--model={on_volume}" in container.command
    assert_same(planned_in(container, monkeypatch), printed(hsrpc, *options))


async def test_the_pod_of_a_plan_for_the_cpu_starts(hsrpc, overlay, tmp_path):
    """Without a GPU, with memory for both budgets and the process; it becomes ready here, within that memory."""
    manifests = overlay(*HERE)
    deployment = find(manifests, "Deployment")
    [server] = pod_of(deployment)["containers"]
    assert server["resources"]["limits"] == {"memory": "1184Mi"}
    server["startupProbe"]["periodSeconds"] = server["readinessProbe"]["periodSeconds"] = 1
    async with start(Cluster(manifests, tmp_path).pod(deployment["spec"]["template"])) as running:
        await running.ready(60)
        assert 0 < running.peak_memory["server"] < 1184 * 2**20


def test_on_standard_output_it_is_one_kustomization(hsrpc, monkeypatch):
    """For a folder beside the manifests' own overlays, with what it says in front; nothing else is printed."""
    monkeypatch.chdir(ROOT)
    ran = hsrpc("plan", *SHAPE, "--kubernetes")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(
        "# opt-1.3b on NVIDIA RTX 3090 (by its datasheet, not measured), by `hsrpc plan --kubernetes`:\n"
    )
    [kustomization] = yaml.safe_load_all(ran.out)
    assert kustomization["resources"] == ["../../base"]
    assert kustomization["components"] == ["../../components/gpu"]
    folder = K8S / "overlays/cpu-demo"
    assert all((folder / named / "kustomization.yaml").is_file() for named in ("../../base", "../../components/gpu"))


def test_manifests_elsewhere(hsrpc):
    """A URL is given on as kustomize takes it, its version behind."""
    ran = hsrpc("plan", *SHAPE, "--kubernetes", "--manifests=https://git.example.com/hsrpc//k8s?ref=v0.2.0")
    assert yaml.safe_load(ran.out)["resources"] == ["https://git.example.com/hsrpc//k8s/base?ref=v0.2.0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output=x",), "output='x': has no meaning without --kubernetes"),
        (
            ("--kubernetes", "--manifests=/none"),
            "manifests='/none': there is no base/kustomization.yaml in it; give k8s/",
        ),
        (("--kubernetes", f"--manifests={K8S}", "--read-rate=fast"), "read_rate='fast': not a positive size in bytes"),
        (
            ("--kubernetes", f"--manifests={K8S}", "--chat-template=a.jinja"),
            "chat_template='a.jinja': a file of this machine",
        ),
        (
            ("--kubernetes", f"--manifests={K8S}", "--model=random:./config.json"),
            "model='random:./config.json': a file of",
        ),
        (("--kubernetes", f"--manifests={K8S}", "--output=/proc/none"), "output='/proc/none': cannot be written"),
    ],
)
def test_what_cannot_be_an_overlay(hsrpc, options, words):
    """One line that names the setting, and a remedy."""
    ran = hsrpc("plan", *SHAPE, *options)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"hsrpc: error: {words}")


def test_help_has_an_example(hsrpc):
    """Whose overlay is named as kubectl takes it."""
    out = hsrpc("plan", "--help").out
    assert "--kubernetes --output deploy" in out
    assert "kubectl apply -k deploy" in out


@pytest.mark.parametrize("name", ["single-gpu", "two-gpu", "two-replicas"])
def test_the_overlays_give_the_process_as_much(name):
    """What stands in the manifests by hand is the sum that a plan makes."""
    [server] = pod_of(find(rendered(f"overlays/{name}"), "Deployment"))["containers"]
    [budget] = [word.partition("=")[2] for word in server["args"] if word.startswith("--host-memory=")]
    limits = server["resources"]["limits"]
    processes = limits["nvidia.com/gpu"] * PROCESS_BYTES[DeviceKind.CUDA]
    assert bytes_of(limits["memory"]) == parse_bytes(budget, "host_memory") + processes
