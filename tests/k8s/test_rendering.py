"""Kustomizations: all of them are rendered by these tests, and no file is forgotten."""

from __future__ import annotations

import pytest
import yaml

from hsrpc.cli.plan_kubernetes import PROCESS_BYTES
from hsrpc.config import DeviceKind
from tests.k8s.rendering import (
    ALONE,
    COMPONENTS,
    K8S,
    NAMES,
    ON_THE_BASE,
    bytes_of,
    compose,
    find,
    kustomize,
    rendered,
    title,
)

KUSTOMIZATIONS = sorted(K8S.rglob("kustomization.yaml"))


def test_every_component_is_in_an_overlay_of_the_tests():
    """Or is one by itself."""
    assert {name for names in ON_THE_BASE.values() for name in names} | set(ALONE) == {
        folder.name for folder in COMPONENTS.iterdir()
    }


def test_every_file_is_named_by_its_kustomization():
    """None is forgotten, and what is named is there, which kustomize checks."""
    named = set()
    for file in KUSTOMIZATIONS:
        kustomization = yaml.safe_load(file.read_text())
        names = [*kustomization.get("resources", []), *(each["path"] for each in kustomization.get("patches", []))]
        names += [name for made in kustomization.get("configMapGenerator", []) for name in made.get("files", [])]
        named |= {(file.parent / name.rpartition("=")[2]).resolve() for name in names}
    files = {file for file in K8S.rglob("*") if file.is_file() and file.suffix != ".md"}
    assert files - set(KUSTOMIZATIONS) - named == set()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_unique(name):
    """Kubernetes takes one object of a kind and name."""
    titles = [title(manifest) for manifest in rendered(name)]
    assert len(titles) == len(set(titles)) > 0


def test_the_base_needs_no_gpu():
    """Nor does a server that is not given the component."""
    assert "nvidia" not in str(rendered("base"))
    assert "cuda" not in str(rendered("overlays/cpu-demo"))


@pytest.mark.parametrize(("name", "replicas", "gpus"), [("two-gpu", 1, 2), ("two-replicas", 2, 1)])
def test_two_gpus_are_one_server_or_two(name, replicas, gpus):
    """One server shares its stream of weights between all that its pod has; replicas have one each."""
    deployment = find(rendered(f"overlays/{name}"), "Deployment")
    [server] = deployment["spec"]["template"]["spec"]["containers"]
    resources = server["resources"]
    assert deployment["spec"]["replicas"] == replicas
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == gpus
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert ("--gpus=all" in server["args"]) == (gpus > 1)


def test_processes_of_several_gpus_share_memory():
    """As much as they may need where GPUs do not reach each other, within the container's limit."""
    pod = find(rendered("overlays/two-gpu"), "Deployment")["spec"]["template"]["spec"]
    [server] = pod["containers"]
    [name] = [mount["name"] for mount in server["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    [volume] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name]
    assert volume["medium"] == "Memory"
    assert 64 * 2**20 < bytes_of(volume["sizeLimit"]) < PROCESS_BYTES[DeviceKind.CUDA]


def test_one_config_map_says_which_model():
    """Another revision is another name of the config map, so pods are replaced; the download has the same one."""
    change = {"name": "hsrpc-model", "behavior": "merge", "literals": ["MODEL_REVISION=another"]}
    server, download = (kustomize(K8S / "overlays/single-gpu" / part) for part in ("", "download"))
    [before] = (title(each) for each in server if each["kind"] == "ConfigMap")
    assert before in {title(each) for each in download}
    changed = compose(base=K8S / "overlays/single-gpu", generators=[change])
    [after] = (each for each in changed if each["kind"] == "ConfigMap")
    assert title(after) != before
    [server_container] = find(changed, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server_container["envFrom"] == [{"configMapRef": {"name": after["metadata"]["name"]}}]
