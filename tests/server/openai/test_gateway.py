"""The gateway's life beside the server's: it is kept up, has the keys of the moment, and ends with it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPSConnection
from pathlib import Path

import anthropic
import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from hsrpc.client import CallError, Client
from hsrpc.errors import ConfigError
from hsrpc.server import Server, ServerConfig
from hsrpc.server.openai import settings
from hsrpc.server.security import SecurityConfig
from tests.server.conftest import ROOT
from tests.server.openai.conftest import Running, ScriptedEngine, running
from tests.server.secured import Authority

ALICE, BOB = "alice-alice-alice-1", "bob-bob-bob-bob-bob"
ASKED = {"model": "fake/model", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\n")
    path.chmod(0o600)
    return path


def ready(served: Running) -> bool:
    """What a probe of readiness is told; liveness must be well."""
    with grpc.insecure_channel(served.server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        names = ("", "hsrpc.v1.GenerationService")
        alive, is_ready = (stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1 for name in names)
    assert alive
    return is_ready


def text_of(client: openai.OpenAI) -> str:
    return client.chat.completions.create(**ASKED).choices[0].message.content


def test_one_that_dies_is_followed_by_another(caplog):
    """The log says how it ended; until then the server is not ready, and gRPC serves on."""
    with (
        caplog.at_level(logging.ERROR),
        running(ScriptedEngine, openai_host="localhost") as served,
        served.client() as client,
    ):
        served.engine.answer = "Once upon a time"
        assert ready(served)
        [pid] = served.server.openai.pids
        os.kill(pid, signal.SIGKILL)
        served.until(lambda: not served.server.openai.is_ready)
        assert not ready(served)
        with Client(served.server.address) as direct:
            assert direct.complete("Hi").finish
        served.until(lambda: served.server.openai.is_ready)
        assert ready(served)
        assert text_of(client) == "Once upon a time"
        assert served.server.openai.pids != {pid}
    assert "the gateway has ended with -9" in caplog.text


def test_a_drain_lets_streams_end():
    """What runs ends well, what comes is told that the server goes, and then nothing listens any more."""
    with (
        ThreadPoolExecutor() as threads,
        running(ScriptedEngine, drain_timeout=20) as served,
        served.client() as client,
    ):
        reading = threads.submit(lambda: list(client.chat.completions.create(**ASKED, stream=True)))
        served.until(lambda: served.engine.live)
        draining = threads.submit(lambda: served.do(served.server.drain()))
        served.until(lambda: served.server.state.phase.name == "DRAINING")
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            text_of(client)
        assert caught.value.status_code == 503
        served.do(finish(served))
        chunks = reading.result()
        draining.result()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Once upon"
        pids = served.server.openai.pids
    assert not any(is_running(pid) for pid in pids)
    with served.client() as client, pytest.raises(openai.APIConnectionError):
        text_of(client)


def is_running(pid: int) -> bool:
    """One that has ended may stay as a zombie, where nobody asks for its exit code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_keys_are_the_tokens(tokens):
    """Holders of a token alone get in, by either SDK; what they start is the gateway's, and nobody else may end it."""
    with running(ScriptedEngine, security=SecurityConfig(auth_tokens=tokens)) as served:
        base = served.url.removesuffix("/v1")
        served.engine.answer = "Once upon a time"
        assert text_of(served.client(ALICE)) == "Once upon a time"
        assert served.engine.clients[-1] == "openai:gateway"
        with anthropic.Anthropic(base_url=base, auth_token=ALICE, max_retries=0) as claude:
            assert claude.messages.create(max_tokens=5, **ASKED).content[0].text == "Once upon a time"
        for key in (BOB, "none"):
            with pytest.raises(openai.AuthenticationError):
                text_of(served.client(key))
        with (
            anthropic.Anthropic(base_url=base, auth_token=BOB, max_retries=0) as claude,
            pytest.raises(anthropic.AuthenticationError),
        ):
            claude.messages.create(max_tokens=5, **ASKED)
        served.engine.answer = None
        with ThreadPoolExecutor() as threads, Client(served.server.address, token=ALICE) as direct:
            reading = threads.submit(text_of, served.client(ALICE))
            served.until(lambda: served.engine.live)
            [request_id] = served.engine.live
            with pytest.raises(CallError, match="PERMISSION_DENIED"):
                direct.abort(request_id)
            served.do(finish(served))
            assert reading.result() == "Once upon"


async def finish(served: Running) -> None:
    """The live request says its last words."""
    [request_id] = served.engine.live
    await served.engine.write(request_id, "Once upon")
    served.engine.end(request_id)


def test_the_gateways_port_is_for_the_gateway(tokens, caplog):
    """Another process of this machine is refused there, whatever it brings, before anything is read."""
    with running(ScriptedEngine, security=SecurityConfig(auth_tokens=tokens)) as served:
        with grpc.insecure_channel(served.server.grpc.gateway_port.address) as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            for metadata in ((), (("authorization", f"Bearer {ALICE}"),)):
                with pytest.raises(grpc.RpcError, match="for the server's own gateway") as caught:
                    stub.HealthCheck(vllm.HealthCheckRequest(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.RpcError, match="for the server's own gateway"):
                    next(stub.Generate(vllm.GenerateRequest(text="Hi"), metadata=metadata))
        assert not served.engine.prompts
        assert "calls refused on the gateway's port" in caplog.text
        served.engine.answer = "Once upon a time"
        assert text_of(served.client(ALICE)) == "Once upon a time"


def test_new_tokens_have_a_new_gateway(tokens):
    """Streams of the old one go on to their ends; what is no token any more lets nobody in."""
    security = SecurityConfig(auth_tokens=tokens)
    with ThreadPoolExecutor() as threads, running(ScriptedEngine, drain_timeout=2, security=security) as served:
        reading = threads.submit(text_of, served.client(ALICE))
        served.until(lambda: served.engine.live)
        tokens.write_text(f"bob {BOB}\n")
        served.server.reload()
        served.until(lambda: not served.server.openai.is_ready)
        served.do(finish(served))
        assert reading.result() == "Once upon"
        served.until(lambda: served.server.openai.is_ready)
        served.engine.answer = "Once upon a time"
        assert text_of(served.client(BOB)) == "Once upon a time"
        with pytest.raises(openai.AuthenticationError):
            text_of(served.client(ALICE))


def test_tls_is_the_servers(tmp_path):
    """The certificate of gRPC is that of HTTP."""
    authority = Authority(tmp_path)
    with running(ScriptedEngine, security=SecurityConfig(**authority.issue())) as served:
        assert served.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(authority.roots))
        connection = HTTPSConnection("127.0.0.1", served.server.openai.port, context=trusting, timeout=20)
        connection.request("GET", "/v1/models")
        assert json.load(connection.getresponse())["data"][0]["id"] == "fake/model"
        connection.close()


STARTER = """
import asyncio
from hsrpc.server.openai.process import GatewayProcess

async def main():
    process = await GatewayProcess.start({"tenant_api_keys": [], "control_plane_api_keys": [], "worker_urls": []})
    print(process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_it_does_not_outlive_whoever_started_it():
    """However that ends: SIGKILL leaves no time to say so."""
    with (
        subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as starter,
        killed(starter),
    ):
        pid = int(starter.stdout.readline())
        assert is_running(pid)
        starter.kill()
        eventually(lambda: not is_running(pid))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_signals_end_both(number, code):
    """Ctrl-C is for all processes of a terminal, of which the gateway is none; after the drain it is ended."""
    command = [sys.executable, "-m", "tests.server.serve_fake", "openai"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as server,
        killed(server),
    ):
        assert server.stdout.readline().startswith("listening on 127.0.0.1:")
        assert server.stdout.readline().startswith("OpenAI API on http://127.0.0.1:")
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        eventually(children.read_text)
        [pid] = map(int, children.read_text().split())
        eventually(lambda: os.getpgid(pid) != server.pid)
        os.killpg(server.pid, number)
        assert server.wait(20) == code
    eventually(lambda: not is_running(pid))


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Nothing is left to wait for, whatever comes in the block."""
    try:
        yield
    finally:
        process.kill()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_port_that_is_taken_is_told():
    """Before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(ServerConfig(port=0, openai_port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"openai_port='127.0.0.1:.* cannot be bound"):
            await server.start()
        await server.stop()


async def test_a_port_is_reserved_while_the_model_loads():
    """Connections are refused, as nobody listens there, and nobody else can have it."""
    server = Server(ServerConfig(port=0, openai_port=0))
    await server.start()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.openai.port)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", server.openai.port))
    await server.stop()


async def test_a_model_without_a_tokenizer_is_refused(engine):
    """A gateway makes tokens of text: without a tokenizer it would never be ready."""

    async def nothing() -> dict[str, bytes]:
        return {}

    engine.tokenizer.files = nothing
    server = Server(ServerConfig(port=0, openai_port=0))
    await server.start()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        await server.attach(engine)
    await server.stop()


async def test_parsers_have_names():
    """One that smg does not have is told with those that it has."""
    with pytest.raises(ConfigError, match=r"tool_call_parser='nothing': smg has no such parser; use one of .*qwen"):
        Server(ServerConfig(openai_port=0, tool_call_parser="nothing"))


async def test_what_is_not_installed_is_told(monkeypatch):
    """With the extra that has it."""

    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"openai_port=0: smg is not installed; pip install 'hsrpc\[gateway\]'"):
        Server(ServerConfig(openai_port=0))
