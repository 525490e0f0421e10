"""The pod contract: what the manifests start, started here, probed and ended as the kubelet would.

Every overlay that needs no GPU, with exactly its command, arguments and environment; `Place` is the one difference.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import trustme

from hsrpc.client import NO_RETRIES, AsyncClient, CallError
from tests.k8s.kubelet import PodError, RunningPod, start
from tests.k8s.pod import Cluster, Pod
from tests.k8s.rendering import COMPONENTS, K8S, Manifest, compose, find, overlays, pod_of, rendered, title

PORT, OPENAI_PORT = 50051, 8000
PROMPT = "Once upon a time"
TOKEN = "a-token-that-is-long-enough-for-the-server"
COMPOSED: Mapping[str, Sequence[str]] = {
    "openai": ("openai",),
    "every-lock": ("tls", "mutual-tls", "auth"),
    "envoy": ("envoy",),
}
"""Components on cpu-demo, in overlays of these tests."""

Patch = Callable[[Manifest], None]
"""Changes the specification of the pod."""


def needs_gpu(workload: Manifest) -> bool:
    """Whether its pods start on nodes with a GPU alone: of the device plugin, or by dynamic resource allocation."""
    return any(claim in str(workload["spec"]) for claim in ("nvidia.com/gpu", "resourceClaims"))


def overlays_without_gpu() -> list[str]:
    """Overlays whose servers start anywhere."""
    with_servers = [name for name in overlays() if "Deployment/hsrpc" in map(title, rendered(name))]
    return [name for name in with_servers if not needs_gpu(find(rendered(name), "Deployment"))]


def pod(name: str, folder: Path, *patches: Patch, more: Sequence[Manifest] = ()) -> Pod:
    """The server's pod of an overlay, after changes to its specification; `more`: what else is in its namespace."""
    if name in COMPOSED:
        manifests = compose(*(COMPONENTS / each for each in COMPOSED[name]), base=K8S / "overlays/cpu-demo")
    else:
        manifests = rendered(name)
    deployment = find(manifests, "Deployment")
    for patch in patches:
        patch(pod_of(deployment))
    return Cluster([*manifests, *more], folder).pod(deployment["spec"]["template"])


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
async def traffic(running: RunningPod, streams: int, **connection: Any) -> AsyncIterator[Traffic]:
    """Streams of different lengths, all under way; left when all have ended. `connection`: of the client.

    Refusals are not tried again: they are to be seen, and there is no other pod.
    """
    client = AsyncClient(running.address(PORT), options=NO_RETRIES, **connection)
    async with client, asyncio.TaskGroup() as group:
        flowing = Traffic(client)
        for number in range(streams):
            group.create_task(flowing.flow(240 + 200 * number // streams))
        while flowing.running < streams:
            running.check()
            await asyncio.sleep(0.01)
        yield flowing


async def check_drain(running: RunningPod, **connection: Any) -> None:
    """Delete a pod under streams: they run on past SIGTERM to their ends, others are refused, and it ends with 0."""
    assert await running.answers_ready()
    async with traffic(running, 4, **connection) as flowing:
        deletion = asyncio.create_task(running.delete())
        await running.terminated()
        await running.unready(2)
        assert flowing.running, "it drained before it was asked"
        ended = await deletion
    assert flowing.broken == []
    assert flowing.refused > 0
    assert flowing.whole >= 4
    assert [each.code for each in ended] == [0] * len(ended), ended
    assert max(each.seconds for each in ended) < running.pod.grace
    for container in (*running.pod.containers, *running.pod.sidecars):
        assert container.memory is None or 0 < running.peak_memory[container.name] < container.memory


@pytest.mark.parametrize("overlay", overlays_without_gpu())
async def test_a_pod_serves_and_ends_as_its_manifest_says(overlay, tmp_path):
    """Every overlay that needs no GPU, as it is: ready by its probes, and drained within its grace period."""
    made = pod(overlay, tmp_path)
    assert made.left_out == []
    async with start(made) as running:
        await running.ready(60)
        await check_drain(running)


async def test_locks_that_clients_have_keys_for(tmp_path):
    """TLS both ways and tokens, from secrets: probes go by the health port, and streams drain as without."""
    authority = trustme.CA()
    mine, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("client")
    chain, key, root = mine.cert_chain_pems[0], mine.private_key_pem, authority.cert_pem
    files = {"tls.crt": chain, "tls.key": key, "ca.crt": root}
    tls = {name: base64.b64encode(pem.bytes()).decode() for name, pem in files.items()}
    secrets = [
        {"kind": "Secret", "metadata": {"name": "hsrpc-tls"}, "data": tls},
        {"kind": "Secret", "metadata": {"name": "hsrpc-auth"}, "stringData": {"tokens": f"someone {TOKEN}\n"}},
    ]
    own = {"tls_ca": root, "tls_cert": client.cert_chain_pems[0], "tls_key": client.private_key_pem}
    keys = {name: tmp_path / f"{name}.pem" for name in own}
    for name, pem in own.items():
        pem.write_to_path(str(keys[name]))
    async with start(pod("every-lock", tmp_path, quick, no_pause, more=secrets)) as running:
        await running.ready(60)
        async with AsyncClient(running.address(PORT), tls_ca=keys["tls_ca"], token=TOKEN) as stranger:
            with pytest.raises(CallError):
                await stranger.complete(PROMPT, max_tokens=1)
        await check_drain(running, **keys, token=TOKEN)


async def test_the_openai_port_streams_past_sigterm(tmp_path):
    """The gateway that the server runs beside itself is ready with it, and a stream of it ends whole."""
    async with start(pod("openai", tmp_path, quick, no_pause)) as running:
        await running.ready(60)
        url = f"http://{running.address(OPENAI_PORT)}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            [model] = (await client.models.list()).data
            stream = await client.completions.create(
                model=model.id, prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            first = await anext(stream)
            deletion = asyncio.create_task(running.delete())
            rest = [chunk async for chunk in stream]
        [ended] = await deletion
    assert first.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in rest if chunk.choices][-1] == "length"
    assert ended.code == 0


def test_sidecars_of_other_images_are_named(tmp_path):
    """Envoy is no part of this repository: its pod is looked at by schema and by its configuration alone."""
    assert pod("envoy", tmp_path).left_out == ["envoy"]


def batch_volume(folder: Path, requests: int, tokens: int) -> Path:
    """A volume with a file of requests."""
    folder.mkdir()
    body = {"model": "storyteller", "prompt": PROMPT, "max_tokens": tokens, "seed": 1}
    request = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = [json.dumps({"custom_id": str(number), **request}) for number in range(requests)]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    return folder


def batch_pods(volume: Path, folder: Path) -> list[Pod]:
    """The pods of the component batch on the bundled model, with sizes as an overlay gives them."""
    manifests = rendered("batch")
    job = find(manifests, "Job", "hsrpc-batch")
    [container] = pod_of(job)["containers"]
    container["args"] += ["--device=cpu", "--gpu-memory=64MiB", "--host-memory=64MiB", "--max-model-len=384"]
    return Cluster(manifests, folder, claims={"hsrpc-batch": volume}).pods(job)


def answered(volume: Path) -> list[int]:
    """Numbers of the requests that have answers, all of them good."""
    answers = [json.loads(line) for file in volume.glob("answers-?.jsonl") for line in file.read_text().splitlines()]
    assert {answer["response"]["status_code"] for answer in answers} <= {200}
    return sorted(int(answer["custom_id"]) for answer in answers)


async def test_a_job_answers_a_file_of_requests(tmp_path):
    """Each index its share of the lines, on the bundled model: an answer to each request, and no faults."""
    volume = batch_volume(tmp_path / "volume", requests=7, tokens=5)
    pods = batch_pods(volume, tmp_path)
    assert len(pods) == 2
    for each in pods:
        async with start(each) as running:
            await running.completion(120)
    assert answered(volume) == list(range(7))


async def test_a_job_s_pod_that_has_to_leave_goes_on_elsewhere(tmp_path):
    """It ends by SIGTERM, with what is done written; the next one does the rest, and nothing twice."""
    volume = batch_volume(tmp_path / "volume", requests=120, tokens=120)
    async with start(batch_pods(volume, tmp_path)[0]) as running:
        while not answered(volume):
            running.check()
            await asyncio.sleep(0.05)
        [ended] = await running.delete()
    assert ended.code == 128 + signal.SIGINT
    assert "goes on with the rest" in ended.log
    done = answered(volume)
    assert len(done) < 60
    async with start(batch_pods(volume, tmp_path)[0]) as running:
        await running.completion(120)
    assert answered(volume) == list(range(0, 120, 2))
    assert set(done) <= set(answered(volume))


def test_what_downloads_is_let_to(tmp_path):
    """The image downloads nothing by itself; the job that fetches models says otherwise, the servers do not."""
    manifests = rendered("model-download")
    job = find(manifests, "Job", "hsrpc-model-download")
    cluster = Cluster(manifests, tmp_path, claims={"hsrpc-models": tmp_path})
    [container] = cluster.pod(job["spec"]["template"]).containers
    assert container.env["HF_HUB_OFFLINE"] == "0"
    [container] = pod("overlays/cpu-demo", tmp_path).containers
    assert container.env["HF_HUB_OFFLINE"] == "1"


def misspelt_flag(spec: Manifest) -> None:
    server(spec)["args"].append("--host-memroy=512MiB")


def missing_file(spec: Manifest) -> None:
    server(spec)["args"].append("--config=/settings/hsrpc.toml")


def service_links(spec: Manifest) -> None:
    """A Service named hsrpc puts HSRPC_SERVICE_HOST and others into its pods, unless Kubernetes is told not to."""
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


def no_pause(spec: Manifest) -> None:
    """SIGTERM comes at once: the pause before it is another test's."""
    server(spec)["lifecycle"]["preStop"]["sleep"]["seconds"] = 0


def quick(spec: Manifest) -> None:
    """Ask more often than in a cluster, so that a test is over sooner."""
    for kind in ("startupProbe", "readinessProbe"):
        server(spec)[kind]["periodSeconds"] = 1


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (misspelt_flag, "exited with 2\n.*unrecognized arguments: --host-memroy=512MiB"),
        (missing_file, "exited with 2\n.*/settings/hsrpc.toml: No such file"),
        (service_links, "exited with 2\n.*environment variable HSRPC_SERVICE_HOST is no setting"),
        (little_memory, "OOMKilled: [0-9]+ bytes, and the limit is 104857600"),
        (wrong_startup_service, "startup probe failed 3 times, 1 s apart"),
        (wrong_liveness_service, "liveness probe failed 2 times, 1 s apart"),
    ],
)
async def test_what_is_wrong_with_a_pod_is_found(patch, words, tmp_path):
    """Each mistake in the manifest of cpu-demo keeps the pod from being ready, and the reason is told."""
    with pytest.raises(PodError, match=f"(?s){words}"):
        async with start(pod("overlays/cpu-demo", tmp_path, patch)) as running:
            await running.ready(60)


async def test_a_readiness_probe_that_asks_for_something_else_is_found(tmp_path):
    """The server is there and takes requests, and the pod is never ready."""

    def patch(spec: Manifest) -> None:
        quick(spec)
        server(spec)["readinessProbe"]["grpc"]["service"] = "hsrpc.v1.GenerationServices"

    async with start(pod("overlays/cpu-demo", tmp_path, patch)) as running:
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
    async with start(pod("overlays/cpu-demo", tmp_path, short_grace)) as running:
        await running.ready(60)
        async with traffic(running, 32) as flowing:
            [ended] = await running.delete()
    assert ended.code == 128 + signal.SIGKILL
    assert flowing.broken


async def test_a_drain_that_is_shorter_than_its_streams_is_found(tmp_path):
    """Streams that do not end within --shutdown-timeout break, and the streams tell."""

    def hasty(spec: Manifest) -> None:
        server(spec)["args"].append("--shutdown-timeout=0")

    async with start(pod("overlays/cpu-demo", tmp_path, quick, no_pause, hasty)) as running:
        await running.ready(60)
        async with traffic(running, 8) as flowing:
            await running.delete()
    assert flowing.broken
