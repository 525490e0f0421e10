"""The same requests on one engine, embedded and through its gRPC server, by turns: what the server costs.

Embedded means `Engine.generate` on the engine's own event loop. Through gRPC means the server of `hsrpc serve` on that
loop too, and clients on the loopback, in processes of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from statistics import median
from typing import Protocol

from hsrpc.bench.frontend_client import Job, Received, answer_jobs, ask
from hsrpc.bench.lag import LoopLag
from hsrpc.bench.process import connected
from hsrpc.bench.run import BenchError
from hsrpc.bench.serving import serving
from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.client_messages import Settings
from hsrpc.plan.roofline import StepRecord
from hsrpc.request import Delta, SamplingParams
from hsrpc.server import ServerConfig
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.ops.telemetry import Telemetry


class Way(StrEnum):
    """How the requests reach the engine."""

    EMBEDDED = "embedded"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that start together."""

    requests: int
    prompt: int
    output: int
    clients: int
    """Processes."""
    max_message_delay: float | None
    """Seconds, asked for by the clients; None: they leave it to the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of the load, one way."""

    way: Way
    tokens_per_second: float
    """New ones over the time from the first request to the last token."""
    full_tokens_per_second: float
    """Rate in the steps in which all requests decode: they neither begin nor end."""
    step_seconds: float
    """Median duration of the steps in which all requests decode."""
    loop_lag_p99: float
    cores: float
    """CPU seconds per second of the engine's process, all its threads."""
    loop_cores: float
    """CPU seconds per second of the event loop's thread."""
    cpu_seconds: float
    """CPU seconds of the process for 1,000 tokens."""
    messages: int
    """What the consumers took: deltas, or messages through gRPC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The samples of both ways; what is said of them is of their medians."""

    model: str
    device: str
    load: Load
    samples: Sequence[Sample]

    def median(self, way: Way, name: str) -> float:
        """Median of a field over the way's samples."""
        return median(float(getattr(sample, name)) for sample in self.samples if sample.way is way)

    def ratio(self, name: str) -> float:
        """A field through gRPC over the same embedded."""
        return self.median(Way.GRPC, name) / self.median(Way.EMBEDDED, name)


class EmbeddedEngine(Engine, Protocol):
    """What the measurement needs: the engine, or a stand-in for it."""

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[Delta, None]: ...


OpenEngine = Callable[[Callable[[StepRecord], object]], AbstractAsyncContextManager[EmbeddedEngine]]
"""Makes an engine that gives the records of its steps to the argument."""


class _Bench:
    def __init__(
        self, engine: EmbeddedEngine, clients: Sequence[Connection], load: Load, steps: list[StepRecord]
    ) -> None:
        """`steps` gets the engine's as they end."""
        self._engine = engine
        self._clients = clients
        self._load = load
        self._steps = steps
        vocab_size, count = engine.spec.vocab_size, load.requests
        self._prompts = make_workload(
            Lengths.UNIFORM, count=count, prompt=load.prompt, output=load.output, vocab_size=vocab_size
        ).prompts

    async def sample(self, way: Way) -> Sample:
        """Run the load once.

        Raises:
            BenchError: tokens are missing, or in no step did all requests decode.
        """
        self._steps.clear()
        async with LoopLag() as lag:
            before = time.monotonic(), time.process_time(), time.thread_time()
            received = await (self._embedded() if way is Way.EMBEDDED else self._through_grpc())
            after = time.monotonic(), time.process_time(), time.thread_time()
        seconds, process, thread = (end - start for start, end in zip(before, after, strict=True))
        if received.tokens != (wanted := self._load.requests * self._load.output):
            raise BenchError(f"{received.tokens} tokens came in place of {wanted}")
        steps = full_steps(self._steps, min(self._load.requests, self._engine.plan.max_batch))
        return Sample(
            way=way,
            tokens_per_second=received.tokens / received.seconds,
            full_tokens_per_second=sum(step.decode_tokens for step in steps) / sum(step.seconds for step in steps),
            step_seconds=median(step.seconds for step in steps),
            loop_lag_p99=lag.p99(),
            cores=process / seconds,
            loop_cores=thread / seconds,
            cpu_seconds=process / received.tokens * 1000,
            messages=received.messages,
        )

    async def _embedded(self) -> Received:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._generate(prompt)) for prompt in self._prompts]
        sizes = [size for task in tasks for size in task.result()]
        return Received(len(sizes), sum(sizes), began, time.monotonic())

    async def _generate(self, prompt: Sequence[int]) -> list[int]:
        """Tokens of each delta."""
        params = SamplingParams(temperature=0.0, max_tokens=self._load.output, ignore_eos=True)
        async with aclosing(self._engine.generate(prompt, params)) as deltas:
            return [len(delta.token_ids) async for delta in deltas]

    async def _through_grpc(self) -> Received:
        found = await _ask_all(self._clients, [self._job(first) for first in range(len(self._clients))])
        messages, tokens = sum(one.messages for one in found), sum(one.tokens for one in found)
        return Received(messages, tokens, min(one.began for one in found), max(one.ended for one in found))

    def _job(self, first: int) -> Job:
        """The share of a client: every so many-th prompt, from the `first` on."""
        settings: Settings = {"temperature": 0.0, "return_token_ids": True}
        if self._load.max_message_delay is not None:
            settings["max_message_delay"] = self._load.max_message_delay
        prompts = self._prompts[first :: len(self._clients)]
        return Job(len(prompts), self._load.output, settings, prompts)


def full_steps(steps: Sequence[StepRecord], requests: int) -> list[StepRecord]:
    """Those in which so many requests decode, and no prompt is computed.

    Raises:
        BenchError: there are none.
    """
    found = [step for step in steps if step.decode_tokens == requests and not step.prefill_tokens]
    if not found:
        raise BenchError(f"in no step did {requests} requests decode at once; give a larger --output")
    return found


async def measure_cost(
    open_engine: OpenEngine, load: Load, repeats: int, note: Callable[[Cost], object] = lambda _: None
) -> Cost:
    """Run the load both ways by turns, `repeats` times each after a warm-up; `note` gets what there is after each turn.

    Raises:
        HsrpcError: the engine cannot be had, or the load did not run as it should.
    """
    steps: list[StepRecord] = []
    async with AsyncExitStack() as stack:
        telemetry = await stack.enter_async_context(Telemetry(ServerConfig()))

        def observe(step: StepRecord) -> None:
            telemetry.observe_step(step)
            steps.append(step)

        engine = await stack.enter_async_context(open_engine(observe))
        telemetry.attach(engine)
        server = await stack.enter_async_context(serving(engine, telemetry))
        clients = [stack.enter_context(connected(answer_jobs, server.address)) for _ in range(load.clients)]
        await _ask_all(clients, [Job(1, 1, {})] * len(clients))  # they have loaded now, and will start together
        bench = _Bench(engine, clients, load, steps)
        cost = Cost(model=engine.spec.name, device=engine.device, load=load, samples=())
        for way in Way:
            await bench.sample(way)
        for _ in range(repeats):
            cost = replace(cost, samples=[*cost.samples, *[await bench.sample(way) for way in Way]])
            note(cost)
        return cost


async def _ask_all(clients: Sequence[Connection], jobs: Sequence[Job]) -> list[Received]:
    asked = (asyncio.to_thread(ask, client, job) for client, job in zip(clients, jobs, strict=True))
    return await asyncio.gather(*asked)
