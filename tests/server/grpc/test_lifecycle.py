"""Up and down: health, reflection, draining, signals, faults."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hsrpc.client import AsyncClient, CallError
from hsrpc.errors import ConfigError
from hsrpc.request import FinishReason
from hsrpc.server import Server, ServerConfig
from hsrpc.server.liveness import MAX_FAILED_IN_A_ROW
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import rich_status, until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ROOT = Path(__file__).parents[3]
NAMES = ("", "hsrpc.v1.GenerationService")


async def health(channel: grpc.aio.Channel) -> set[int]:
    """The statuses under both names."""
    stub = health_pb2_grpc.HealthStub(channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES}


async def test_health_follows_the_engine(loading_server, channel, engine):
    """NOT_SERVING while loading and from the beginning of the drain on, SERVING in between."""
    assert await health(channel) == {NOT_SERVING}
    await loading_server.attach(engine)
    assert await health(channel) == {SERVING}
    await loading_server.drain()
    assert await health(channel) == {NOT_SERVING}


async def test_a_fault_is_not_serving(server, channel):
    """After an engine fault health says so at once."""
    await server.fail()
    assert await health(channel) == {NOT_SERVING}


async def test_reflection_lists_the_services(server, channel):
    """Tools such as grpcurl find every service without the proto files."""
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {f"hsrpc.v1.{name}Service" for name in ("Generation", "Model", "Server")} < names
    await call.done_writing()


async def test_interceptors_see_every_call(engine):
    """Interceptors given to the server are called, in front of all services."""
    seen = []

    class Recorder(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation, handler_call_details):
            seen.append(handler_call_details.method)
            return await continuation(handler_call_details)

    server = Server(ServerConfig(port=0), [Recorder()])
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert [response async for response in stub.Generate(v1.GenerateRequest(text="Hi"))]
    await server.stop()
    assert seen == ["/hsrpc.v1.GenerationService/Generate"]


async def test_draining_an_idle_server_says_nothing_whatever_its_time(engine, caplog):
    """Without a request nothing is ended, and with drain_timeout 0 the log does not say that something was."""
    for seconds in (0.0, 5.0):
        server = Server(ServerConfig(port=0, drain_timeout=seconds))
        await server.start()
        await server.attach(engine)
        await asyncio.wait_for(server.drain(), 2)
        await server.stop()
    assert "requests still run" not in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 0.05])
async def test_draining_is_bounded(engine, seconds):
    """What still runs after drain_timeout ends UNAVAILABLE with RetryInfo, and its work stops; 0 is at once."""
    engine.held = True
    server = Server(ServerConfig(port=0, drain_timeout=seconds))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(v1.GenerateRequest(request_id="r", text="H"))
        await until(lambda: engine.live)
        await asyncio.wait_for(server.drain(), 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
        await asyncio.wait_for(server.stop(), 2)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in rich_status(caught.value).details)
    assert engine.aborted == ["r"]


async def test_a_step_that_takes_too_long_is_not_alive(engine):
    """Liveness turns NOT_SERVING while a step takes longer than step_timeout, readiness does not; both ways."""
    server = Server(ServerConfig(port=0, step_timeout=0.2))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        engine.beat = 0.3
        assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
        assert await health(channel) == {NOT_SERVING, SERVING}
        engine.beat = 0.1
        assert (await asyncio.wait_for(watch.read(), 5)).status == SERVING
    await server.stop()


async def test_an_engine_on_which_every_request_fails_is_not_alive(engine):
    """Some failures are requests' own; a row of them, without a good one between, is the server's."""
    server = Server(ServerConfig(port=0, step_timeout=0.2))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        engine.failed_in_a_row = MAX_FAILED_IN_A_ROW
        assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
        engine.failed_in_a_row = MAX_FAILED_IN_A_ROW - 1
        assert (await asyncio.wait_for(watch.read(), 5)).status == SERVING
    await server.stop()


async def test_a_slow_step_revives_nothing_that_drains(engine):
    """A drained server stays NOT_SERVING, whatever the heartbeat says later."""
    engine.beat = 1.0
    server = Server(ServerConfig(port=0, step_timeout=0.05))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        await asyncio.sleep(0.1)
        await server.drain()
        engine.beat = 0.0
        await asyncio.sleep(0.1)
        assert await health(channel) == {NOT_SERVING}
    await server.stop()


async def test_a_process_that_hangs_is_ended():
    """A thread that waits for a device for ever keeps the process no longer than it may take."""
    code = (
        "import threading; from hsrpc.server.ops.forced_exit import exit_within; exit_within(0.2, 7);"
        "threading.Thread(target=threading.Event().wait).start()"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    assert await asyncio.wait_for(process.wait(), 20) == 7


async def test_a_hanging_engine_does_not_keep_the_process():
    """SIGTERM ends a process whose engine cannot be left, with an exit code that says so."""
    async with served("hangs") as server:
        await server.become(SERVING)
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 1


async def test_a_taken_port_is_a_config_error(server):
    """A port in use names the setting, its value and a remedy."""
    with pytest.raises(ConfigError, match=f"port='127.0.0.1:{server.port}': cannot be bound; take"):
        await Server(ServerConfig(port=server.port)).start()


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 65_536},
        {"drain_timeout": -1.0},
        {"write_timeout": float("nan")},
        {"max_message_bytes": 0},
        {"max_tokens_per_message": 0},
        {"max_tokens_per_message": 1025},
        {"max_message_delay": -0.1},
        {"max_message_delay": float("nan")},
    ],
)
def test_a_bad_setting_is_named(settings):
    """A setting that cannot work is refused when the config is made."""
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}="):
        ServerConfig(**settings)


@dataclass
class Served:
    """A serving process."""

    process: asyncio.subprocess.Process
    channel: grpc.aio.Channel
    address: str

    def generate(self) -> grpc.aio.UnaryStreamCall:
        return generation_pb2_grpc.GenerationServiceStub(self.channel).Generate(
            v1.GenerateRequest(request_id="r", text="Hi")
        )

    async def become(self, status: int) -> None:
        for _ in range(500):
            if await health(self.channel) == {status}:
                return
            await asyncio.sleep(0.01)
        pytest.fail("health did not change within five seconds")

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 5)


@asynccontextmanager
async def served(*arguments: str) -> AsyncIterator[Served]:
    command = (sys.executable, "-m", "tests.server.serve_fake", *arguments)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
        assert line.startswith("listening on 127.0.0.1:"), line
        address = line.split()[-1]
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(process, channel, address)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_first_signal_drains():
    """SIGTERM refuses new requests, lets running ones end, and exits with 0."""
    async with served() as server:
        await server.become(SERVING)
        call = server.generate()
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        await server.become(NOT_SERVING)
        stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
        assert (await stub.Abort(v1.AbortRequest(request_id="r"))).aborted
        assert (await call.read()).finish.reason == v1.FINISH_REASON_ABORTED
        assert await server.exit_code() == 0


async def test_the_second_signal_exits():
    """A second signal does not wait for running requests."""
    async with served() as server:
        await server.become(SERVING)
        call = server.generate()
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGINT)
        await server.become(NOT_SERVING)
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 128 + signal.SIGTERM
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()


async def test_a_signal_while_loading_exits():
    """There is nothing to drain before the model is loaded."""
    async with served("loading") as server:
        assert await health(server.channel) == {NOT_SERVING}
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 128 + signal.SIGTERM


async def test_a_signal_ends_a_load_that_does_not_stop():
    """What loads is not waited for: the process is gone within seconds, with the signal's code."""
    async with served("stuck") as server:
        assert await health(server.channel) == {NOT_SERVING}
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 128 + signal.SIGTERM


async def test_sighup_reads_tokens_again(tmp_path):
    """The new token is known at once and the old one no more; a stream goes on, and the process with it."""
    tokens = tmp_path / "tokens"
    tokens.write_text("alice old-old-old-old-old\n")
    tokens.chmod(0o600)
    async with served("tokens", str(tokens)) as server:
        await server.become(SERVING)
        old, new = (AsyncClient(server.address, token=f"{word}-{word}-{word}-{word}-{word}") for word in ("old", "new"))
        async with old, new:
            stream = old.generate("Hi", request_id="r")
            async for load in old.watch_load(0.1):
                if load.load.running_requests:
                    break
            tokens.write_text("alice new-new-new-new-new\n")
            await old.get_model()
            server.process.send_signal(signal.SIGHUP)
            assert b"SIGHUP: certificates and tokens are read again" in await server.process.stderr.readline()
            assert f"{tokens} was read again".encode() in await server.process.stderr.readline()
            with pytest.raises(CallError):
                await old.get_model()
            assert await new.abort("r")
            assert [delta async for delta in stream][-1].finish.reason is FinishReason.ABORTED
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0


async def test_a_model_that_does_not_load_ends_the_process():
    """What loading raises ends serve, and the process exits non-zero."""
    async with served("broken") as server:
        assert await server.exit_code() == 1
        assert b"CheckpointError: no model here" in await server.process.stderr.read()


async def test_an_engine_fault_ends_the_process():
    """Streams end UNAVAILABLE, health turns NOT_SERVING and the process exits non-zero."""
    async with served("dies") as server:
        await server.become(SERVING)
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        call = server.generate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await watch.read()).status == NOT_SERVING
        assert await server.exit_code() == 1
