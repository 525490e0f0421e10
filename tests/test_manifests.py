"""The Kubernetes manifests: valid by the Kubernetes schemas, and in step with the server they start."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hsrpc.cli.main import build_parser
from hsrpc.cli.security import security_config
from hsrpc.config import parse_bytes
from hsrpc.server.config import ServerConfig
from hsrpc.server.grpc.listener import HEALTH_NAMES

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
KUBERNETES = "1.30"
"""The oldest version that the manifests are for."""
PROCESS_BYTES = 1024**3
"""Host memory of the process beside its budget: interpreter, torch, CUDA context, staging of requests."""

Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def patched(manifest: Manifest, operations: list[Manifest]) -> Manifest:
    """`manifest` after the JSON patch (RFC 6902) of an overlay; only what is there is replaced or removed."""
    result = copy.deepcopy(manifest)
    for operation in operations:
        *path, last = (int(key) if key.isdecimal() else key for key in operation["path"].split("/")[1:])
        parent = result
        for key in path:
            parent = parent[key]
        if operation["op"] == "add":
            assert last not in parent, operation["path"]
            parent.append(operation["value"]) if last == "-" else parent.update({last: operation["value"]})
            continue
        assert last in parent if isinstance(parent, dict) else last < len(parent), operation["path"]
        if operation["op"] == "replace":
            parent[last] = operation["value"]
        else:
            assert operation["op"] == "remove"
            del parent[last]
    return result


RESOURCES = read(K8S / "base/kustomization.yaml")[0]["resources"]
BASE = [manifest for name in RESOURCES for manifest in read(K8S / "base" / name)]
DEPLOYMENT = next(manifest for manifest in BASE if manifest["kind"] == "Deployment")
DEPLOYMENTS = {
    "base": DEPLOYMENT,
    "cpu-demo": patched(DEPLOYMENT, read(K8S / "overlays/cpu-demo/deployment.yaml")[0]),
}
ENVOY = K8S / "components/envoy"
BEHIND_ENVOY = {
    title: patched(manifest, read(ENVOY / f"{file}.yaml")[0])
    for file, kind in (("deployment", "Deployment"), ("network-policy", "NetworkPolicy"), ("service", "Service"))
    for manifest in BASE
    if manifest["kind"] == kind
    for title in [f"{kind}/{manifest['metadata']['name']}"]
}
DEPLOYMENTS["envoy"] = BEHIND_ENVOY["Deployment/hsrpc"]
LOAD_MODEL = read(K8S / "load-model.yaml")
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pod(manifest: Manifest) -> Manifest:
    return manifest["spec"]["template"]["spec"]


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Manifest:
    """The deployment of the base, and of each overlay."""
    return DEPLOYMENTS[request.param]


@pytest.fixture
def server(deployment: Manifest) -> Manifest:
    [container] = pod(deployment)["containers"]
    return container


@pytest.fixture
def options(server: Manifest) -> Any:
    """What `hsrpc serve` makes of the container's arguments."""
    return build_parser().parse_args(["serve", *server["args"]])


@pytest.mark.parametrize("manifest", [*BASE, *LOAD_MODEL, DEPLOYMENTS["cpu-demo"], *BEHIND_ENVOY.values()], ids=title)
def test_is_valid_by_the_kubernetes_schema(manifest):
    """No field is unknown, missing or of the wrong type."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_schema_finds_a_misspelt_field():
    """The check above is strict."""
    wrong = patched(DEPLOYMENT, [{"op": "replace", "path": "/spec/replicas", "value": "one"}])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", ["base", "overlays/cpu-demo", "components/envoy"])
def test_kustomization_names_every_file(folder):
    """No manifest is forgotten, none named that does not exist."""
    kustomization = read(K8S / folder / "kustomization.yaml")[0]
    named = [*kustomization.get("resources", []), *(patch["path"] for patch in kustomization.get("patches", []))]
    named += [name for made in kustomization.get("configMapGenerator", []) for name in made["files"]]
    assert all((K8S / folder / name).exists() for name in named)
    files = {file.name for file in (K8S / folder).glob("*.yaml")}
    assert files - {"kustomization.yaml"} == {name for name in named if "/" not in name}


def test_names_are_unique():
    """Kubernetes takes one object of a kind and name."""
    titles = [title(manifest) for manifest in [*BASE, *LOAD_MODEL]]
    assert len(titles) == len(set(titles))


def test_selectors_find_the_pods():
    """Services, budget and network policy all mean the deployment's pods."""
    selectors = {title(DEPLOYMENT): DEPLOYMENT["spec"]["selector"]["matchLabels"]}
    for manifest in BASE:
        if manifest["kind"] == "Service":
            selectors[title(manifest)] = manifest["spec"]["selector"]
        elif manifest["kind"] == "PodDisruptionBudget":
            selectors[title(manifest)] = manifest["spec"]["selector"]["matchLabels"]
        elif manifest["kind"] == "NetworkPolicy":
            selectors[title(manifest)] = manifest["spec"]["podSelector"]["matchLabels"]
    assert selectors == dict.fromkeys(selectors, LABELS)
    assert len(selectors) == 5


def test_every_port_is_the_servers(server, options):
    """Probes, container, services and network policy speak of the port that the server binds."""
    port, _ = server["ports"]
    assert port["containerPort"] == options.port == ServerConfig().port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["grpc"]["port"] == port["containerPort"]
    ports = [port for manifest in BASE if manifest["kind"] == "Service" for port in manifest["spec"]["ports"]]
    assert [(entry["targetPort"], entry["port"]) for entry in ports] == [(port["name"], port["containerPort"])] * 2
    [policy] = (manifest for manifest in BASE if manifest["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": port["name"]}]


def test_metrics_are_where_prometheus_is_told(deployment, server, options):
    """On all addresses of the pod, at the annotated port, for the namespaces that the network policy names."""
    _, port = server["ports"]
    assert port == {"name": "metrics", "containerPort": options.metrics_port}
    assert options.metrics_host == "0.0.0.0"
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    [policy] = (manifest for manifest in BASE if manifest["kind"] == "NetworkPolicy")
    client, scraper = policy["spec"]["ingress"]
    assert scraper["ports"] == [{"port": port["name"]}]
    assert scraper["from"] != client["from"]


def test_the_server_may_serve_the_image_s_address(options):
    """The arguments say how the server is protected on all addresses, which it asks for."""
    ServerConfig(host="0.0.0.0", security=security_config(options))


def test_probes_ask_for_services_that_report_health(server):
    """Liveness means the server, readiness the service that takes requests."""
    services = {name: server[name]["grpc"].get("service", "") for name in ("livenessProbe", "readinessProbe")}
    assert services == dict(zip(services, HEALTH_NAMES, strict=True))


def test_a_pod_may_drain_before_it_is_killed(deployment, server, options):
    """The grace period covers the pause before SIGTERM, the drain, and some seconds to exit."""
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(deployment)["terminationGracePeriodSeconds"] >= pause + options.shutdown_timeout + 10


def test_the_rollout_waits_for_the_startup_probe(deployment, server):
    """A pod that still loads within the startup probe's patience is no failed rollout."""
    probe = server["startupProbe"]
    assert deployment["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def test_memory_limit_holds_the_budgets(server, options):
    """Pinned memory counts against the limit, and the node must keep it free; on the CPU so does the "device"."""
    request, limit = (server["resources"][kind]["memory"] for kind in ("requests", "limits"))
    assert request == limit
    budget = parse_bytes(options.host_memory, "host_memory")
    budget += parse_bytes(options.gpu_memory, "gpu_memory") if options.device == "cpu" else 0
    assert parse_bytes(re.sub("i$", "iB", limit), "limit") >= budget * 1.05 + PROCESS_BYTES


def test_only_the_base_asks_for_a_gpu():
    """One GPU for the server, none for the CPU overlay."""
    asked = {name: "nvidia.com/gpu" in str(manifest) for name, manifest in DEPLOYMENTS.items()}
    assert asked == {"base": True, "cpu-demo": False, "envoy": True}
    assert pod(DEPLOYMENT)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("manifest", [*DEPLOYMENTS.values(), LOAD_MODEL[-1]], ids=title)
def test_pods_run_without_privileges(manifest):
    """The restricted pod security standard, and a read-only root file system with a writable /tmp."""
    spec = pod(manifest)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        [tmp] = (volume for volume in spec["volumes"] if volume["name"] == mounts["/tmp"])
        assert "emptyDir" in tmp


def test_clients_reach_envoy_alone_and_envoy_the_server():
    """Policy and services lead to its listener, whose only cluster is the server's port of the same pod."""
    config = read(ENVOY / "envoy.yaml")[0]["static_resources"]
    [listener], [cluster] = config["listeners"], config["clusters"]
    port = listener["address"]["socket_address"]["port_value"]
    [sidecar] = pod(DEPLOYMENTS["envoy"])["initContainers"]
    assert sidecar["restartPolicy"] == "Always"  # without it the server would wait for its end
    assert [each["containerPort"] for each in sidecar["ports"]] == [port]
    assert sidecar["readinessProbe"]["grpc"]["port"] == port
    clients, _ = BEHIND_ENVOY["NetworkPolicy/hsrpc"]["spec"]["ingress"]
    assert clients["ports"] == [{"port": port}]
    services = [each for each in BEHIND_ENVOY.values() if each["kind"] == "Service"]
    assert [each["spec"]["ports"][0]["targetPort"] for each in services] == [port] * 2
    [endpoints] = cluster["load_assignment"]["endpoints"]
    [endpoint] = endpoints["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert address == {"address": "127.0.0.1", "port_value": ServerConfig().port}


def test_envoy_takes_what_the_server_takes():
    """The largest request with its prefix, whole and in the server's time; output has no time limit."""
    [listener] = read(ENVOY / "envoy.yaml")[0]["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    buffer, router = manager["http_filters"]
    assert buffer["typed_config"]["max_request_bytes"] == ServerConfig().max_message_bytes + 5
    assert router["name"] == "envoy.filters.http.router"
    assert manager["request_timeout"] == f"{ServerConfig().request_timeout:g}s"
    assert manager["max_request_headers_kb"] * 1024 == ServerConfig().security.max_metadata_bytes
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert {route["route"]["timeout"] for route in routes} == {manager["stream_idle_timeout"]} == {"0s"}


def test_envoy_has_room_for_its_heap():
    """It refuses requests before the kernel ends it."""
    [monitor] = read(ENVOY / "envoy.yaml")[0]["overload_manager"]["resource_monitors"]
    [sidecar] = pod(DEPLOYMENTS["envoy"])["initContainers"]
    limit = parse_bytes(re.sub("i$", "iB", sidecar["resources"]["limits"]["memory"]), "limit")
    assert limit >= 1.2 * monitor["typed_config"]["max_heap_size_bytes"]


def test_the_model_lies_on_the_claim_that_the_job_fills():
    """The job and the server mean the same claim and folder, which the server cannot write."""
    [container] = pod(DEPLOYMENT)["containers"]
    claim, job = LOAD_MODEL
    for manifest in (DEPLOYMENT, job):
        [volume] = (volume for volume in pod(manifest)["volumes"] if volume["name"] == "models")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [mount] = (mount for mount in container["volumeMounts"] if mount["name"] == "models")
    assert mount["readOnly"] is True
    model = build_parser().parse_args(["serve", *container["args"]]).model
    assert Path(model).is_relative_to(mount["mountPath"])
    assert model == pod(job)["containers"][0]["command"][-1]
