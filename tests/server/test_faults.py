"""Faults of one request and of the device, through a real server over a real engine: who ends, and what is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
import torch
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from hsrpc.engine.engine import Engine
from hsrpc.v1 import generation_pb2_grpc
from tests.engine.support import before_sampling, edit_logits, idle
from tests.server.conftest import stub_of
from tests.server.grpc.test_status import details
from tests.server.test_leaving import message, token_ids
from tests.server.test_real_engine import CONFIG

BAD, GOOD = [5, 6, 7], [9, 8, 7]


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    torch.set_num_threads(1)
    async with Engine(CONFIG) as engine:
        yield engine


@pytest.fixture
async def stub(engine: Engine) -> AsyncIterator[generation_pb2_grpc.GenerationServiceAsyncStub]:
    async with stub_of(engine) as stub:
        yield stub


def spoil_logits(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """NaN in the first row of the next step."""
    rest = iter([float("nan")])

    def spoil(logits: torch.Tensor) -> None:
        logits[0, 17] = next(rest, logits[0, 17])

    edit_logits(engine, patch, spoil)


def spoil_text(engine: Engine, _: pytest.MonkeyPatch) -> None:
    """The text of one request cannot be made."""

    def boom(*_: object) -> None:
        raise RuntimeError("secret")

    engine._delivery.live["bad"].detokenizer.push = boom


def run_out(patch: pytest.MonkeyPatch) -> None:
    """The device has no memory for the next step."""
    rest = iter([torch.OutOfMemoryError("secret")])

    def fail() -> None:
        for error in rest:
            raise error

    before_sampling(patch, fail)


async def begun(stub) -> list[grpc.aio.UnaryStreamCall]:
    """Two streams, each of which has had its first token; the bad one was there first."""
    calls = []
    for ids, name in ((BAD, "bad"), (GOOD, "good")):
        calls.append(stub.Generate(message(ids, 100, request_id=name)))
        assert (await anext(aiter(calls[-1]))).HasField("start")
    return calls


async def error_of(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await token_ids(call)
    assert "secret" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("spoil", [spoil_logits, spoil_text])
async def test_a_spoiled_request_ends_alone(spoil, stub, engine, caplog, monkeypatch):
    """Logits that are no numbers, and text that cannot be made, are INTERNAL with an error id that is in the log; the
    neighbour gets its tokens, and nothing is left in use."""
    expected = await token_ids(stub.Generate(message(GOOD, 100)))
    bad, good = await begun(stub)
    with caplog.at_level(logging.ERROR):
        spoil(engine, monkeypatch)
        error, tokens = await asyncio.gather(error_of(bad), token_ids(good))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert details(error, ErrorInfo).metadata["error_id"] in caplog.text
    assert tokens == expected[-len(tokens) :]
    assert len(tokens) > 50
    await idle(engine)


async def test_a_step_without_device_memory_ends_its_requests(stub, engine, monkeypatch):
    """They are RESOURCE_EXHAUSTED and may be tried again; blocks and buffers are back, and the next request works."""
    expected = await token_ids(stub.Generate(message(GOOD, 100)))
    calls = await begun(stub)
    run_out(monkeypatch)
    for error in await asyncio.gather(*map(error_of, calls)):
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error, RetryInfo).HasField("retry_delay")
    await idle(engine)
    assert await token_ids(stub.Generate(message(GOOD, 100))) == expected
