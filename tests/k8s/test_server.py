"""Manifests in step with the programs that they start: flags exist, and mean what ports, probes and limits say."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from hsrpc.cli.main import build_parser
from hsrpc.cli.security import security_config
from hsrpc.config import parse_bytes
from hsrpc.errors import ConfigError
from hsrpc.server.config import ServerConfig
from hsrpc.server.grpc.listener import HEALTH_NAMES
from tests.k8s.rendering import (
    ALONE,
    COMPONENTS,
    NAMES,
    Manifest,
    bytes_of,
    compose,
    find,
    pod_of,
    rendered,
    title,
)

PROCESS_BYTES = 1024**3
"""Host memory of the process beside its budget: interpreter, torch, CUDA context, staging of requests."""
MODELS = {"MODEL_NAME": "m", "MODEL_REVISION": "r", "JOB_COMPLETION_INDEX": "1"}
SERVERS = [name for name in NAMES if name not in ALONE and not name.endswith(("batch", "download"))]


def settings(container: Manifest, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the container's command makes of its arguments and variables."""
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    words = [*container["command"], *container["args"]]
    program, *arguments = (re.sub(r"\$\((\w+)\)", lambda found: MODELS[found[1]], word) for word in words)
    assert program == "hsrpc"
    return build_parser().parse_args(arguments)


def server_of(manifests: list[Manifest]) -> Manifest:
    [container] = pod_of(find(manifests, "Deployment"))["containers"]
    return container


@pytest.fixture(params=SERVERS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Every overlay with a server."""
    return rendered(request.param)


@pytest.fixture
def server(manifests: list[Manifest]) -> Manifest:
    return server_of(manifests)


@pytest.fixture
def options(server: Manifest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return settings(server, monkeypatch)


def test_ports_are_those_that_the_server_binds(server, options):
    """All of them, by their names."""
    bound = {
        "grpc": options.port,
        "metrics": options.metrics_port,
        "health": options.health_port,
        "openai": options.openai_port,
    }
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {name: port for name, port in bound.items() if port is not None}
    assert (options.port, options.host, options.metrics_host) == (ServerConfig().port, "0.0.0.0", "0.0.0.0")
    assert options.openai_port is None or options.openai_host == "0.0.0.0"


def test_services_lead_to_the_servers_doors(manifests, options):
    """At the port that clients know, whatever is in between."""
    for name in ("hsrpc", "hsrpc-headless"):
        ports = {port["name"]: port["port"] for port in find(manifests, "Service", name)["spec"]["ports"]}
        expected = {"grpc": options.port} | ({"openai": options.openai_port} if options.openai_port else {})
        assert ports == expected
        protocol = find(manifests, "Service", name)["spec"]["ports"][0]["appProtocol"]
        assert protocol == ("https" if options.tls_cert else "kubernetes.io/h2c")


def test_metrics_are_where_prometheus_is_told(manifests, options):
    """At the annotated port, for others than clients."""
    annotations = find(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(options.metrics_port)
    clients, scraper, *_ = find(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert scraper["ports"] == [{"port": "metrics"}]
    assert {"port": "metrics"} not in clients["ports"]


def test_the_server_may_serve_its_address(options):
    """It has TLS and knows its clients, or is told that the network keeps others out."""
    security = security_config(options)
    ServerConfig(host=options.host, security=security)
    if options.openai_port is not None:
        security.check_http_exposure(options.openai_host)
    is_locked = security.tls and security.authenticates
    assert security.insecure is not is_locked


@pytest.mark.parametrize("components", [["auth"], ["mutual-tls", "auth"]])
def test_tokens_without_tls_are_refused(components, monkeypatch):
    """An overlay that forgets tls has pods that say so, and no open door."""
    options = settings(server_of(compose(*(COMPONENTS / each for each in components))), monkeypatch)
    with pytest.raises(ConfigError, match=r"--tls-cert|tls_cert"):
        security_config(options).check_exposure(options.host)


def test_probes_can_be_answered(server, options):
    """Liveness means the server, readiness the service that takes requests; in plain text."""
    services = {name: server[name]["grpc"].get("service", "") for name in ("livenessProbe", "readinessProbe")}
    assert services == dict(zip(services, HEALTH_NAMES, strict=True))
    port = options.health_port if options.tls_cert else options.port
    assert {server[name]["grpc"]["port"] for name in ("startupProbe", *services)} == {port}


def test_a_pod_may_drain_before_it_is_killed(manifests, server, options):
    """The grace period covers the pause before SIGTERM, the drain, and some seconds to exit."""
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod_of(find(manifests, "Deployment"))["terminationGracePeriodSeconds"]
    assert grace >= pause + options.shutdown_timeout + 10


def test_the_rollout_waits_for_the_startup_probe(manifests, server):
    """A pod that still loads within the startup probe's patience is no failed rollout."""
    probe = server["startupProbe"]
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    assert find(manifests, "Deployment")["spec"]["progressDeadlineSeconds"] > patience


def test_memory_limit_holds_the_budgets(server, options):
    """Pinned memory counts against the limit, and the node must keep it free; on the CPU so does the "device"."""
    request, limit = (server["resources"][kind]["memory"] for kind in ("requests", "limits"))
    assert request == limit
    if options.host_memory is not None:
        budget = parse_bytes(options.host_memory, "host_memory")
        budget += parse_bytes(options.gpu_memory, "gpu_memory") if options.device == "cpu" else 0
        assert bytes_of(limit) >= budget * 1.05 + PROCESS_BYTES


def test_a_gpu_is_asked_for_by_who_uses_it(server, options):
    """By the plugin or by a claim, in an image that has CUDA."""
    resources = server["resources"]
    asked = "nvidia.com/gpu" in resources["limits"] or "claims" in resources
    assert asked is (options.device == "cuda") is server["image"].endswith("-cuda")


def test_a_scaler_has_the_number_of_replicas_to_itself(manifests):
    """An apply would set it back."""
    kinds = {each["kind"] for each in manifests}
    scaled = bool(kinds & {"ScaledObject", "HorizontalPodAutoscaler"})
    assert ("replicas" not in find(manifests, "Deployment")["spec"]) is scaled


def test_numa_pods_are_guaranteed():
    """Requests are limits, and cores are whole: the kubelet's managers look at nothing else."""
    for container in pod_of(find(rendered("numa"), "Deployment"))["containers"]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["cpu"].isdecimal()


def test_the_model_lies_where_the_job_puts_it():
    """On the same claim, in the same folder, which the server cannot write."""
    server_pod = pod_of(find(rendered("overlays/single-gpu"), "Deployment"))
    job_pod = pod_of(find(rendered("overlays/single-gpu/download"), "Job", "hsrpc-model-download"))
    for pod in (server_pod, job_pod):
        [volume] = (each for each in pod["volumes"] if each["name"] == "models")
        assert volume["persistentVolumeClaim"]["claimName"] == "hsrpc-models"
    [container] = server_pod["containers"]
    [mount] = (each for each in container["volumeMounts"] if each["name"] == "models")
    assert mount["readOnly"] is True
    [download] = job_pod["containers"]
    target = re.search(r'target="([^"]*)"', download["args"][0])[1]
    assert f"--model={target}" in [re.sub(r"\$\((\w+)\)", r"$\1", word) for word in container["args"]]


def test_a_batch_has_a_pod_for_each_shard(monkeypatch):
    """Each with an output of its own, by its index."""
    for name in ("batch", "overlays/batch"):
        job = find(rendered(name), "Job", "hsrpc-batch")
        [container] = pod_of(job)["containers"]
        options = settings(container, monkeypatch)
        assert (options.shard.index, options.shard.count) == (1, job["spec"]["completions"])
        assert (options.input, options.output) == ("/data/requests.jsonl", "/data/answers-1.jsonl")
        assert job["spec"]["completionMode"] == "Indexed"
    assert (options.device, options.model) == ("cuda", "/models/m/r")


def test_a_misspelt_flag_is_seen(monkeypatch):
    """And a misspelt variable."""
    flag = '[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--max-bach=8"}]'
    server = server_of(compose(patches=[{"patch": flag, "target": {"kind": "Deployment"}}]))
    with pytest.raises(SystemExit):
        settings(server, monkeypatch)
    server["args"].pop()
    server["env"].append({"name": "HSRPC_MAX_BACH", "value": "8"})
    with pytest.raises(SystemExit):
        settings(server, monkeypatch)


def test_every_server_is_seen():
    """By the checks above."""
    assert [name for name in NAMES if any(title(each) == "Deployment/hsrpc" for each in rendered(name))] == SERVERS
