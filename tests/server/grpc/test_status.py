"""What a client is told when things go wrong, and what it is not told."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from functools import reduce
from itertools import chain

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo

from hsrpc.errors import QueueFullError, RequestFailedError
from hsrpc.request import Delta
from hsrpc.server.failure import Outcome
from hsrpc.server.grpc.status import status_code
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc, server_pb2
from tests.server.conftest import rich_status, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def failure(call) -> grpc.aio.AioRpcError:
    """The error that a Generate call or a unary call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            await (read_all(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return caught.value


async def read_all(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def details(error, kind):
    """The details of one kind."""
    found = kind()
    assert any(detail.Unpack(found) for detail in rich_status(error).details), rich_status(error)
    return found


def request(**fields) -> v1.GenerateRequest:
    return v1.GenerateRequest(**({"text": "Hi"} | fields))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (v1.GenerateRequest(), "input"),
        (request(text=""), "text"),
        (v1.GenerateRequest(token_ids=v1.TokenIds()), "token_ids"),
        (request(text="x" * 300), "text"),
        (v1.GenerateRequest(token_ids=v1.TokenIds(ids=[1] * 300)), "token_ids.ids"),
        (request(request_id=""), "request_id"),
        (request(request_id="x" * 129), "request_id"),
        (request(sampling=v1.Sampling(temperature=-1)), "sampling.temperature"),
        (request(sampling=v1.Sampling(temperature=math.nan)), "sampling.temperature"),
        (request(sampling=v1.Sampling(top_p=0)), "sampling.top_p"),
        (request(sampling=v1.Sampling(logit_bias={3: math.inf})), "sampling.logit_bias[3]"),
        (request(stopping=v1.Stopping(max_tokens=0)), "stopping.max_tokens"),
        (request(stopping=v1.Stopping(stop=[""])), "stopping.stop"),
        (request(stopping=v1.Stopping(time_limit=Duration(seconds=-1))), "stopping.time_limit"),
        (request(output=v1.Output(logprobs=21)), "output.logprobs"),
        (request(output=v1.Output(prompt_logprobs=21)), "output.prompt_logprobs"),
        (request(output=v1.Output(prompt_logprobs=-1)), "output.prompt_logprobs"),
        (request(constraint=v1.Constraint()), "constraint"),
        (request(constraint=v1.Constraint(json_schema='{"type": ')), "constraint.json_schema"),
        (request(constraint=v1.Constraint(regex="")), "constraint.regex"),
        (request(constraint=v1.Constraint(grammar="x" * 131_073)), "constraint.grammar"),
        (request(constraint=v1.Constraint(choice=v1.Choice())), "constraint.choice.texts"),
        (request(constraint=v1.Constraint(choice=v1.Choice(texts=["a", ""]))), "constraint.choice.texts[1]"),
        (request(constraint=v1.Constraint(choice=v1.Choice(texts=["a"] * 1025))), "constraint.choice.texts"),
        (request(output=v1.Output(max_tokens_per_message=0)), "output.max_tokens_per_message"),
        (request(output=v1.Output(max_message_delay=Duration(seconds=61))), "output.max_message_delay"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_field_is_named(stub, engine, message, field):
    """A request that is wrong in one field is INVALID_ARGUMENT with that field's path, and nothing is started."""
    error = await failure(stub.Generate(message))
    assert error.code() is INVALID
    assert [violation.field for violation in details(error, BadRequest).field_violations] == [field]
    assert not engine.live


def duration_fields(message: Descriptor, prefix: str = "") -> Iterator[str]:
    """Paths of the durations in a message."""
    for field in message.fields:
        if field.message_type is Duration.DESCRIPTOR:
            yield prefix + field.name
        elif field.message_type is not None and field.message_type.file.package == message.file.package:
            yield from duration_fields(field.message_type, f"{prefix}{field.name}.")


def requests_with_durations() -> list[tuple[str, str, str]]:
    """(method, request, path of a duration) of all that the service takes."""
    services = [file.DESCRIPTOR.services_by_name.values() for file in (v1, model_pb2, server_pb2)]
    return [
        (f"/{service.full_name}/{method.name}", method.input_type.full_name, path)
        for service in chain(*services)
        for method in service.methods
        for path in duration_fields(method.input_type)
    ]


def test_durations_are_found():
    """Those that there are today: the table below is not empty."""
    found = {path for _, _, path in requests_with_durations()}
    assert found >= {"stopping.time_limit", "output.max_message_delay", "interval"}


@pytest.mark.parametrize(("method", "name", "path"), requests_with_durations(), ids=lambda value: value)
async def test_a_malformed_duration_is_refused_in_every_field(server, channel, engine, method, name, path):
    """Mixed signs, too many nanoseconds and more than ten thousand years are INVALID_ARGUMENT, with what is wrong.

    Each would be in range as a number, but for the last.
    """
    make = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
    for seconds, nanos, problem in (
        (2, -1, "differ in sign"),
        (-1, 1, "differ in sign"),
        (1, 1_000_000_000, "nanos=1000000000 is outside"),
        (0, 2_000_000_000, "nanos=2000000000 is outside"),
        (60, -(2**31), "nanos=-2147483648 is outside"),
        (315_576_000_001, 0, "seconds=315576000001 is outside"),
        (-(2**63), -1, "seconds=-9223372036854775808 is outside"),
    ):
        message = make()
        if name == v1.GenerateRequest.DESCRIPTOR.full_name:
            message.text = "Hi"
        *homes, field = path.split(".")
        home = reduce(getattr, homes, message)
        getattr(home, field).CopyFrom(Duration(seconds=seconds, nanos=nanos))
        error = await failure(channel.unary_stream(method)(message.SerializeToString()))
        assert error.code() is INVALID, (seconds, nanos)
        [violation] = details(error, BadRequest).field_violations
        assert violation.field == path
        assert problem in violation.description
    assert not engine.submitted


def test_every_outcome_is_a_code():
    """Outcomes and gRPC's codes have the same names, so that none is lost on the way to a client or a metric."""
    assert [status_code(outcome).name for outcome in Outcome] == [code.name for code in grpc.StatusCode]


async def test_malformed_protobuf_is_the_clients_fault(server, channel):
    """Bytes that are no message are INVALID_ARGUMENT, without Python's words."""
    for method in ("/hsrpc.v1.GenerationService/Generate", "/hsrpc.v1.ModelService/GetModel"):
        error = await failure(channel.unary_stream(method)(b"\xff\xff\xff"))
        assert error.code() is INVALID
        assert error.details() == "the request is not a protobuf message of this method's type"


async def test_text_that_is_not_utf8_is_malformed(server, channel):
    """A string field with bytes that are no UTF-8 is INVALID_ARGUMENT."""
    error = await failure(channel.unary_stream("/hsrpc.v1.GenerationService/Generate")(b"\x1a\x01\xff"))
    assert error.code() is INVALID


async def test_an_unknown_model_is_not_found(stub, channel, engine):
    """Another model is NOT_FOUND everywhere, and the answer repeats nothing that was asked for."""
    model = model_pb2_grpc.ModelServiceStub(channel)
    calls = [
        stub.Generate(request(model="/etc/passwd")),
        model.GetModel(model_pb2.GetModelRequest(model="/etc/passwd")),
        model.Tokenize(model_pb2.TokenizeRequest(model="/etc/passwd", text="x")),
        model.Detokenize(model_pb2.DetokenizeRequest(model="/etc/passwd", token_ids=[1])),
    ]
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "passwd" not in str(rich_status(error))
    assert [response async for response in stub.Generate(request(model="fake/model"))]


async def test_a_live_id_is_taken(stub, engine):
    """A second request with a live id is ALREADY_EXISTS, and the first one goes on."""
    engine.held = True
    first = stub.Generate(request(request_id="r"))
    await until(lambda: engine.live)
    error = await failure(stub.Generate(request(request_id="r")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    engine.say("r", "a")
    engine.end("r")
    assert (await first.read()).delta.text == "a"


async def test_a_full_queue_says_when_to_retry(stub, engine):
    """A full queue is RESOURCE_EXHAUSTED within 50 ms, with RetryInfo and QuotaFailure."""
    [_ async for _ in stub.Generate(request())]  # connect before the clock runs
    engine.refusal = QueueFullError("1024 requests wait")
    elapsed = math.inf
    for _ in range(3):  # the fastest, since the machine may be busy
        start = asyncio.get_running_loop().time()
        error = await failure(stub.Generate(request()))
        elapsed = min(elapsed, asyncio.get_running_loop().time() - start)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error, RetryInfo).retry_delay.ToTimedelta().total_seconds() > 0
    assert details(error, QuotaFailure).violations
    assert elapsed < 0.05


async def test_loading_is_unavailable(loading_server, channel):
    """Before the model is loaded, calls are UNAVAILABLE with RetryInfo."""
    generation, model = generation_pb2_grpc.GenerationServiceStub(channel), model_pb2_grpc.ModelServiceStub(channel)
    for call in (generation.Generate(request()), model.GetModel(model_pb2.GetModelRequest())):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error, RetryInfo).HasField("retry_delay")
        assert details(error, ErrorInfo).reason == "LOADING"


async def test_draining_refuses_new_requests_only(server, stub, engine):
    """While a server drains, running requests go on, can be aborted, and new ones are UNAVAILABLE."""
    engine.held = True
    running = stub.Generate(request(request_id="r"))
    await until(lambda: engine.live)
    draining = asyncio.ensure_future(server.drain())
    await asyncio.sleep(0.01)
    error = await failure(stub.Generate(request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error, ErrorInfo).reason == "DRAINING"
    assert details(error, RetryInfo).HasField("retry_delay")
    assert not draining.done()
    assert (await stub.Abort(v1.AbortRequest(request_id="r"))).aborted
    assert (await running.read()).finish.reason == v1.FINISH_REASON_ABORTED
    await asyncio.wait_for(draining, 2)


async def test_what_is_not_supported_is_unimplemented(stub, channel, engine):
    """Settings that the server lacks, or does not know, are UNIMPLEMENTED with ErrorInfo and never ignored."""
    unknown = b"\x1a\x02Hi" + b"\xa2\x06\x01x"
    unknown_in_sampling = b"\x1a\x02Hi" + b"\x2a\x04\xa2\x06\x01x"
    raw = channel.unary_stream("/hsrpc.v1.GenerationService/Generate")
    calls = {
        "field 100 of hsrpc.v1.GenerateRequest": raw(unknown),
        "field 100 of hsrpc.v1.Sampling": raw(unknown_in_sampling),
    }
    for feature, call in calls.items():
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        info = details(error, ErrorInfo)
        assert (info.reason, info.domain, info.metadata["feature"]) == ("NOT_SUPPORTED", "hsrpc", feature)
    assert not engine.submitted


@pytest.mark.parametrize("secret", [RequestFailedError("NaN in /models/secret"), ValueError("/models/secret")])
async def test_an_unforeseen_error_is_internal_with_an_id(stub, engine, caplog, secret):
    """INTERNAL carries an error id that the log has too, and nothing of the exception; other requests go on."""
    engine.refusal = secret
    with caplog.at_level(logging.ERROR):
        error = await failure(stub.Generate(request()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(rich_status(error)) + error.details()
    assert details(error, ErrorInfo).metadata["error_id"] in caplog.text
    engine.refusal = None
    assert [response async for response in stub.Generate(request())]


async def test_a_failed_request_fails_alone(stub, engine):
    """A request that cannot go on ends INTERNAL after its text so far; its neighbour finishes."""
    engine.held = True
    calls = {name: stub.Generate(request(request_id=name)) for name in ("bad", "good")}
    await until(lambda: len(engine.live) == 2)
    engine.say("bad", "a")
    engine.live["bad"].fail(RequestFailedError("logits"))
    assert (await calls["bad"].read()).delta.text == "a"
    assert (await failure(calls["bad"])).code() is grpc.StatusCode.INTERNAL
    engine.end("good")
    assert (await calls["good"].read()).finish.reason == v1.FINISH_REASON_EOS


async def test_an_engine_fault_ends_every_stream(server, stub, engine):
    """When the engine dies its streams end UNAVAILABLE, with nothing internal said, and new requests do too."""
    engine.held = True
    calls = [stub.Generate(request(request_id=str(i))) for i in range(3)]
    await until(lambda: len(engine.live) == 3)
    engine.die()
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "secret" not in error.details()
    await server.fail()
    assert details(await failure(stub.Generate(request())), ErrorInfo).reason == "FAILED"


async def test_cancelling_closes_the_generation(stub, engine):
    """A client that cancels, before or after the first token, stops the engine's work."""
    engine.held = True
    for request_id in ("early", "late"):
        call = stub.Generate(request(request_id=request_id))
        await until(lambda request_id=request_id: request_id in engine.live)
        if request_id == "late":
            engine.say("late", "a")
            await call.read()
        call.cancel()
        await until(lambda request_id=request_id: request_id in engine.aborted)


async def test_a_vanished_client_closes_the_generation(server, engine):
    """When the connection goes, the engine's work goes."""
    engine.held = True
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request(request_id="r"))
        await until(lambda: engine.live)
    assert call.done()
    await until(lambda: engine.aborted == ["r"])


async def test_a_deadline_closes_the_generation(stub, engine):
    """A deadline that passes is DEADLINE_EXCEEDED, and stops the engine's work."""
    engine.held = True
    error = await failure(stub.Generate(request(request_id="r"), timeout=0.1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.aborted == ["r"])


async def test_a_client_that_does_not_read_is_dropped(stub, engine):
    """Once the transport is full, an unread stream ends after write_timeout and its work stops."""
    engine.held = True
    call = stub.Generate(request(request_id="r"))
    await until(lambda: engine.live)
    for _ in range(40):
        if engine.aborted:
            break
        engine.live["r"].put(Delta("x" * 1024**2, (1,)))
        await asyncio.sleep(0.05)
    await until(lambda: engine.aborted == ["r"])
    error = await failure(call)
    assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


async def test_an_empty_id_cannot_be_aborted(stub):
    """Abort without an id is INVALID_ARGUMENT."""
    error = await failure(stub.Abort(v1.AbortRequest()))
    assert error.code() is INVALID


async def test_a_stream_without_an_end_is_an_error(stub, engine: FakeEngine):
    """A generation that just stops never looks like a success."""
    engine.held = True
    call = stub.Generate(request(request_id="r"))
    await until(lambda: engine.live)
    engine.say("r", "a")
    await call.read()
    engine.live["r"].close()
    error = await failure(call)
    assert error.code() is grpc.StatusCode.INTERNAL
