"""A step is plain data: it can be written down, and another process knows all of it that computing takes."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import numpy as np
import pytest

import hsrpc
from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockManager, PoolId
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits
from hsrpc.schedule.step import (
    BufferLimits,
    Chunk,
    InPlace,
    Layout,
    MiniBatch,
    RowCosts,
    Rows,
    Runs,
    SamplingRow,
    Scheduled,
    Step,
    StepCounts,
    StopFlag,
)
from hsrpc.schedule.sweep import Carried, Lane, Op, OpKind, OpList
from tests.schedule.other_process import sums
from tests.schedule.support import assemble, assert_same

LIMITS = SchedulerLimits(
    max_batch=4,
    max_model_len=40,
    max_prefill_tokens=60,
    max_idle_prefill_tokens=60,
    block_size=4,
    buffers=BufferLimits(rows=40, activation_rows=40, queries=24),
    costs=RowCosts(1.0, 0.5, 0.1, 0.6),
)
PARAMS = (
    SamplingParams(seed=2**63 - 1, max_tokens=9, ignore_eos=True, repetition_penalty=1.5),
    SamplingParams(seed=7, max_tokens=9, ignore_eos=True, logit_bias={3: -1.5}, stop=("x",)),
    SamplingParams(seed=8, max_tokens=9, ignore_eos=True, min_tokens=5, stop_token_ids=[4]),
)
PLAIN = {int, float, bool, str, bytes, type(None), tuple, list, dict, frozenset, array, np.ndarray, np.dtype}
PARTS = {
    Step,
    MiniBatch,
    Layout,
    InPlace,
    Rows,
    Runs,
    StepCounts,
    StopFlag,
    OpList,
    Op,
    Carried,
    SamplingRow,
    SamplingParams,
}
NAMES = {PoolId, OpKind, Lane}


class Case(NamedTuple):
    """A step, and what it was made of."""

    scheduled: Scheduled
    step: Step


def make_scheduler(**num_blocks: int) -> Scheduler:
    """With three requests that wait, of 21, 14 and 7 tokens."""
    pools = {PoolId[name.upper()]: count for name, count in num_blocks.items()}
    scheduler = Scheduler(BlockManager(pools), LIMITS, [0, 1])
    for number, params in enumerate(PARAMS):
        scheduler.add(Request(str(number), range(10, 31 - 7 * number), params, number, 0.0))
    return scheduler


def next_step(scheduler: Scheduler) -> Case:
    scheduled = scheduler.schedule(1.0)
    assert scheduled is not None
    return Case(scheduled, assemble(scheduled, LIMITS))


def decode(scheduler: Scheduler) -> Case:
    """The step behind the prompts."""
    prompts = next_step(scheduler).scheduled
    scheduler.commit(prompts.step_id, [5] * len(prompts.sampling), 1.0)
    return next_step(scheduler)


def prefill_step() -> Case:
    """Prompts in several mini-batches, stored in the host's pools."""
    case = next_step(make_scheduler(host_kv=20, host_activation=20))
    assert len(case.step.mini_batches) > 1
    assert case.step.counts.prefill == 42
    return case


def decode_step() -> Case:
    """Its cache is in all four pools, so it is loaded, rebuilt, read in place and stored."""
    case = decode(make_scheduler(device_kv=3, host_kv=4, device_activation=3, host_activation=4))
    loads = [pool for b in case.step.mini_batches for pool in (*b.widest.kv_loads, *b.widest.activation_loads)]
    assert set(loads) == {PoolId.HOST_KV, PoolId.DEVICE_ACTIVATION, PoolId.HOST_ACTIVATION}
    assert any(len(batch.widest.in_place.counts) for batch in case.step.mini_batches)
    assert case.step.counts.decode == 3
    return case


def in_place_step() -> Case:
    case = decode(make_scheduler(device_kv=40))
    assert case.step.is_in_place
    assert not case.step.is_ahead
    return case


def ahead_step() -> Case:
    """At its turn, with its rows to sample."""
    scheduler = make_scheduler(device_kv=40)
    before = decode(scheduler)
    scheduled = scheduler.schedule_ahead(before.step)
    assert scheduled is not None
    step = assemble(scheduled, LIMITS)
    scheduler.commit(before.step.step_id, [6] * 3, 2.0)
    step.sampling = scheduler.sampling(step.step_id)
    assert step.is_ahead
    return Case(scheduled, step)


@pytest.fixture(params=[prefill_step, decode_step, in_place_step, ahead_step])
def case(request: pytest.FixtureRequest) -> Case:
    make: Callable[[], Case] = request.param
    return make()


def test_a_step_is_what_its_pickle_is(case: Case):
    """Field by field, arrays and their types too; also once its list was asked for its lanes."""
    assert_same(pickle.loads(pickle.dumps(case.step)), case.step)
    assert case.step.ops.lanes
    found = pickle.loads(pickle.dumps(case.step))
    assert_same(found, case.step)
    assert found.ops.lanes == case.step.ops.lanes
    assert found.stop is not case.step.stop
    assert found.mini_batches


def inside(root: object) -> list[object]:
    """Everything that can be reached from `root` without going through a class or a function's module."""
    seen: dict[int, object] = {}
    left = [root]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):
            left += [*(item.__closure__ or ()), item.__defaults__, item.__kwdefaults__]
        elif isinstance(item, np.ndarray):
            left.append(item.base)  # which arrays do not tell the collector
        else:
            left += gc.get_referents(item)
    return list(seen.values())


def test_nothing_but_data_is_in_a_step(case: Case):
    """Arrays of numbers, tuples, names and the step's own records: no request, no block table, no closure, no lock."""
    assert case.step.ops.lanes
    assert case.step.ops.readers
    found = inside(case.step)
    assert {type(item) for item in found} <= PLAIN | PARTS | NAMES | {type(np.dtype(np.int64))}
    assert all(item.dtype == np.int64 for item in found if isinstance(item, np.ndarray))
    assert {Step, MiniBatch, Rows, Op, StopFlag, SamplingRow, SamplingParams} <= {type(item) for item in found}
    requests = [chunk.request for chunk in case.scheduled.chunks]
    live = [part for r in requests for part in (r, r.token_ids, r.blocks, r.blocks.pools, r.blocks.indices)]
    assert not {id(item) for item in found} & {id(part) for part in live}


def test_the_search_finds_what_a_step_must_not_have(case: Case):
    """A request in what the scheduler decided, and one that a function in the step would bring along."""
    request = next(case.scheduled.chunks).request
    hidden = replace(case.step, sampling=(lambda: request,))
    assert any(item is request for item in inside(case.scheduled))
    assert any(item is request for item in inside(hidden))
    assert not any(item is request for item in inside(case.step))


def new_token_ids(chunk: Chunk) -> list[int]:
    """That the step has of a chunk; of one ahead the row of its token in the step before."""
    if chunk.previous_row is not None:
        return [chunk.previous_row]
    return chunk.request.token_ids[chunk.context : chunk.context + chunk.num_new]


def test_a_step_can_be_sent_to_another_process(case: Case):
    """That loads schedule/ and what a request is, neither torch nor an engine, and adds up what was scheduled."""
    root = str(Path(hsrpc.__file__).parents[1])
    answer = subprocess.run(
        [sys.executable, "-m", "tests.schedule.other_process"],
        input=pickle.dumps(case.step),
        stdout=subprocess.PIPE,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    found = json.loads(answer.stdout)
    rooms = {".".join(name.split(".")[:2]) for name in found["modules"]}
    assert rooms == {"hsrpc", "hsrpc.constraint", "hsrpc.errors", "hsrpc.request", "hsrpc.schedule"}
    assert found["sums"] == sums(case.step)
    assert found["sums"]["positions"] == [
        sum(sum(range(chunk.context, chunk.context + chunk.num_new)) for chunk in part)
        for part in case.scheduled.mini_batches
    ]
    assert found["sums"]["token ids"] == [
        sum(sum(new_token_ids(chunk)) for chunk in part) for part in case.scheduled.mini_batches
    ]
    assert found["sums"]["stored rows"] == [sum(c.num_new for c in part) for part in case.scheduled.mini_batches]
    assert found["sums"]["seeds"] == [c.request.params.seed for c in case.scheduled.chunks if c.samples]
