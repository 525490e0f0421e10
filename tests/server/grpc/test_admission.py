"""What a call may hold, whose it is, and what one is told that is not taken."""

from __future__ import annotations

import tracemalloc

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo

from hsrpc.client import AsyncClient
from hsrpc.errors import GaveWayError, InvalidRequestError, QueueFullError, WaitTooLongError
from hsrpc.request import SamplingParams
from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc.caller import client_name
from hsrpc.server.grpc.messages import read_params
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.grpc.test_status import details, failure, read_all, request


async def call(stub, *metadata: tuple[str, str], **settings) -> None:
    await read_all(stub.Generate(request(), metadata=metadata, **settings))


@pytest.mark.parametrize("error", [QueueFullError, GaveWayError, WaitTooLongError])
async def test_a_refusal_says_when_to_come_back(stub, engine, error):
    """RESOURCE_EXHAUSTED with RetryInfo and QuotaFailure, and the same delay for clients that retry by themselves."""
    engine.refusal = error("secret: 1024 wait", retry_after=6.4)
    refused = await failure(stub.Generate(request()))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(refused, RetryInfo).retry_delay.seconds == 7
    assert details(refused, QuotaFailure).violations
    assert dict(refused.trailing_metadata())["grpc-retry-pushback-ms"] == "7000"
    assert "secret" not in refused.details()


async def test_a_client_is_known_by_its_host_and_its_user_by_metadata(stub, engine):
    """The host, whatever its port, is the key of a client's share; x-hsrpc-client only says whose part of it."""
    await call(stub, ("x-hsrpc-client", "team-a"))
    await call(stub)
    assert (engine.clients, engine.users) == (["127.0.0.1"] * 2, ["team-a", ""])


async def test_a_verified_name_counts_and_a_claimed_one_does_not(engine):
    """Where a token or a certificate names the client, x-hsrpc-client names a user of that client."""

    class Named(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation, handler_call_details):
            client_name.set("alice")
            return await continuation(handler_call_details)

    server = Server(ServerConfig(port=0), [Named()])
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        await call(generation_pb2_grpc.GenerationServiceStub(channel), ("x-hsrpc-client", "bob"))
    await server.stop()
    assert (engine.clients, engine.users) == (["alice"], ["bob"])


@pytest.mark.parametrize("allowed", [-8, 0, 3])
async def test_nobody_is_more_urgent_than_allowed(allowed, engine):
    """A priority beyond max_priority is bounded to it, and start says so; one that is less urgent stays."""
    server = Server(ServerConfig(port=0, max_priority=allowed))
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address) as client:
        asked = (-1000, -8, 0, 3, 1000)
        started = [(await client.complete("Hi", priority=priority)).start.priority for priority in asked]
    await server.stop()
    assert started == [params.priority for params in engine.submitted] == [max(allowed, one) for one in asked]


@pytest.mark.parametrize("name", ["", "x" * 129, "two words", "a,b"])
async def test_a_bad_client_name_is_refused(stub, engine, name):
    """INVALID_ARGUMENT names the metadata key; nothing is submitted."""
    refused = await failure(stub.Generate(request(), metadata=(("x-hsrpc-client", name),)))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details(refused, BadRequest).field_violations] == ["x-hsrpc-client"]
    assert not engine.clients


async def test_the_deadline_bounds_the_wait(stub, engine):
    """The engine is told how long the caller waits at most; without a deadline, that it waits for ever."""
    await call(stub, timeout=50)
    await call(stub)
    assert 0 < engine.max_waits[0] <= 50.5
    assert engine.max_waits[1] is None


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (request(request_id="a b"), "request_id"),
        (request(request_id="../etc"), "request_id"),
        (request(request_id="né"), "request_id"),
        (request(stopping=v1.Stopping(stop=["x"] * 17)), "stopping.stop"),
        (request(stopping=v1.Stopping(stop=["x" * 257])), "stopping.stop"),
        (request(stopping=v1.Stopping(stop_token_ids=[1] * 100_000)), "stopping.stop_token_ids"),
        (request(sampling=v1.Sampling(logit_bias=dict.fromkeys(range(100_000), 1.0))), "sampling.logit_bias"),
        (request(output=v1.Output(logprobs=2**31 - 1)), "output.logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_over_a_cap_is_refused(stub, engine, message, field):
    """INVALID_ARGUMENT with the field's path, before the engine hears of it."""
    refused = await failure(stub.Generate(message))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details(refused, BadRequest).field_violations] == [field]
    assert not engine.clients


async def test_ids_may_have_letters_digits_and_marks(stub, engine):
    """The longest id, and each kind of character that one may have."""
    for request_id in ("x" * 128, "A-z_0.9:b"):
        await read_all(stub.Generate(request(request_id=request_id)))
    assert len(engine.submitted) == 2


def test_long_lists_are_not_copied():
    """A message with more entries than any list may have is refused in little memory."""
    message = request(sampling=v1.Sampling(logit_bias=dict.fromkeys(range(100_000), 1.0)))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError):
            read_params(message, SamplingParams())
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


async def test_an_oversized_message_is_refused(stub, engine):
    """A prompt larger than a message may be never reaches the service."""
    refused = await failure(stub.Generate(request(text="x" * ServerConfig().max_message_bytes)))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not engine.clients
