"""gRPC's interoperability cases that apply to this service, against its server with its options and an interceptor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

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
    server = Server(ServerConfig(port=0, drain_timeout=5, vllm_engine=True), [echo])
    await server.start()
    yield server
    await server.stop()


class V1:
    """Generate of hsrpc.v1; the engine's word of n characters is a delta of as many."""

    path = "/hsrpc.v1.GenerationService/Generate"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)

    def generate(self, text: str = "Hi", request_id: str | None = None, **settings: float) -> grpc.aio.UnaryStreamCall:
        return self._stub.Generate(v1.GenerateRequest(request_id=request_id, text=text), **settings)

    def size(self, response: v1.GenerateResponse) -> int:
        return len(response.delta.text)

    def is_last(self, response: v1.GenerateResponse) -> bool:
        return response.HasField("finish")


class Vllm:
    """Generate of VllmEngine; the engine's word of n characters is token n."""

    path = "/vllm.grpc.engine.VllmEngine/Generate"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)

    def generate(self, text: str = "Hi", request_id: str | None = None, **settings: float) -> grpc.aio.UnaryStreamCall:
        return self._stub.Generate(vllm.GenerateRequest(request_id=request_id, text=text, stream=True), **settings)

    def size(self, response: vllm.GenerateResponse) -> int:
        return response.chunk.token_ids[0]

    def is_last(self, response: vllm.GenerateResponse) -> bool:
        return response.HasField("complete")


@pytest.fixture(params=[V1, Vllm], ids=["hsrpc.v1", "VllmEngine"])
def door(request: pytest.FixtureRequest, server: Server, channel: grpc.aio.Channel) -> V1 | Vllm:
    return request.param(channel)


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


async def test_a_long_prompts_logprobs_arrive_whole(server, channel, engine):
    """In messages of no more than a client takes unasked, which all of them together are not."""
    engine.max_model_len = 1_000_000
    output = v1.Output(prompt_logprobs=20)
    call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
        v1.GenerateRequest(text="x" * 20_000, stopping=v1.Stopping(max_tokens=0), output=output), timeout=TIMEOUT
    )
    responses = [response async for response in call]
    places = [logprob.rank for response in responses for logprob in response.delta.prompt_logprobs]
    assert places == list(range(1, 20_000))
    assert max(response.ByteSize() for response in responses) < 2**20
    assert sum(response.ByteSize() for response in responses) > 2**22


async def test_a_message_that_is_too_large_is_refused(server, door):
    """More than max_message_bytes is RESOURCE_EXHAUSTED, and the connection still serves."""
    call = door.generate("x" * (server.config.max_message_bytes + 1))
    assert (await ended(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len([response async for response in door.generate()]) > 0


async def test_server_streaming(door, engine):
    """Messages of a stream arrive in order, each as it was sent."""
    engine.held = True
    call = door.generate(request_id="r", timeout=TIMEOUT)
    await until(lambda: engine.live)
    for size in (31_415, 9, 2_653, 58_979):
        engine.say("r", "x" * size)
        assert door.size(await call.read()) == size
    engine.end("r")
    assert door.is_last(await call.read())
    assert await call.read() is grpc.aio.EOF


async def test_empty_stream(server, channel, door):
    """A call that sends no request at all is ended by the server, without work, when the client goes."""

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    call = channel.stream_stream(door.path)(nothing(), timeout=1)
    code, _ = await ended(call)
    assert code is not grpc.StatusCode.OK
    assert server.state.live == 0


async def test_cancel_after_begin(door, engine, server):
    """A call that is cancelled before any response ends CANCELLED, and nothing is left of it."""
    engine.held = True
    call = door.generate(request_id="r")
    await until(lambda: engine.live)
    call.cancel()
    assert (await ended(call))[0] is grpc.StatusCode.CANCELLED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


async def test_cancel_after_first_response(door, engine, server):
    """A call that is cancelled amid its responses ends CANCELLED, and nothing is left of it."""
    engine.held = True
    call = door.generate(request_id="r")
    await until(lambda: engine.live)
    engine.say("r", "Once")
    assert door.size(await call.read()) == 4
    call.cancel()
    assert (await ended(call))[0] is grpc.StatusCode.CANCELLED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


async def test_timeout_on_sleeping_server(door, engine, server):
    """A deadline that passes while the server waits is DEADLINE_EXCEEDED, and nothing is left of the call."""
    engine.held = True
    call = door.generate(request_id="r", timeout=0.2)
    await until(lambda: engine.live)
    assert (await ended(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


@pytest.mark.parametrize("message", ["test status message", SPECIAL], ids=["plain", "special"])
async def test_status_code_and_message(door, engine, message):
    """Status and message arrive as they were given, whitespace, percent signs and Unicode included."""
    engine.refusal = InvalidRequestError("text", message)
    code, found = await ended(door.generate())
    assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, f"text: {message}")


@pytest.mark.parametrize(
    "name", ["hsrpc.v1.GenerationService/Nothing", "hsrpc.v1.NoService/Generate", "vllm.grpc.engine.VllmEngine/Nothing"]
)
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
