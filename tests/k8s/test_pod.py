"""The pod contract: what the manifests start, started here, probed and ended as the kubelet would.

Every overlay that needs no GPU, with exactly its command, arguments and environment; `Place` is the one difference.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from hsrpc.client import AsyncClient, CallError
from tests.k8s.kubelet import PodError, RunningPod, start
from tests.k8s.manifests import OVERLAYS, Manifest, needs_gpu, of_kind, pod_spec, render
from tests.k8s.pod import Cluster, Pod

PORT = 50051
PROMPT = "Once upon a time"
Patch = Callable[[Manifest], None]
"""Changes the specification of the pod."""


def deployments() -> dict[str, Manifest]:
    """Those that need no GPU, by overlay."""
    found = {
        folder.name: deployment
        for folder in sorted(OVERLAYS.iterdir())
        for deployment in of_kind(render(folder), "Deployment")
    }
    return {name: deployment for name, deployment in found.items() if not needs_gpu(deployment)}


def pod_of(overlay: str, folder: Path, *patches: Patch) -> Pod:
    """The pod of an overlay's Deployment, after changes to its specification."""
    manifests = render(OVERLAYS / overlay)
    [deployment] = of_kind(manifests, "Deployment")
    for patch in patches:
        patch(pod_spec(deployment))
    return Cluster(manifests, folder).pod(deployment["spec"]["template"])


def server(spec: Manifest) -> Manifest:
    [container] = [each for each in spec["containers"] if each["name"] == "server"]
    return container


class Traffic:
    """Streams by the real client, one after the other, until the pod takes no more."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.running = 0
        self.whole = 0
        """Streams that came to their end."""
        self.refused = 0
        self.broken: list[CallError] = []

    async def flow(self, tokens: int) -> None:
        """Stream so many tokens each time, until a new call is refused, or one breaks."""
        while not self.refused and not self.broken:
            begun = False
            try:
                async for _ in self.client.generate(PROMPT, ignore_eos=True, max_tokens=tokens):
                    self.running += not begun
                    begun = True
                self.whole += 1
            except CallError as error:
                if begun:
                    self.broken.append(error)
                elif error.code is grpc.StatusCode.UNAVAILABLE:
                    self.refused += 1
                else:
                    raise
            finally:
                self.running -= begun


@asynccontextmanager
async def traffic(running: RunningPod, streams: int) -> AsyncIterator[Traffic]:
    """Streams of different lengths, all under way; left when all have ended."""
    async with AsyncClient(running.address(PORT)) as client, asyncio.TaskGroup() as group:
        flowing = Traffic(client)
        for number in range(streams):
            group.create_task(flowing.flow(240 + 200 * number // streams))
        while flowing.running < streams:
            running.check()
            await asyncio.sleep(0.01)
        yield flowing


@pytest.mark.parametrize("overlay", deployments())
async def test_a_pod_serves_and_ends_as_its_manifest_says(overlay, tmp_path):
    """Ready by its probes; streams run on past SIGTERM to their ends, others are refused; 0 within the grace period."""
    pod = pod_of(overlay, tmp_path)
    async with start(pod) as running:
        await running.ready(60)
        assert await running.answers_ready()
        async with traffic(running, 4) as flowing:
            deletion = asyncio.create_task(running.delete())
            await running.terminated()
            await running.unready(2)
            assert flowing.running, "it drained before it was asked"
            ended = await deletion
        assert flowing.broken == []
        assert flowing.refused > 0
        assert flowing.whole >= 4
        assert [each.code for each in ended] == [0] * (len(pod.containers) + len(pod.sidecars)), ended
        assert max(each.seconds for each in ended) < pod.grace
        for container in (*pod.containers, *pod.sidecars):
            assert container.memory is None or 0 < running.peak_memory[container.name] < container.memory


def misspelt_flag(spec: Manifest) -> None:
    server(spec)["args"].append("--host-memroy=512MiB")


def missing_file(spec: Manifest) -> None:
    server(spec)["args"].append("--config=/settings/hsrpc.toml")


def service_links(spec: Manifest) -> None:
    """A Service named hsrpc puts HSRPC_PORT=tcp://... into its pods, as Kubernetes does unless told not to."""
    del spec["enableServiceLinks"]


def wrong_startup_service(spec: Manifest) -> None:
    server(spec)["startupProbe"] |= {"periodSeconds": 1, "failureThreshold": 3}
    server(spec)["startupProbe"]["grpc"]["service"] = "hsrpc.v1.Generation"


def wrong_liveness_service(spec: Manifest) -> None:
    quick(spec)
    server(spec)["livenessProbe"] |= {"periodSeconds": 1, "failureThreshold": 2}
    server(spec)["livenessProbe"]["grpc"]["service"] = "hsrpc"
    server(spec)["readinessProbe"]["initialDelaySeconds"] = 60


def little_memory(spec: Manifest) -> None:
    server(spec)["resources"]["limits"]["memory"] = "100Mi"


def quick(spec: Manifest) -> None:
    """Ask more often than in a cluster, so that a test is over sooner."""
    for kind in ("startupProbe", "readinessProbe"):
        server(spec)[kind]["periodSeconds"] = 1


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (misspelt_flag, "exited with 2\n.*unrecognized arguments: --host-memroy=512MiB"),
        (missing_file, "exited with 2\n.*/settings/hsrpc.toml: No such file"),
        (service_links, "exited with 2\n.*HSRPC_PORT = 'tcp://"),
        (little_memory, "OOMKilled: [0-9]+ bytes, and the limit is 104857600"),
        (wrong_startup_service, "startup probe failed 3 times, 1 s apart"),
        (wrong_liveness_service, "liveness probe failed 2 times, 1 s apart"),
    ],
)
async def test_what_is_wrong_with_a_pod_is_found(patch, words, tmp_path):
    """Each mistake in the manifest of cpu-demo keeps the pod from being ready, and the reason is told."""
    with pytest.raises(PodError, match=f"(?s){words}"):
        async with start(pod_of("cpu-demo", tmp_path, patch)) as running:
            await running.ready(60)


async def test_a_readiness_probe_that_asks_for_something_else_is_found(tmp_path):
    """The server is there and takes requests, and the pod is never ready."""

    def patch(spec: Manifest) -> None:
        quick(spec)
        server(spec)["readinessProbe"]["grpc"]["service"] = "hsrpc.v1.GenerationServices"

    async with start(pod_of("cpu-demo", tmp_path, patch)) as running:
        async with AsyncClient(running.address(PORT)) as client:
            await client.wait_ready(60)
        with pytest.raises(PodError, match="server: is not ready after 3 s"):
            await running.ready(3)


def short_grace(spec: Manifest) -> None:
    quick(spec)
    spec["terminationGracePeriodSeconds"] = 1
    server(spec)["lifecycle"]["preStop"]["sleep"]["seconds"] = 1


async def test_a_grace_period_that_is_too_short_is_found(tmp_path):
    """The pod is killed while it drains: its streams break, and its exit is that of SIGKILL."""
    async with start(pod_of("cpu-demo", tmp_path, short_grace)) as running:
        await running.ready(60)
        async with traffic(running, 32) as flowing:
            [ended] = await running.delete()
    assert ended.code == 128 + signal.SIGKILL
    assert flowing.broken


async def test_a_drain_that_is_shorter_than_its_streams_is_found(tmp_path):
    """Streams that do not end within --shutdown-timeout break, and the streams tell."""

    def hasty(spec: Manifest) -> None:
        quick(spec)
        server(spec)["args"].append("--shutdown-timeout=0")
        server(spec)["lifecycle"]["preStop"]["sleep"]["seconds"] = 0

    async with start(pod_of("cpu-demo", tmp_path, hasty)) as running:
        await running.ready(60)
        async with traffic(running, 8) as flowing:
            await running.delete()
    assert flowing.broken
