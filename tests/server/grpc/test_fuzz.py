"""Whatever a client sends, it gets a documented status, and the server lives on."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import suppress

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from smg_grpc_proto import vllm_engine_pb2 as vllm

from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc.vllm_messages import TAKEN, TAKEN_PARAMS
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2 as v1

EXAMPLES = int(os.environ.get("HSRPC_FUZZ_EXAMPLES", "300"))
VLLM = "/vllm.grpc.engine.VllmEngine"
METHODS = (
    "/hsrpc.v1.GenerationService/Generate",
    "/hsrpc.v1.GenerationService/Abort",
    "/hsrpc.v1.ModelService/GetModel",
    "/hsrpc.v1.ModelService/Tokenize",
    "/hsrpc.v1.ModelService/Detokenize",
    "/hsrpc.v1.ServerService/GetServerInfo",
    *(f"{VLLM}/{method.name}" for method in vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods),
)
GENERATE = {"/hsrpc.v1.GenerationService/Generate": v1.GenerateRequest, f"{VLLM}/Generate": vllm.GenerateRequest}
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Codes of docs/grpc.md that a client can bring about by what it sends. INTERNAL is a fault of the server's."""

REFUSED = {
    field.full_name
    for kind, taken in ((vllm.GenerateRequest, TAKEN), (vllm.SamplingParams, TAKEN_PARAMS))
    for field in kind.DESCRIPTOR.fields
    if field.name not in taken
}
"""Fields that are refused whatever they hold: set as often as others, they would leave nothing else to be seen."""
INTS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def numbers(low: int, high: int) -> st.SearchStrategy[int]:
    """Any number of a type, with a liking for the small, the largest and the least."""
    return st.one_of(
        st.integers(-3, 600).filter(lambda n: low <= n <= high), st.sampled_from([low, high]), st.integers(low, high)
    )


def values(field: FieldDescriptor) -> st.SearchStrategy[object]:
    """One value of a field."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(field.message_type._concrete_class)
    if field.type in INTS:
        return numbers(*INTS[field.type])
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return st.one_of(st.floats(0, 2), st.floats())
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return st.one_of(st.floats(0, 2, width=32), st.floats(width=32))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=12)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    assert field.type == FieldDescriptor.TYPE_STRING, field.full_name
    return st.one_of(st.text(max_size=12), st.integers(1, 5000).map("x".__mul__), st.just("fake/model"))


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message with any of its fields set to anything; a request mostly has a prompt."""
    message = kind()
    if kind in GENERATE.values() and draw(st.booleans()):
        message.text = "Hi"
    for field in kind.DESCRIPTOR.fields:
        if draw(st.integers(0, 3 if field.full_name not in REFUSED else 60)):
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            drawn = draw(st.dictionaries(values(key), values(value), max_size=4))
            message.MergeFrom(kind(**{field.name: drawn}))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field), max_size=5)))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


@st.composite
def mutated(draw: st.DrawFn, kind: type[Message]) -> bytes:
    """A message's bytes with some cut out, put in or changed."""
    data = bytearray(draw(messages(kind)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


def payloads(kind: type[Message]) -> st.SearchStrategy[bytes]:
    whole = messages(kind).map(lambda message: message.SerializeToString())
    return st.one_of(whole, whole, mutated(kind), st.binary(max_size=200))


CALLS = st.one_of(
    *(st.tuples(st.just(method), payloads(kind)) for method, kind in GENERATE.items()),
    st.tuples(st.sampled_from(METHODS), st.one_of(map(payloads, GENERATE.values()))),
)


async def status_of(channel: grpc.aio.Channel, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """How the call ends, and what it says; one response is a stream too. A call that does not end fails the test."""
    call = channel.unary_stream(method)(data)
    async with asyncio.timeout(20):
        with suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code(), await call.details() or ""


class Target:
    """A server, a channel to it, and the loop that both run on: hypothesis is synchronous."""

    def __enter__(self) -> Target:
        self._runner = asyncio.Runner()
        self._runner.run(self._start())
        self.seen: Counter[tuple[str, grpc.StatusCode]] = Counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    def send(self, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
        code, text = self._runner.run(status_of(self._channel, method, data))
        self.seen[method, code] += 1
        return code, text

    async def _start(self) -> None:
        self._server = Server(ServerConfig(port=0, vllm_engine=True))
        await self._server.start()
        self.engine = FakeEngine()
        await self._server.attach(self.engine)
        self._channel = grpc.aio.insecure_channel(self._server.address)

    async def _stop(self) -> None:
        await self._channel.close()
        await self._server.stop()


def test_only_documented_statuses_come_back():
    """Random fields, extreme numbers and random bytes end OK or with a status that is the client's fault."""
    with Target() as target:

        @seed(4)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(CALLS)
        def fuzz(call: tuple[str, bytes]) -> None:
            code, text = target.send(*call)
            assert code in DOCUMENTED, f"{code}: {text}"
            assert not any(word in text for word in ("Traceback", "site-packages", "Error", "Exception"))
            assert not target.engine.live

        fuzz()
        assert any(target.seen[method, grpc.StatusCode.OK] for method in GENERATE)
        for method, kind in GENERATE.items():
            assert target.seen[method, grpc.StatusCode.INVALID_ARGUMENT]
            assert target.send(method, kind(text="Hi").SerializeToString())[0] is grpc.StatusCode.OK
        print(f"{target.seen.total()} calls:", {f"{way} {code.name}": n for (way, code), n in target.seen.items()})
