"""A draft model: a small model of the same tokenizer, resident on the device, that proposes what requests go on with.

It keeps K and V of the requests' tokens in blocks of its own. For each request it computes what it has not seen, which
writes over the rows of drafts that were rejected, and then goes on greedily, all requests at once.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.config import CachePolicy, EngineConfig, ExpertLoading, WeightCoding, format_bytes
from hsrpc.device.device import Device
from hsrpc.draft.drafter import Wanted
from hsrpc.engine.model_files import ModelFiles
from hsrpc.engine.opened_model import OpenedModel
from hsrpc.engine.same_tokenizer import check_same_tokenizer
from hsrpc.errors import ConfigError
from hsrpc.model.families.registry import create_family
from hsrpc.plan.drafting import DraftTime
from hsrpc.plan.machine import Machine
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ModelSizes
from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockManager
from hsrpc.schedule.decode_ahead import advance
from hsrpc.schedule.mini_batches import form_mini_batches
from hsrpc.schedule.packing import in_order, pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, MiniBatch, Scheduled, StopFlag
from hsrpc.schedule.sweep import NOTHING_CARRIED, OpKind

FIELD = "draft_model"
"""The setting that names it."""
_PART = 8
"""At most this part of the device budget is for a draft model: weights, cache, and what its steps need."""
_PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True)
class PlannedDraftModel:
    """A draft model and its plan, before any weight is read: plain data, by which any process can open it."""

    config: EngineConfig
    """It as an engine's model."""
    choice: int
    """Number of the choice of its formats that the plan is for."""
    plan: Plan
    time: DraftTime

    @property
    def device_bytes(self) -> int:
        """Device memory that it takes in all."""
        return sum(self.plan.device_bytes.values())

    def open(self, device: Device, stop: threading.Event) -> DraftModel:
        """Load the weights, allocate, compile and capture. All that it takes counts as the device's draft model.

        Raises:
            CheckpointError, ConfigError, EngineUnavailableError: as `load_weights` does.
        """
        files, own = ModelFiles.read(self.config, device.torch_device), device.used_for(DeviceUse.DRAFT_MODEL)
        spec = files.spec_of(self.choice, self.plan)
        family = create_family(spec, self.plan.max_model_len)
        opened = OpenedModel.open(family, files.source, self.plan, own, stop)
        model = DraftModel(opened, self.plan, spec.vocab_size, own)
        if device.warms_up:
            model.warm_up()
        return model


def plan_draft_model(name: str, config: EngineConfig, verifier: ModelFiles, machine: Machine) -> PlannedDraftModel:
    """Read a draft model's configuration and plan it, all on the device, for the `verifier` that `config` names.

    Where there are several GPUs, it is the plan of each.

    Raises:
        ConfigError: it has another tokenizer, or is too large for its part of the device budget.
        CheckpointError, ModelNotFoundError: as their names say.
    """
    budget = machine.budgets(config).device
    own = EngineConfig(
        model=name,
        trust_links=config.trust_links,
        device=config.device,
        dtype=config.dtype,
        gpu_memory=budget // _PART,
        cache_policy=CachePolicy.KV,
        resident_share=1.0,
        weight_coding=WeightCoding.NONE,
        experts=ExpertLoading.STREAM,
        block_size=config.block_size,
        max_batch=config.of_one_gpu.max_batch,
        expected_context=config.expected_context,
        expected_output=config.expected_output,
    )
    files = ModelFiles.read(own, torch.device(machine.kind))
    check_same_tokenizer(FIELD, name, files, verifier)
    if config.max_model_len is not None:
        own = replace(own, max_model_len=min(config.max_model_len, files.spec.sizes.context_length))
    try:
        question = files.question(replace(machine, host_memory=0), own)
        planner, plan = question.answer()
    except ConfigError as error:
        problem = f"does not fit {format_bytes(budget // _PART)}, an eighth of gpu_memory={format_bytes(budget)}"
        raise ConfigError(FIELD, name, problem, f"raise gpu_memory, or choose a smaller model ({error})") from error
    return PlannedDraftModel(own, question.choice_of(planner), plan, _time(plan, planner.sizes))


def _time(plan: Plan, sizes: ModelSizes) -> DraftTime:
    """Seconds to draft for requests of the expected length: passes of one request, and of all."""
    hardware, context, batch = plan.hardware, plan.prediction.context, plan.max_batch
    one, all_requests = (predict_at(plan, sizes, context, number).gpu for number in (1, batch))
    request = max(0.0, all_requests - one) / max(1, batch - 1)
    launch = hardware.boundary_time + sizes.num_layers * hardware.launch_time
    return DraftTime(first=launch, each=one - request, request=request)


class DraftModel:
    """A drafter that is a model. A request's tokens are taken to stay as they are until it is forgotten."""

    def __init__(self, opened: OpenedModel, plan: Plan, vocab_size: int, device: Device) -> None:
        assert opened.graphs is not None  # all of it lies on the device
        self._opened = opened
        self._graphs = opened.graphs
        self._plan = plan
        self._windows = opened.forward.sizes.windows
        self._vocab_size = vocab_size
        self._device = device
        self._blocks = BlockManager(plan.num_blocks, plan.max_batch)
        self._cached: dict[str, _Cached] = {}
        """Requests that have blocks, in the order in which they came."""
        self._calls = 0

    @property
    def num_cached(self) -> int:
        """Requests that have blocks."""
        return len(self._cached)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request has."""
        return self._blocks.num_free

    def warm_up(self) -> None:
        """Draft for a prompt and forget it: kernels are then loaded, and their memory is seen to suffice."""
        plan = self._plan
        room = self._blocks.num_blocks * plan.block_size
        length = min(plan.max_model_len - 1, plan.max_idle_prefill_tokens, room - 1)
        self.draft([Wanted("", "", [0] * length, length, 2)])
        self.forget([""])

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        """The most probable tokens behind each request's; none where it has no room, for the cache or in the context,
        or holds an id that the model does not have.

        Where blocks run out, those are evicted that are not wanted now, first who was not wanted for longest; then the
        last that came, but not for one that came later.
        """
        drafts: list[Sequence[int]] = [()] * len(wanted)
        going = sorted(self._admit(wanted), key=lambda each: -each.num_tokens)
        size = self._plan.max_batch
        with torch.inference_mode(), self._device.on(self._device.compute):
            for part in (going[start : start + size] for start in range(0, len(going), size)):
                for each, tokens in zip(part, self._draft(part), strict=True):
                    drafts[each.number] = tokens
        return drafts

    def forget(self, request_ids: Collection[str]) -> None:
        """Free the blocks of requests that have ended."""
        for request_id in request_ids:
            if request_id in self._cached:
                self._evict(self._cached[request_id])

    def _admit(self, wanted: Sequence[Wanted]) -> list[_Going]:
        """Those that can be drafted for, with blocks for all that they compute."""
        self._calls += 1
        numbers = {each.request_id: number for number, each in enumerate(wanted)}
        known = [each for request_id, each in self._cached.items() if request_id in numbers]
        idle = [each for request_id, each in self._cached.items() if request_id not in numbers]
        line = [*known, *sorted(idle, key=lambda each: -each.last_call)]  # the last gives way first
        going = []
        for place, request_id in enumerate(dict.fromkeys([*(each.request_id for each in known), *numbers])):
            number = numbers[request_id]
            each = self._going(number, wanted[number])
            if each is not None and self._make_room(each, line, min(place + 1, len(known))):
                self._cached[request_id] = each.cached
                each.cached.last_call = self._calls
                going.append(each)
        return going

    def _going(self, number: int, wanted: Wanted) -> _Going | None:
        """What is to be computed for a request; None: nothing can be."""
        token_ids = wanted.token_ids
        num_tokens = min(wanted.max_tokens, self._plan.max_model_len + 1 - len(token_ids))
        if not token_ids or num_tokens < 1:
            return None
        cached = self._cached.get(wanted.request_id) or _Cached(wanted.request_id)
        cached.follow(token_ids)
        new = cached.request.token_ids[cached.request.num_computed :]
        return None if max(new) >= self._vocab_size else _Going(number, cached, num_tokens)

    def _make_room(self, going: _Going, line: list[_Cached], num_before: int) -> bool:
        """Whether a request has blocks for its tokens and all drafted ones but the last, which is not computed.

        The last of the `line` give way to it, but not the `num_before` first.
        """
        request = going.cached.request
        num_blocks = -(-(request.num_tokens + going.num_tokens - 1) // self._plan.block_size)
        while not self._blocks.grow(request.blocks, num_blocks - len(request.blocks)):
            if len(line) <= num_before:
                self._evict(going.cached)  # what it has is of use to others
                return False
            self._evict(line.pop())
        return True

    def _evict(self, cached: _Cached) -> None:
        self._blocks.free(cached.request.blocks)
        self._cached.pop(cached.request_id, None)

    def _draft(self, part: Sequence[_Going]) -> list[list[int]]:
        """Tokens of requests that fit a batch, those with the most of them first."""
        found, batch = [self._first_tokens(part)], None
        for position in range(1, part[0].num_tokens):
            count = bisect_left(part, -position, key=lambda each: -each.num_tokens)
            chunks = [each.chunk(position, row) for row, each in enumerate(part[:count])]
            batch = self._pack(chunks) if batch is None else self._advance(batch, chunks)
            step = self._graphs.run(batch, found[-1], StopFlag())
            assert step is not None  # nobody stops it
            assert step.logits is not None  # of all its rows: it has no drafts
            found.append(step.logits.argmax(dim=-1))
        token_ids = iter(self._device.fetch(torch.cat(found))().tolist())
        drafts: list[list[int]] = [[] for _ in part]
        for tokens in found:
            for draft in drafts[: len(tokens)]:
                draft.append(next(token_ids))
        for each, draft in zip(part, drafts, strict=True):
            each.cached.keep(draft[:-1])
        return drafts

    def _pack(self, chunks: Sequence[Chunk]) -> MiniBatch:
        return pack(chunks, self._plan.block_size, self._windows.distinct, self._plan.in_place)

    def _advance(self, batch: MiniBatch, chunks: Sequence[Chunk]) -> MiniBatch:
        found = advance(batch, chunks, self._plan.block_size, self._windows.widest)
        assert found is not None  # all blocks are read in place
        return found

    def _first_tokens(self, part: Sequence[_Going]) -> torch.Tensor:
        """The token [n] behind the newest one of each request, once all that is not cached is computed."""
        left, sampled, found = [each.cached.request for each in part], list[Request](), list[torch.Tensor]()
        while left:
            chunks = self._chunks(left)
            ended, tokens = self._compute(chunks)
            sampled += ended
            found.append(tokens)
            left = [request for request in left if request.num_computed < request.num_tokens]
        rows = {request.request_id: row for row, request in enumerate(sampled)}
        order = np.array([rows[each.cached.request_id] for each in part], dtype=np.int64)
        return torch.cat(found).index_select(0, self._device.upload(order))

    def _chunks(self, requests: Iterable[Request]) -> list[Chunk]:
        """What a pass computes of requests, the first of them first."""
        room, chunks = self._plan.max_idle_prefill_tokens, list[Chunk]()
        for request in requests:
            missing = request.num_tokens - request.num_computed
            num_new = min(missing, self._plan.buffers.queries, room)
            if num_new:
                room -= num_new
                chunks.append(Chunk(request, request.num_computed, num_new, samples=num_new == missing))
        return chunks

    def _compute(self, chunks: Sequence[Chunk]) -> tuple[list[Request], torch.Tensor]:
        """Compute chunks; the requests whose newest tokens are among them, and the token [n] behind each."""
        plan = self._plan
        formed = form_mini_batches(chunks, plan.block_size, plan.buffers, plan.costs, self._windows, pool=plan.in_place)
        scheduled = Scheduled(step_id=0, mini_batches=tuple(map(in_order, formed)), sampling=(), stop=StopFlag())
        step = self._opened.assembler.assemble(scheduled, NOTHING_CARRIED)
        on_device = self._opened.forward.upload(step.mini_batches, step.ops.group_starts)
        for op in step.ops.ops:
            if op.kind is not OpKind.SAMPLE:
                self._opened.forward.launch(op, on_device)
        for chunk in chunks:
            chunk.request.num_computed += chunk.num_new
        assert on_device.logits is not None  # HEAD made them
        return [chunk.request for chunk in scheduled.chunks if chunk.samples], on_device.logits.argmax(dim=-1)


class _Cached:
    """A request that has blocks, or is about to."""

    def __init__(self, request_id: str) -> None:
        self.request = Request(request_id, (), _PARAMS, 0, 0.0)
        """Its `token_ids` are those whose K and V are cached, drafted ones among them, and those to be computed."""
        self.last_call = 0
        """The last time that it was drafted for."""
        self._num_settled = 0
        """Its first tokens, which were not drafted."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take the request's tokens as they are now: of the drafted ones those stay that it came to have."""
        request = self.request
        end = min(request.num_tokens, len(token_ids))
        places = range(self._num_settled, end)
        first = next((i for i in places if request.token_ids[i] != token_ids[i]), end)
        request.token_ids[first:] = token_ids[first:]
        request.num_computed = min(request.num_computed, first, len(token_ids) - 1)
        self._num_settled = len(token_ids)

    def keep(self, drafted: Sequence[int]) -> None:
        """Remember drafted tokens that are computed."""
        self.request.token_ids += drafted
        self.request.num_computed = self.request.num_tokens


class _Going(NamedTuple):
    """A request that is drafted for."""

    number: int
    """Its place among those wanted."""
    cached: _Cached
    num_tokens: int
    """Tokens to draft."""

    def chunk(self, position: int, row: int) -> Chunk:
        """The computation of its drafted token before the one at `position`: that of a row of the step before."""
        request = self.cached.request
        return Chunk(request, request.num_tokens + position - 1, 1, samples=True, previous_row=row)
