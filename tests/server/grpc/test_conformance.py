"""gRPC's interoperability cases that apply to this service, against its server with its options and an interceptor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from hsrpc.errors import InvalidRequestError
from hsrpc.server import Server, ServerConfig
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import until

TIMEOUT = 10
ECHO, ECHO_BIN = "x-grpc-test-echo-initial", "x-grpc-test-echo-trailing-bin"
SPECIAL = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈 100%\t\n"


class Echo(grpc.aio.ServerInterceptor):
    """Sends two metadata keys back, and otherwise leaves the call to the handler."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        self.methods.append(details.method)
        handler = await continuation(details)
        sent = dict(details.invocation_metadata)
        if handler is None or not handler.unary_unary or ECHO not in sent:
            return handler

        async def echo(request: bytes, context: grpc.aio.ServicerContext) -> object:
            await context.send_initial_metadata(((ECHO, sent[ECHO]),))
            context.set_trailing_metadata(((ECHO_BIN, sent[ECHO_BIN]),))
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(echo, handler.request_deserializer, handler.response_serializer)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def loading_server(echo: Echo) -> AsyncIterator[Server]:
    """Bound, without an engine, with an interceptor."""
    server = Server(ServerConfig(port=0, drain_timeout=5), [echo])
    await server.start()
    yield server
    await server.stop()


async def ended(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(TIMEOUT):
        return await call.code(), await call.details() or ""


async def test_empty_unary(server, channel):
    """A call of an empty message gets an empty payload's answer; the request's own meaning is the only refusal."""
    assert len(await channel.unary_unary("/hsrpc.v1.ServerService/GetServerInfo")(b"", timeout=TIMEOUT)) > 0


async def test_large_unary(server, channel, engine):
    """A request of 271,828 bytes and a response of as many arrive whole."""
    engine.max_model_len = 1_000_000
    call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
        v1.GenerateRequest(text="x" * 271_828, output=v1.Output(echo_prompt=True)), timeout=TIMEOUT
    )
    text = "".join([response.delta.text async for response in call])
    assert text == "x" * 271_828 + "Once upon a time"


async def test_a_message_that_is_too_large_is_refused(server, stub):
    """More than max_message_bytes is RESOURCE_EXHAUSTED, and the connection still serves."""
    request = v1.GenerateRequest(text="x" * (server.config.max_message_bytes + 1))
    assert (await ended(stub.Generate(request)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len([response async for response in stub.Generate(v1.GenerateRequest(text="Hi"))]) > 0


async def test_server_streaming(stub, engine):
    """Messages of a stream arrive in order, each as it was sent."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"), timeout=TIMEOUT)
    await until(lambda: engine.live)
    for size in (31_415, 9, 2_653, 58_979):
        engine.say("r", "x" * size)
        assert len((await call.read()).delta.text) == size
    engine.end("r")
    assert (await call.read()).HasField("finish")
    assert await call.read() is grpc.aio.EOF


async def test_empty_stream(server, channel, echo):
    """A call that sends no request at all is ended by the server, without work, when the client goes."""

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    call = channel.stream_stream("/hsrpc.v1.GenerationService/Generate")(nothing(), timeout=1)
    code, _ = await ended(call)
    assert code is not grpc.StatusCode.OK
    assert server.state.live == 0


async def test_cancel_after_begin(stub, engine, server):
    """A call that is cancelled before any response ends CANCELLED, and nothing is left of it."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    call.cancel()
    assert (await ended(call))[0] is grpc.StatusCode.CANCELLED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


async def test_cancel_after_first_response(stub, engine, server):
    """A call that is cancelled amid its responses ends CANCELLED, and nothing is left of it."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    engine.say("r", "Once")
    assert (await call.read()).delta.text == "Once"
    call.cancel()
    assert (await ended(call))[0] is grpc.StatusCode.CANCELLED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


async def test_timeout_on_sleeping_server(stub, engine, server):
    """A deadline that passes while the server waits is DEADLINE_EXCEEDED, and nothing is left of the call."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"), timeout=0.2)
    await until(lambda: engine.live)
    assert (await ended(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


@pytest.mark.parametrize("message", ["test status message", SPECIAL], ids=["plain", "special"])
async def test_status_code_and_message(stub, engine, message):
    """Status and message arrive as they were given, whitespace, percent signs and Unicode included."""
    engine.refusal = InvalidRequestError("text", message)
    code, found = await ended(stub.Generate(v1.GenerateRequest(text="Hi")))
    assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, f"text: {message}")


@pytest.mark.parametrize("name", ["hsrpc.v1.GenerationService/Nothing", "hsrpc.v1.NoService/Generate"])
async def test_unimplemented_method_and_service(server, channel, name):
    """What is not there is UNIMPLEMENTED, and the connection still serves."""
    assert (await ended(channel.unary_unary(f"/{name}")(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert await channel.unary_unary("/hsrpc.v1.ModelService/GetModel")(b"", timeout=TIMEOUT)


async def test_custom_metadata(server, channel, echo):
    """Initial and trailing metadata, text and binary, pass in both directions through an interceptor."""
    binary = bytes(range(256))
    call = channel.unary_unary("/hsrpc.v1.ModelService/GetModel")(
        b"", metadata=((ECHO, "test_initial_metadata_value"), (ECHO_BIN, binary)), timeout=TIMEOUT
    )
    assert await call
    assert dict(await call.initial_metadata())[ECHO] == "test_initial_metadata_value"
    assert dict(await call.trailing_metadata())[ECHO_BIN] == binary
    assert echo.methods == ["/hsrpc.v1.ModelService/GetModel"]


async def test_concurrent_large_unary(server, channel):
    """A hundred calls at once over one connection all come back."""
    call = channel.unary_unary("/hsrpc.v1.ModelService/GetModel")
    assert all(await asyncio.gather(*(call(b"", timeout=TIMEOUT) for _ in range(100))))
