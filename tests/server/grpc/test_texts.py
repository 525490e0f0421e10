"""Tokenize and Detokenize cost no more than a Generate of the same size may, and are refused where it is."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo

from hsrpc.errors import QueueFullError
from hsrpc.server.state import Phase
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1.model_pb2 import DetokenizeRequest, TokenizeRequest
from hsrpc.v1.model_pb2_grpc import ModelServiceStub
from tests.server.conftest import until
from tests.server.grpc.test_status import details, failure


class SlowEngine(FakeEngine):
    """Its tokenizer waits until the call is cancelled, or it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.num_cancelled = 0

    async def tokenize(self, text: str, *, client: str = "") -> list[int]:
        return await self._wait(super().tokenize(text, client=client))

    async def detokenize(self, token_ids, **options) -> str:
        return await self._wait(super().detokenize(token_ids, **options))

    async def _wait(self, work):
        result = await work
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return result


@pytest.fixture
async def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def model(server, channel) -> ModelServiceStub:
    return ModelServiceStub(channel)


def both(model: ModelServiceStub, **options):
    return [
        model.Tokenize(TokenizeRequest(text="Hi"), **options),
        model.Detokenize(DetokenizeRequest(token_ids=[72]), **options),
    ]


async def test_what_cannot_fit_is_refused_by_its_field(model, engine):
    """Beyond 64 characters for each token of the context, or as many ids as it has, whatever they are."""
    engine.go_on.set()
    assert len((await model.Tokenize(TokenizeRequest(text="x" * 64 * 256))).token_ids) == 64 * 256
    assert len((await model.Detokenize(DetokenizeRequest(token_ids=[72] * 256))).text) == 256
    for call, field, most in (
        (model.Tokenize(TokenizeRequest(text="x" * (64 * 256 + 1))), "text", 64 * 256),
        (model.Detokenize(DetokenizeRequest(token_ids=[-1] * 257)), "token_ids", 256),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details(error, BadRequest).field_violations
        assert violation.field == field
        assert f"at most {most} " in violation.description


async def test_a_full_queue_refuses_texts_for_now(model, engine):
    """RESOURCE_EXHAUSTED says when to try again, as for Generate."""
    engine.refusal = QueueFullError("1024 requests wait already", retry_after=2.0)
    for call in both(model):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error, RetryInfo).retry_delay.ToTimedelta().total_seconds() == 2
        assert details(error, QuotaFailure).violations


async def test_the_callers_share_is_that_of_its_name(model, engine):
    """The key of a client's turns is that of its share; a name that is none is refused."""
    engine.go_on.set()
    for call in both(model, metadata=(("x-hsrpc-client", "team-a"),)):
        await call
    assert engine.clients == ["127.0.0.1", "127.0.0.1"]  # a name by metadata is that of a user of the host
    for call in both(model, metadata=(("x-hsrpc-client", "no name"),)):
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_whose_caller_leaves_ends(model, engine):
    """What it asked for is cancelled with it, whether the caller cancels or its deadline passes."""
    calls = [*both(model), *both(model, timeout=1.0)]  # all have begun by then on a busy machine, too
    await until(lambda: len(engine.clients) == 4)
    for call in calls[:2]:
        call.cancel()
    await until(lambda: engine.num_cancelled == 4)


async def test_a_server_that_drains_takes_no_texts_and_ends_those_it_has(model, engine, server):
    """New ones are UNAVAILABLE with RetryInfo; draining waits for those under way."""
    calls = both(model)
    await until(lambda: len(engine.clients) == 2)
    draining = asyncio.create_task(server.drain())
    await until(lambda: server.state.phase is Phase.DRAINING)
    for call in both(model):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error, RetryInfo)
    assert not draining.done()
    engine.go_on.set()
    assert list((await calls[0]).token_ids) == [72, 105]
    assert (await calls[1]).text == "H"
    await draining
