"""Calls that end early, over a real engine and a real channel: work stops, blocks are free, no one else notices."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import grpc
import pytest
import torch
from google.protobuf.duration_pb2 import Duration

from hsrpc.engine.engine import Engine
from hsrpc.model.sampler import Sampled
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Step
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.engine.support import PATIENCE, gone, idle, live, parts, until
from tests.server.conftest import stub_of
from tests.server.test_real_engine import CONFIG

LIMIT = 0.8
"""Seconds: for the deadlines and time limits that are to pass."""
LONG = list(range(5, 205))
SPARE = 4
"""Tasks and descriptors, of all that this process has, that there may be more of at one moment than at another. Calls
that kept one each would have hundreds."""


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    torch.set_num_threads(1)
    async with Engine(replace(CONFIG, min_batch=2, max_batch=2, max_prefill_tokens=32)) as engine:
        yield engine


@pytest.fixture
async def stub(engine: Engine) -> AsyncIterator[generation_pb2_grpc.GenerationServiceAsyncStub]:
    async with stub_of(engine) as stub:
        yield stub


class Gate:
    """Holds the first step before which `reached` is true; counts a request's blocks at each step that follows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._execute = parts(engine).executor.execute
        self._open, self.closed = asyncio.Event(), asyncio.Event()
        self._reached: Callable[[], object] | None = None
        self.request: Request | None = None
        self.blocks: list[int] = []
        self._open.set()
        parts(engine).executor.execute = self.execute

    def close_when(self, reached: Callable[[], object]) -> None:
        self._reached = reached
        self.closed.clear()

    def open(self) -> None:
        self.blocks = []
        self._open.set()

    async def execute(self, step: Step, ahead: Step | None = None) -> Sequence[Sampled] | None:
        if self.request is not None:
            self.blocks.append(len(self.request.blocks))
        if self._reached is not None and self._reached():
            self._reached = None
            self._open.clear()
            self.closed.set()
        await self._open.wait()
        return await self._execute(step, ahead)


def is_queued(request: Request) -> bool:
    return request.scheduled_time is None


def is_prefilling(request: Request) -> bool:
    return 0 < request.num_computed < request.num_prompt_tokens


def is_decoding(request: Request) -> bool:
    return request.num_output_tokens > 1


STATES = {"queued": is_queued, "prefilling": is_prefilling, "decoding": is_decoding}


def message(ids: Sequence[int], max_tokens: int = 200, request_id: str | None = None) -> v1.GenerateRequest:
    return v1.GenerateRequest(
        request_id=request_id,
        token_ids=v1.TokenIds(ids=ids),
        sampling=v1.Sampling(temperature=0),
        stopping=v1.Stopping(max_tokens=max_tokens, ignore_eos=True),
        output=v1.Output(return_token_ids=True),
    )


async def token_ids(call: grpc.aio.UnaryStreamCall) -> list[int]:
    return [token_id async for response in call for token_id in response.delta.token_ids]


async def end_of(call: grpc.aio.UnaryStreamCall) -> str:
    """Name of the finish reason of a call that ends well, or of the status of one that does not."""
    finish = 0
    try:
        async for response in call:
            finish = response.finish.reason
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except asyncio.CancelledError:
        assert call.cancelled()
        return "CANCELLED"
    return v1.FinishReason.Name(finish)


ENDS = {
    "deadline": "DEADLINE_EXCEEDED",
    "cancel": "CANCELLED",
    "abort": "FINISH_REASON_ABORTED",
    "time limit": "FINISH_REASON_TIME_LIMIT",
}


@pytest.mark.parametrize("way", ENDS)
async def test_leaving_frees_the_blocks_with_the_step(way: str, stub, engine: Engine):
    """Queued, in prefill, in decode: however a call ends early, its blocks are free once the step at hand is done,
    and its neighbour gets the tokens that it gets alone."""
    expected = await token_ids(stub.Generate(message(LONG[:9], 60)))
    gate = Gate(engine)
    async with asyncio.timeout(4 * PATIENCE):
        for state, reached in STATES.items():
            first = stub.Generate(message(LONG[:9], 60))
            neighbour = asyncio.create_task(token_ids(first))
            blockers = [stub.Generate(message(LONG[:3]))] if state == "queued" else []
            gate.request = None
            gate.close_when(lambda: engine.stats().running >= 1 + len(blockers))  # noqa: B023
            await gate.closed.wait()
            await leave_in(way, reached, gate, stub, engine)
            for blocker in blockers:
                blocker.cancel()
            assert await neighbour == expected
            await idle(engine)


async def leave_in(way: str, reached: Callable[[Request], bool], gate: Gate, stub, engine: Engine) -> None:
    """One call that ends `way` while a step is held in which `reached` is true of it; others are held with it."""
    left = message(LONG, request_id="left")
    if way == "time limit":
        left.stopping.time_limit.CopyFrom(Duration(nanos=int(LIMIT * 1e9)))
    call = stub.Generate(left, timeout=LIMIT if way == "deadline" else None)
    ended = asyncio.create_task(end_of(call))
    await until(lambda: live(engine, "left"))
    gate.request = live(engine, "left")
    if not reached(gate.request):
        gate.close_when(lambda: reached(gate.request))
        gate.open()
        await gate.closed.wait()
    if way == "cancel":
        call.cancel()
    elif way == "abort":
        assert (await stub.Abort(v1.AbortRequest(request_id="left"))).aborted
    assert await ended == ENDS[way]
    await until(lambda: live(engine, "left") is None)
    gate.open()
    await until(lambda: gate.blocks)
    assert gate.blocks[0] == 0


async def leave_many(stub, count: int) -> None:
    """Calls that are cancelled at once, after a while or after the first token, or whose deadline passes."""
    for index in range(count):
        call = stub.Generate(message(LONG[: 1 + index % 40]), timeout=0.01 if index % 4 == 0 else None)
        if index % 4 == 1:
            await call.read()
        elif index % 4 == 2:
            await asyncio.sleep(0.002)
        if index % 4:
            call.cancel()
        assert await call.code() is not grpc.StatusCode.OK


def open_files() -> list[str]:
    """What this process's descriptors are; those that end meanwhile are left out."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


async def test_many_cancelled_calls_leave_nothing(stub, engine: Engine):
    """After hundreds of calls that ended early: no task, descriptor, block or memory more than after the first ones."""

    def held() -> tuple[list[str], list[str]]:
        return [str(task) for task in asyncio.all_tasks()], open_files()

    async def settle() -> int:
        await idle(engine)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def grown() -> list[object]:
        lists = zip(held(), before, strict=True)
        return [now for now, then in lists if len(now) > len(then) + SPARE]

    tracemalloc.start()
    try:
        await leave_many(stub, 40)
        memory, before = await settle(), held()
        await leave_many(stub, 200)
        await gone(grown)
        assert await settle() - memory < 300_000
    finally:
        tracemalloc.stop()
    assert len(engine._scheduler._queue._lines) == 0
    assert await token_ids(stub.Generate(message(LONG[:5], 4)))
