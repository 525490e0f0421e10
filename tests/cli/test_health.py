"""hsrpc health: the status as an exit code."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("service", [(), ("--service=",)], ids=["ready", "alive"])
def test_a_server_that_takes_requests(hsrpc, address, service):
    """0, and the status as grpc.health.v1 names it."""
    ran = hsrpc("health", "--target", address, *service)
    assert (ran.code, ran.out, ran.err) == (0, "SERVING\n", "")


def test_a_service_that_is_not_there(hsrpc, address):
    """1, and the server's own words."""
    ran = hsrpc("health", "--target", address, "--service=hsrpc.v1.Generation")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: NOT_FOUND: no such service here")


def test_nobody_listens(hsrpc):
    """1, and the address."""
    ran = hsrpc("health", "--target=127.0.0.1:1", "--timeout=30")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: UNAVAILABLE: ")


def test_a_server_that_loads(hsrpc, monkeypatch):
    """1, with the status and what it may mean."""
    from concurrent import futures

    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.HealthServicer()
    servicer.set("hsrpc.v1.GenerationService", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        ran = hsrpc("health", f"--target=127.0.0.1:{port}")
    finally:
        server.stop(None)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (f"hsrpc: error: 127.0.0.1:{port}: NOT_SERVING; it loads its model, drains, or does not go on\n")
