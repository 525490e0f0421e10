"""Clients that leave streams unread, seen on the wire: streams are reset, memory is back, connections are cut."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from hsrpc.request import Delta
from hsrpc.server import Server, ServerConfig
from hsrpc.server.lifecycle import Health
from hsrpc.server.readers import MAX_STALLS
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.testing.raw_http2 import RawConnection, connected
from hsrpc.v1 import generation_pb2, server_pb2
from tests.server.conftest import until

GENERATE = "/hsrpc.v1.GenerationService/Generate"
INFO = "/hsrpc.v1.ServerService/GetServerInfo"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
NOT_SERVING = health_pb2.HealthCheckResponse(status="NOT_SERVING").SerializeToString()
WORDS = "word " * 2000


class Talker(FakeEngine):
    """Says WORDS to everybody, and goes on."""

    async def submit(self, *prompt: Any, **options: Any) -> Any:
        generation = await super().submit(*prompt, **options)
        generation.put(Delta(WORDS, (1,)))
        return generation


@pytest.fixture
def engine() -> Talker:
    return Talker(held=True)


@asynccontextmanager
async def serving(engine: Talker, **settings: Any) -> AsyncIterator[Server]:
    """A server that has had two calls: grpc keeps its first and its latest."""
    server = Server(ServerConfig(port=0, **{"write_timeout": 0.3, **settings}))
    await server.start()
    await server.attach(engine)
    try:
        for _ in range(2):
            await touch(server)
        yield server
    finally:
        await server.stop()


async def touch(server: Server) -> None:
    """A call that is read: grpc lets go of the one before."""
    async with connected(server.port) as reader:
        await reader.end_of(reader.ask(INFO, server_pb2.GetServerInfoRequest()))


def generate(reader: RawConnection, request_id: str) -> int:
    return reader.ask(GENERATE, generation_pb2.GenerateRequest(text="Hi", request_id=request_id))


@contextmanager
def without_collector() -> Iterator[None]:
    """Memory is given back because nothing refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def calls_of_grpc() -> int:
    """Calls that grpc's core may not free yet, and those to come."""
    return sum(type(each).__name__ == "RPCState" for each in gc.get_objects())


async def test_unread_streams_are_reset_and_freed(engine, caplog):
    """Each gets RST_STREAM, its request ends, grpc holds no call of theirs, and nothing waits to be sent any more; a
    stream of the same connection that is read gets all of its output."""
    with without_collector():
        async with serving(engine) as server, connected(server.port, window=0) as reader:
            before = calls_of_grpc()
            stalled = [generate(reader, f"stalled-{number}") for number in range(5)]
            read = generate(reader, "read")
            reader.read_on(read)
            await until(lambda: len(engine.live) == 6)
            await until(lambda: server.grpc.sender.held >= 5 * len(WORDS))
            await reader.until_reset(stalled)
            assert sorted(engine.aborted) == [f"stalled-{number}" for number in range(5)]
            engine.say("read", " end")
            engine.end("read")
            await reader.end_of(read)
            assert read not in reader.reset
            assert reader.body(read).count(b"word") == 2000
            await until(lambda: server.grpc.sender.held == 0)
            await touch(server)
            await until(lambda: calls_of_grpc() <= before)
            assert not reader.is_cut
    assert [record.message for record in caplog.records] == ["1 streams ended that were left unread"]


async def test_an_unread_response_is_reset_and_freed(engine):
    """A method of one response, too."""
    with without_collector():
        async with serving(engine) as server, connected(server.port, window=0) as reader:
            before = calls_of_grpc()
            stalled = [reader.ask(INFO, server_pb2.GetServerInfoRequest()) for _ in range(3)]
            await reader.until_answered(stalled)
            assert server.grpc.sender.held
            await touch(server)
            await reader.until_reset(stalled)
            assert server.grpc.sender.held == 0
            await touch(server)
            await until(lambda: calls_of_grpc() <= before)


async def test_a_connection_that_stalls_again_and_again_is_cut(engine):
    """Its other streams end with it; those of another connection go on."""
    async with (
        serving(engine) as server,
        connected(server.port, window=0) as honest,
        connected(server.port, window=0) as reader,
    ):
        read = generate(honest, "read")
        honest.read_on(read)
        await until(lambda: "read" in engine.live)
        last = [generate(reader, f"stalled-{number}") for number in range(MAX_STALLS + 3)][-1]
        reader.read_on(last)
        await reader.until_cut()
        await until(lambda: set(engine.live) == {"read"})
        engine.end("read")
        await honest.end_of(read)


async def test_a_stream_read_to_its_end_forgives_stalls(engine):
    """As many stalls in all as would cut the connection, with a stream that is read among them, do not."""
    async with serving(engine) as server, connected(server.port, window=0) as reader:
        for number in range(2):
            stalled = [generate(reader, f"stalled-{number}-{each}") for each in range(MAX_STALLS - 1)]
            read = generate(reader, f"read-{number}")
            reader.read_on(read)
            await reader.until_reset(stalled)
            engine.end(f"read-{number}")
            await reader.end_of(read)
        assert not reader.is_cut


async def test_a_connection_with_nothing_but_a_stream_that_cannot_be_reset_is_cut(engine):
    """The latest call of a server, which grpc keeps."""
    async with serving(engine) as server, connected(server.port, window=0) as reader:
        generate(reader, "stalled")
        await reader.until_cut()
        assert engine.aborted == ["stalled"]
        await until(lambda: server.grpc.sender.held == 0)


async def test_what_a_connection_leaves_unsent_is_bounded(engine):
    """Messages beyond the bound wait until others are gone; then a stream that is read gets its own."""
    async with (
        serving(engine, max_unsent_bytes_per_connection=4 * len(WORDS), write_timeout=2.5) as server,
        connected(server.port, window=0) as reader,
    ):
        stalled = [generate(reader, f"stalled-{number}") for number in range(MAX_STALLS - 2)]
        await reader.until_answered(stalled[:3])
        await asyncio.sleep(1.0)  # so that its time ends after theirs, on a busy machine too
        read = generate(reader, "read")
        reader.read_on(read)
        await until(lambda: len(engine.live) == len(stalled) + 1)
        assert 3 * len(WORDS) < server.grpc.sender.held <= 4 * len(WORDS)
        assert read not in reader.answered
        await reader.until_answered([read])
        assert reader.reset


async def test_what_all_leave_unsent_is_bounded(engine):
    """Beyond the bound of all the write that waits longest gives way, long before its own time is over."""
    async with (
        serving(engine, max_unsent_bytes=2 * len(WORDS) + 1000, write_timeout=1000.0) as server,
        connected(server.port, window=0) as reader,
        connected(server.port, window=0) as other,
    ):
        stalled = [generate(reader, f"stalled-{number}") for number in range(2)]
        await reader.until_answered(stalled)
        read = generate(other, "read")
        other.read_on(read)
        await other.until_answered([read])
        await reader.until_reset(stalled[:1])
        assert engine.aborted == ["stalled-0"]
        assert server.grpc.sender.held <= 2 * len(WORDS) + 1000


async def test_tasks_that_are_no_calls_are_made_as_before():
    """The event loop's own factory goes on making the tasks."""
    made, loop = [], asyncio.get_running_loop()

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **settings: Any) -> asyncio.Task[Any]:
        made.append(coro)
        return asyncio.Task(coro, loop=loop, **settings)

    loop.set_task_factory(make)
    async with serving(Talker()):
        coroutine = asyncio.sleep(0, "slept")
        assert await asyncio.create_task(coroutine, name="nap") == "slept"
    assert coroutine in made


@pytest.mark.parametrize("port", ["services", "health"])
async def test_an_unread_watch_of_health_is_reset_and_holds_up_nobody(engine, port):
    """A stranger's, on both ports: health is told on meanwhile, to others and at once."""
    async with serving(engine, security=SecurityConfig(health_port=0)) as server:
        number = server.port if port == "services" else server.grpc.health_port.port
        async with connected(number, window=0) as reader, connected(number) as honest:
            for _ in range(2):  # grpc keeps the first
                await honest.end_of(honest.ask(CHECK, health_pb2.HealthCheckRequest()))
            stalled = [reader.ask(WATCH, health_pb2.HealthCheckRequest()) for _ in range(3)]
            await reader.until_answered(stalled)
            read = honest.ask(WATCH, health_pb2.HealthCheckRequest())
            async with asyncio.timeout(0.5):
                await server.grpc.report(Health.DOWN)
            await reader.until_reset(stalled)
            await until(lambda: honest.body(read).endswith(NOT_SERVING))
            assert read not in honest.reset


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (REFLECTION, reflection_pb2.ServerReflectionRequest(list_services="")),
        (CHECK, health_pb2.HealthCheckRequest()),
    ],
    ids=["reflection", "health"],
)
async def test_what_services_of_grpc_s_own_answer_is_reset_too(engine, method, request_):
    """As other streams and responses are."""
    async with serving(engine) as server, connected(server.port, window=0) as reader:
        stalled = [reader.ask(method, request_) for _ in range(3)]
        await reader.until_answered(stalled)
        await touch(server)
        await reader.until_reset(stalled)
        assert server.grpc.sender.held == 0
