"""Envoy before the server: clients reach it alone, and it takes what the server takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hsrpc.server.config import ServerConfig
from tests.k8s.rendering import Manifest, bytes_of, find, pod_of, rendered


@pytest.fixture(params=["envoy", "envoy-openai"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(request.param)


@pytest.fixture
def config(manifests: list[Manifest]) -> Any:
    [made] = (each for each in manifests if each["metadata"]["name"].startswith("hsrpc-envoy-"))
    return yaml.safe_load(made["data"]["envoy.yaml"])


@pytest.fixture
def sidecar(manifests: list[Manifest]) -> Manifest:
    [container] = pod_of(find(manifests, "Deployment"))["initContainers"]
    return container


def test_clients_reach_envoy_alone_and_envoy_the_server(manifests, config, sidecar):
    """Policy and services lead to its listener, whose only cluster is the server's port of the same pod."""
    [listener], [cluster] = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    port = listener["address"]["socket_address"]["port_value"]
    assert sidecar["restartPolicy"] == "Always"  # without it the server would wait for its end
    assert [each["containerPort"] for each in sidecar["ports"]] == [port]
    assert sidecar["readinessProbe"]["grpc"]["port"] == port
    clients, _ = find(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert clients["ports"][0] == {"port": port}
    assert {"port": "grpc"} not in clients["ports"]
    services = [find(manifests, "Service", name) for name in ("hsrpc", "hsrpc-headless")]
    assert [each["spec"]["ports"][0]["targetPort"] for each in services] == [port] * 2
    [endpoints] = cluster["load_assignment"]["endpoints"]
    [endpoint] = endpoints["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert address == {"address": "127.0.0.1", "port_value": ServerConfig().port}


def test_envoy_takes_what_the_server_takes(config):
    """The largest request with its prefix, whole and in the server's time; output has no time limit."""
    [listener] = config["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    buffer, router = manager["http_filters"]
    assert buffer["typed_config"]["max_request_bytes"] == ServerConfig().max_message_bytes + 5
    assert router["name"] == "envoy.filters.http.router"
    assert manager["request_timeout"] == f"{ServerConfig().request_timeout:g}s"
    assert manager["max_request_headers_kb"] * 1024 == ServerConfig().security.max_metadata_bytes
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert {route["route"]["timeout"] for route in routes} == {manager["stream_idle_timeout"]} == {"0s"}


def test_envoy_has_room_for_its_heap(config, sidecar):
    """It refuses requests before the kernel ends it."""
    [monitor] = config["overload_manager"]["resource_monitors"]
    limit = bytes_of(sidecar["resources"]["limits"]["memory"])
    assert limit >= 1.2 * monitor["typed_config"]["max_heap_size_bytes"]
