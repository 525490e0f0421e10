"""What the engine's tests share: small configurations, and what an engine looks like that has nothing to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.engine.forward import Pass
from hsrpc.engine.gpus.one import OneGpu
from hsrpc.model.sampler import PendingSample, Sampler
from hsrpc.request import Delta
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import SamplingRow, Step, StepCounts, StopFlag
from hsrpc.schedule.sweep import Op, OpKind, OpList
from tests.engine.conftest import tightest
from tests.engine.reference import Reference

PATIENCE = 20.0
"""Seconds that a test waits at most for something that takes milliseconds."""

ENGINE_TASKS = 6
"""The group, and in it the prefetcher, the cache manager, the executor, the steps and the outputs."""


def greedy(max_tokens: int, **settings: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **settings)


def config_for(made: Reference, **settings: object) -> EngineConfig:
    """Weights stream, half of the cache is activations, prompts are computed in chunks of 24 tokens."""
    base = {"max_batch": 6, "max_model_len": 128, "max_prefill_tokens": 24, "expected_context": 24, "device": "cpu"}
    base |= {"cache_policy": "hybrid", "activation_share": 0.5}
    config = EngineConfig(model=str(made.directory), **(base | settings))
    return replace(config, min_batch=config.max_batch)


def tight(made: Reference, **settings: object) -> EngineConfig:
    """As `config_for`, with so few blocks that requests are preempted."""
    return tightest(config_for(made, **settings))


def weights_on_device(made: Reference, **settings: object) -> EngineConfig:
    """As `tight`, with no weights that stream: what crosses the bus are the cache's blocks."""
    return tight(made, resident_share=1.0, **settings)


def roomy(made: Reference, **settings: object) -> EngineConfig:
    """As `config_for`, with blocks for all."""
    return config_for(made, gpu_memory="1GiB", host_memory="64MiB", placement="host", **settings)


async def collect(deltas: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in deltas]


def ids(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def parts(engine: Engine) -> OneGpu:
    """What a running engine computes with: tests look at it, or break it, where no public way leads."""
    gpu = engine._opened.gpus
    assert isinstance(gpu, OneGpu)
    return gpu


def live(engine: Engine, request_id: str) -> Request | None:
    """The scheduler's view of a request."""
    return next((r for r in engine._scheduler.live() if r.request_id == request_id), None)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"still not so after {PATIENCE} seconds"
        await asyncio.sleep(0.0005)


async def gone(left: Callable[[], object]) -> None:
    """Let the event loop run until nothing is `left`; what is left at last is the failure's message."""
    end = time.monotonic() + PATIENCE
    while found := left():
        assert time.monotonic() < end, found
        await asyncio.sleep(0.0005)


async def idle(engine: Engine) -> None:
    """Wait for the end of all work, then check that every block, buffer and place in a queue is back."""
    await gone(engine.integrity)


def before(engine: Engine, patch: pytest.MonkeyPatch, kinds: Container[OpKind], call: Callable[[Op], object]) -> None:
    """Call `call` before each operation of these kinds of the compute lane, on its thread."""
    forward = parts(engine).executor.forward
    launch = forward.launch

    def watched(op: Op, step: object) -> None:
        if op.kind in kinds:
            call(op)
        launch(op, step)

    patch.setattr(forward, "launch", watched)


def edit_logits(engine: Engine, patch: pytest.MonkeyPatch, edit: Callable[[torch.Tensor], object]) -> None:
    """Let `edit` change each step's logits [r, vocab] before they are sampled, on the compute lane's thread."""
    forward = parts(engine).executor.forward
    launch = forward.launch

    def edited(op: Op, step: Pass) -> None:
        launch(op, step)
        if op.kind is OpKind.HEAD:
            assert step.logits is not None
            edit(step.logits)

    patch.setattr(forward, "launch", edited)


def before_sampling(patch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Call `call` before each step's rows are sampled, on the compute lane's thread."""
    launch = Sampler.launch

    def watched(sampler: Sampler, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> PendingSample:
        call()
        return launch(sampler, logits, rows)

    patch.setattr(Sampler, "launch", watched)


@asynccontextmanager
async def left_as_found(engine: Engine) -> AsyncIterator[None]:
    """What happens inside leaves no trace: requests, blocks, buffers, tasks."""
    await until(lambda: len(asyncio.all_tasks()) >= 1 + ENGINE_TASKS)
    tasks = asyncio.all_tasks()
    yield
    await idle(engine)
    await until(lambda: asyncio.all_tasks() == tasks)  # a consumer may not have had its turn yet


def bare_step(ops: OpList) -> Step:
    """A step that is its list of operations alone."""
    counts = StepCounts(requests=0, decode=0, prefill=0, recomputed=0, context=0)
    return Step(step_id=1, mini_batches=(), ops=ops, sampling=(), counts=counts, stop=StopFlag())
