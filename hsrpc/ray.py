"""A stage of Ray Data whose workers hold an engine each: the road beyond one machine for files (extra `hsrpc[ray]`).

import ray
from hsrpc import EngineConfig
from hsrpc.ray import generate

stories = ray.data.from_items([{"hero": "a fox"}, {"hero": "an owl"}])
config = EngineConfig(model="./opt-13b", gpu_memory="20GiB", host_memory="96GiB")
answers = generate(stories, config, lambda row: {"prompt": f"Once there was {row['hero']}", "max_tokens": 64})
answers.write_parquet("answers")
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

import uvloop

from hsrpc.batch.answer import Answer, Output
from hsrpc.batch.call import Call, read_call
from hsrpc.batch.caller import Caller, default_concurrency, seed_for
from hsrpc.batch.line import Endpoint
from hsrpc.batch.refusal import Refusal
from hsrpc.config import DeviceKind, EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.errors import ConfigError, InvalidRequestError
from hsrpc.loop_thread import LoopThread
from hsrpc.source import Embedded

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

Row: TypeAlias = dict[str, Any]
Request: TypeAlias = Callable[[Row], Mapping[str, Any]]
"""Makes of a row the body of a request, as OpenAI has it: with `messages` or `prompt`; without `model`, the served one.
It travels to the workers, pickled."""

COLUMNS = ("answer", "response", "error")
"""Text of the first choice; body of the response, JSON; OpenAI's error object, JSON. Null where there is none."""
_CONCURRENT_BLOCKS = 4
"""Blocks that a worker has at once: while one waits for its last rows, the others keep the engine busy."""


def generate(
    dataset: Dataset,
    config: EngineConfig,
    request: Request,
    *,
    workers: int | tuple[int, int] = 1,
    gpus: float | None = None,
    cpus: float = 1.0,
    block_rows: int = 256,
) -> Dataset:
    """`dataset` with the COLUMNS that say what the model answers to `request` of each row.

    `workers` are so many, or between two numbers, each with an engine of its own on `gpus` GPUs (default: one, none
    where the device is the CPU) and `cpus` cores; the cluster needs another core for what comes before and after. A
    worker takes blocks of `block_rows` rows, four at a time, and has as many of their requests under way as its engine
    runs and a quarter more. Blocks of a worker that dies run again, in another one. Rows come in no order.

    Raises:
        ConfigError: the settings do not suit several engines.
    """
    from ray.data import ActorPoolStrategy

    least, most = (workers, workers) if isinstance(workers, int) else workers
    if most > 1 and config.host_memory is None:
        problem = "several workers of a machine would each take most of what is free"
        raise ConfigError("host_memory", None, problem, "give the part of each, such as 96GiB")
    if gpus is None:
        gpus = 0.0 if config.device is DeviceKind.CPU else 1.0
    pool = ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_concurrent_calls_per_actor=_CONCURRENT_BLOCKS,
        max_tasks_in_flight_per_actor=2 * _CONCURRENT_BLOCKS,
        enable_true_multi_threading=True,
    )
    return dataset.repartition(target_num_rows_per_block=block_rows).map_batches(
        Worker,
        fn_constructor_args=(config, request),
        compute=pool,
        batch_size=None,
        batch_format="pyarrow",
        num_gpus=gpus,
        num_cpus=cpus,
    )


class Worker:
    """An engine on an event loop of its own, which no other work of the process holds up; called by several threads.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: on construction, the engine cannot be started.
    """

    def __init__(self, config: EngineConfig, request: Request) -> None:
        self._request = request
        self._seed = config.seed
        self._loop = LoopThread("hsrpc-engine", uvloop.new_event_loop)
        self._engine = self._loop.run(Engine(config).__aenter__())
        self._caller = Caller(Embedded(self._engine), 0.0)
        self._slots = asyncio.Semaphore(default_concurrency(self._engine.plan.max_batch))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with their answers.

        Raises:
            ConfigError: they have one of the columns already.
            EngineFaultError: the engine died.
        """
        import pyarrow as pa

        taken = next((name for name in COLUMNS if name in rows.column_names), None)
        if taken is not None:
            raise ConfigError("dataset", taken, "the name of a column that is added", "rename it before")
        bodies = [self._request(row) for row in rows.to_pylist()]
        values = [_values(result) for result in self._loop.run(self._answers(bodies))]
        for index, name in enumerate(COLUMNS):
            rows = rows.append_column(name, pa.array([each[index] for each in values], pa.string()))
        return rows

    def close(self) -> None:
        """End the engine and its loop."""
        self._loop.run(self._engine.__aexit__(None, None, None))
        self._loop.close()

    async def _answers(self, bodies: list[Mapping[str, Any]]) -> list[Answer | Refusal]:
        return await asyncio.gather(*map(self._answer, bodies))

    async def _answer(self, body: Mapping[str, Any]) -> Answer | Refusal:
        endpoint = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETIONS
        try:
            call = read_call(endpoint, {"model": self._engine.spec.name, **body})
        except InvalidRequestError as error:
            return Refusal.of(error)
        if (refusal := await self._caller.check_model(call)) is not None:
            return refusal
        seed, request_id = seed_for(self._seed, json.dumps(body, sort_keys=True)), uuid4().hex
        outputs = []
        for found in await asyncio.gather(*(self._output(call, i, seed, request_id) for i in range(call.num_requests))):
            if isinstance(found, Refusal):
                return found
            outputs.append(found)
        return await self._caller.answer(call, outputs, request_id)

    async def _output(self, call: Call, index: int, seed: int | None, request_id: str) -> Output | Refusal:
        async with self._slots:
            return await self._caller.output(call, index, seed, request_id)


def _values(result: Answer | Refusal) -> tuple[str | None, str | None, str | None]:
    """Those of COLUMNS."""
    body = result.as_json()
    if isinstance(result, Refusal):
        return None, None, json.dumps(body["error"])
    return result.outputs[0].text, json.dumps(body), None
