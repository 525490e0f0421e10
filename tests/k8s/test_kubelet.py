"""The model of a kubelet and of a pod's environment, by itself: with it the pod contract stands or falls."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.kubelet import PodError, start
from tests.k8s.pod import Cluster, Container, Place, Pod, UnknownError
from tests.k8s.rendering import Manifest

HANDLES = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True); "
LASTS = "time.sleep(60)"


def container(folder: Path, code: str, name: str = "main", **spec: Any) -> Container:
    """A container that runs Python code."""
    return Container(
        name=name,
        command=[sys.executable, "-c", code],
        env={},
        folder=folder,
        memory=None,
        restarts=True,
        place=Place({}, {}),
        spec=spec,
    )


async def until_up(folder: Path, name: str = "main") -> None:
    while "up" not in (folder / f"{name}.log").read_text():  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.02)


async def test_a_signal_that_is_not_handled_does_nothing(tmp_path):
    """The first process of a container is killed at the end of the grace period, as in a cluster."""
    code = "import time; print('up', flush=True); " + LASTS
    async with start(Pod([], [container(tmp_path, code)], grace=0.0, left_out=[])) as running:
        await until_up(tmp_path)
        [ended] = await running.delete()
    assert ended.code == 128 + signal.SIGKILL
    assert ended.seconds >= 2  # SIGKILL comes no sooner


async def test_hooks_run_before_the_signal_and_sidecars_end_last(tmp_path):
    """preStop within the grace period, SIGTERM, then the sidecars in their order from the last."""
    hook = {"exec": {"command": ["/bin/sh", "-c", f"sleep 0.1; date +%s%N > {tmp_path}/hook"]}}
    code = f"import time; f = lambda *_: (open('{tmp_path}/term', 'w').write(str(time.time_ns())), sys.exit(0)); "
    code += "import signal, sys; signal.signal(signal.SIGTERM, f); print('up', flush=True); " + LASTS
    main = container(tmp_path, code, lifecycle={"preStop": hook})
    sidecars = [container(tmp_path, HANDLES + LASTS, name) for name in ("first", "second")]
    async with start(Pod(sidecars, [main], grace=10.0, left_out=[])) as running:
        for name in ("main", "first", "second"):
            await until_up(tmp_path, name)
        ended = await running.delete()
    assert [(each.name, each.code) for each in ended] == [("main", 0), ("second", 0), ("first", 0)]
    assert int((tmp_path / "hook").read_text()) < int((tmp_path / "term").read_text())


@pytest.mark.parametrize("restarts", [True, False])
async def test_an_end_that_nobody_asked_for(restarts, tmp_path):
    """A failure where the container would be started again; the completion of a job, where not."""
    ends = container(tmp_path, "print('all done')")
    job = Container(**{name: getattr(ends, name) for name in ends.__slots__} | {"restarts": restarts})
    async with start(Pod([], [job], grace=1.0, left_out=[])) as running:
        if restarts:
            with pytest.raises(PodError, match=r"(?s)main: exited with 0\n.*all done"):
                await running.completion(20)
        else:
            [ended] = await running.completion(20)
            assert (ended.code, ended.log) == (0, "all done")


def template(**more: Any) -> Manifest:
    spec = {"name": "server", "image": "hsrpc:1-cpu", **more.pop("container", {})}
    return {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [spec], **more}}


def test_arguments_and_environment_are_resolved(tmp_path):
    """Variables from fields, limits, maps and secrets; references in order; paths and ports moved, and nothing else."""
    env = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "MIB", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "key"}}},
        {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "x", "optional": True}}},
        {"name": "BOTH", "value": "$(NAME)-$(PREFIX_one)-$$(NAME)-$(LATER)"},
        {"name": "LATER", "value": "/data/models/$(NAME)"},
    ]
    spec = {
        "args": [
            "--model=$(LATER)",
            "--metrics-port=9090",
            "--port",
            "50051",
            "--target=localhost:9090",
            "--x=/database",
        ],
        "env": env,
        "envFrom": [{"configMapRef": {"name": "map"}, "prefix": "PREFIX_"}],
        "resources": {"limits": {"memory": "1.5Gi"}},
        "volumeMounts": [
            {"name": "data", "mountPath": "/data", "subPath": "sub"},
            {"name": "map", "mountPath": "/etc/map"},
        ],
    }
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": "claim"}},
        {"name": "map", "configMap": {"name": "map", "items": [{"key": "one", "path": "a/b"}]}},
    ]
    manifests = [
        {"kind": "ConfigMap", "metadata": {"name": "map"}, "data": {"one": "1"}},
        {"kind": "Secret", "metadata": {"name": "secret"}, "data": {"key": "a2V5"}},
    ]
    cluster = Cluster(manifests, tmp_path, claims={"claim": tmp_path / "claim"})
    [made] = cluster.pod(template(container=spec, volumes=volumes)).containers
    env = made.env
    assert [env[name] for name in ("NAME", "APP", "MIB", "KEY", "BOTH")] == [
        "hsrpc-0",
        "x",
        "1536",
        "key",
        "hsrpc-0-1-$(NAME)-$(LATER)",
    ]
    assert "NONE" not in env
    data, port, metrics = tmp_path / "claim/sub", made.port(50051), made.port(9090)
    assert env["LATER"] == f"{data}/models/hsrpc-0"
    assert made.command == [
        *("hsrpc", "serve", "--host", "0.0.0.0", f"--model={data}/models/hsrpc-0", f"--metrics-port={metrics}"),
        *("--port", str(port), f"--target=localhost:{metrics}", "--x=/database"),
    ]
    assert (made.place.paths["/etc/map"] / "a/b").read_text() == "1"
    assert made.memory == 1536 * 2**20
    assert len({port, metrics, 50051, 9090}) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"container": {"stdin": True}}, "container server has .*stdin"),
        ({"volumes": [{"name": "x", "persistentVolumeClaim": {"claimName": "y"}}]}, "claim y"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "volume x of kind hostPath"),
        ({"container": {"envFrom": [{"secretRef": {"name": "gone"}}]}}, "Secret gone is not among"),
        ({"initContainers": [{"name": "once", "image": "x"}]}, "init containers that run to their end: .*once"),
    ],
)
def test_what_the_model_does_not_know_is_refused(more, words, tmp_path):
    """It never leaves something out in silence."""
    with pytest.raises(UnknownError, match=words):
        Cluster([], tmp_path).pod(template(**more))


def test_other_images_are_left_out_by_name(tmp_path):
    """What is not this repository's cannot be started here, and a test may say which."""
    sidecar = {"name": "proxy", "image": "envoy:1", "restartPolicy": "Always"}
    pod = Cluster([], tmp_path).pod(template(initContainers=[sidecar]))
    assert (pod.left_out, [each.name for each in pod.containers]) == (["proxy"], ["server"])
