"""The embedded engine: requests in, deltas out, three tasks in between."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from types import TracebackType
from typing import Self
from uuid import uuid4

from hsrpc.config import EngineConfig
from hsrpc.constraint import Constraint
from hsrpc.draft.drafter import Drafter
from hsrpc.engine.admission import Admission, Applicant
from hsrpc.engine.delivery import Delivery
from hsrpc.engine.draft_lengths import AllThatFit, ByGain, DraftLengths
from hsrpc.engine.generation import Generation
from hsrpc.engine.gpus.contract import GpuFacts, StepResult, Task
from hsrpc.engine.grammars.matcher import Matcher
from hsrpc.engine.meter import Meter
from hsrpc.engine.no_tokenizer import NoTokenizer
from hsrpc.engine.run_to_end import run_to_end
from hsrpc.engine.speculation import Speculation
from hsrpc.engine.startup import ChoosePlan, Components, open_components
from hsrpc.engine.stats import EngineStats
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.engine.validation import Validator
from hsrpc.engine.warm_up import warm_up
from hsrpc.engine.worker import Worker
from hsrpc.errors import (
    EngineFaultError,
    EngineUnavailableError,
    OutOfDeviceMemoryError,
    RequestExistsError,
)
from hsrpc.model.family import ModelSpec
from hsrpc.model.tensor import dtype_name
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.question import Question
from hsrpc.plan.roofline import StepRecord
from hsrpc.prompt import Chat, Prompt, Text, field_of
from hsrpc.request import Delta, FinishReason, SamplingParams
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output, Scheduler, SchedulerLimits
from hsrpc.schedule.step import Packed, Scheduled
from hsrpc.text.detokenizer import Detokenizer

_log = logging.getLogger(__name__)

_STOP_SECONDS = 10.0
"""Most time that the tasks, and the device calls of their threads, have to end when the engine is left."""


class Engine:
    """Serves one model. Use as an async context manager; entering loads the model.

        async with Engine(EngineConfig(model="path/to/model", gpu_memory="24GiB")) as engine:
            async for delta in engine.generate("Once upon a time", SamplingParams(max_tokens=64)):
                print(delta.text, end="")

    Models that were trained on conversations take a Chat in place of the text.

    `progress` shows bars while loading; `observe` is called on the event loop with each step's record;
    `choose_plan` makes the plan, for policies that hsrpc's planner does not know; `drafter` proposes tokens that
    requests may go on with, as many as `max_draft_tokens` plans, which changes no output.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: on entering.
        EngineUnavailableError: on entering a second time; after one that failed, too.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        progress: bool = False,
        observe: Callable[[StepRecord], object] | None = None,
        choose_plan: ChoosePlan = Planner.plan,
        drafter: Drafter | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self._observe = observe
        self._choose_plan = choose_plan
        self._drafter = drafter
        self._progress = progress
        self._components: Components | None = None
        self._wake = asyncio.Event()
        self._warm: asyncio.Future[None] | None = None
        self._failed: asyncio.Future[None] | None = None
        self._main: asyncio.Task[None] | None = None
        self._accepts = False
        self._last_beat = 0.0
        self._arrivals = 0
        self._seeds = Random(self.config.seed)

    async def __aenter__(self) -> Self:
        if self._failed is not None:
            raise EngineUnavailableError("the engine was entered before; make another one")
        self._failed = asyncio.get_running_loop().create_future()
        self._warm = asyncio.get_running_loop().create_future()
        self._components = await open_components(self.config, self._choose_plan, self._progress)
        plan = self._components.plan
        limits = _limits(plan, self._components.spec, shares_prefixes=self.config.prefix_cache)
        blocks, *others = self._components.new_blocks()
        self._scheduler = Scheduler(blocks, limits, self._components.spec.eos_token_ids, others)
        self._speculation = self._open_speculation(self._components)
        self._delivery = Delivery(self._scheduler, self._components.tokenizer, dtype_name(self.spec.dtype))
        self._meter = Meter(self._components, self._scheduler, self._observe)
        self._admission = Admission(
            self._scheduler, self._delivery.fail, self.config.max_queued_requests, self.config.max_queued_tokens
        )
        self._validator = Validator(self.spec.vocab_size, self.max_model_len)
        self._main = asyncio.create_task(self._run(), name="engine")
        try:
            await asyncio.wait({self._warm, self._main}, return_when="FIRST_COMPLETED")
            if self._failed.done():
                await self._failed
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._accepts = True
        return self

    def _open_speculation(self, components: Components) -> Speculation:
        """The engine's own drafter is asked for what pays; one that was given, for as much as there is room for."""
        drafts, drafter = components.plan.drafts, self._drafter
        price = drafts.price
        if drafts.reason:
            _log.info("drafts: %s", drafts.reason)
        lengths: DraftLengths = AllThatFit()
        if drafter is None and price is not None:
            drafter, lengths = components.drafter, ByGain(price)
        return Speculation(drafter if price else None, self._scheduler, lengths, self.spec.vocab_size)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._accepts = False
        await run_to_end(self._close())

    async def _close(self) -> None:
        main = self._main
        if main is not None:
            main.cancel()
            await asyncio.wait([main], timeout=_STOP_SECONDS)
        self._delivery.fail_all(EngineUnavailableError("the engine was shut down"))
        components, self._components, self._main = self._opened, None, None
        if main is None or main.done():
            release = await components.close()
            del components, main, self._meter
            release()
        else:  # a thread may still use the memory: it goes with the process
            _log.error("the engine's tasks have not ended; it is left without freeing its memory")

    @property
    def spec(self) -> ModelSpec:
        return self._opened.spec

    @property
    def plan(self) -> Plan:
        return self._opened.plan

    @property
    def question(self) -> Question:
        """All that the plan follows from: to plan again for something else."""
        return self._opened.question

    @property
    def device(self) -> str:
        """Name of the device, for people."""
        return self._opened.gpus.name

    @property
    def gpus(self) -> Sequence[GpuFacts]:
        """The GPUs that compute, by their numbers; a CPU counts as one."""
        return self._opened.facts

    @property
    def tokenizer(self) -> Tokenizer | NoTokenizer:
        return self._opened.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """Settings that suit the model: its own, where its generation_config.json has them and may be followed."""
        return self._opened.default_params

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str = "",
        user: str = "",
        max_wait: float | None = None,
        cache_salt: str = "",
    ) -> Generation:
        """Queue a request; nothing is allocated for one that is refused.

        Requests with the same `client` share one fair share, of which those of each `user` have an equal part.
        `max_wait`: seconds that the caller waits at most. Those of equal `cache_salt` share the blocks of equal first
        tokens; nothing tells one about the prompts of those with another.

        Raises:
            InvalidRequestError: the prompt or a setting does not suit the model.
            RequestExistsError: a live request has that id.
            QueueFullError: `max_queued_requests` or `max_queued_tokens` wait already, and no other client's line is
                longer; later, from the generation: GaveWayError.
            WaitTooLongError: the predicted wait is far longer than `max_wait` or the request's time limit.
            EngineUnavailableError: the engine is not running.
        """
        self._check_open(request_id)
        self._validator.check_length(prompt, params)
        self._validator.check_params(params)
        num_tokens = 1 if isinstance(prompt, str | Text | Chat) else len(prompt)
        applicant = Applicant(params, client, user, max_wait, num_tokens)
        self._admission.check(applicant)
        with self._admission.preparing(applicant):
            token_ids = await self._token_ids(prompt, client)
            self._validator.check_prompt(token_ids, field_of(prompt), params)
            decode = partial(self.tokenizer.decode_now, skip_special_tokens=params.skip_special_tokens)
            detokenizer = await self.tokenizer.run(Detokenizer, decode, token_ids[-8:])
            matcher = await self._matcher(params.constraint, client)
        self._check_open(request_id)  # again: while the tokenizer ran, others came
        applicant.num_prompt_tokens = len(token_ids)
        self._admission.check(applicant)
        request = self._request(request_id or uuid4().hex, token_ids, applicant, cache_salt)
        request.matcher = matcher
        return self._add(request, detokenizer, is_text=isinstance(prompt, str | Text))

    async def _token_ids(self, prompt: Prompt, client: str) -> list[int]:
        return await self.tokenizer.encode(prompt, client) if isinstance(prompt, str | Text | Chat) else list(prompt)

    async def _matcher(self, constraint: Constraint | None, client: str) -> Matcher | None:
        return None if constraint is None else await self._opened.grammars.matcher(constraint, client)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Submit and iterate; leaving the loop early aborts the request. `params` None are `default_params`.

        `prompt` is text, a Chat, or token ids. Requests of equal `cache_salt` share the blocks of their first tokens.

        Raises:
            As `submit`, and EngineFaultError or RequestFailedError while iterating.
        """
        settings = params or self.default_params
        generation = await self.submit(prompt, settings, request_id=request_id, cache_salt=cache_salt)
        try:
            async for delta in generation:
                yield delta
        finally:
            generation.close()

    async def tokenize(self, prompt: str | Text | Chat, *, client: str = "") -> list[int]:
        """Token ids that a request would have with this prompt. Takes a place in the queue while it waits.

        Raises:
            InvalidRequestError: `prompt` is longer than any, not valid Unicode, or refused by the chat template.
            QueueFullError: `max_queued_requests` wait already, and no other client's line is longer; or GaveWayError.
            EngineUnavailableError: the engine is not running.
        """
        with self._preparing(prompt, client):
            return await self.tokenizer.encode(prompt, client)

    async def render(self, chat: Chat, *, client: str = "") -> str:
        """The text that the model's template makes of `chat`. Takes a place in the queue while it waits.

        Raises:
            InvalidRequestError, QueueFullError, EngineUnavailableError: as `tokenize`.
        """
        with self._preparing(chat, client):
            return await self.tokenizer.render(chat, client)

    @contextmanager
    def _preparing(self, prompt: str | Text | Chat, client: str) -> Iterator[None]:
        self._check_open(None)
        self._validator.check_length(prompt)
        with self._admission.admitting_text(client):
            yield

    async def detokenize(self, token_ids: Sequence[int], *, client: str = "", skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, special tokens left out or shown. Takes a place in the queue while it waits.

        Raises:
            InvalidRequestError: more than `max_model_len` ids, or one outside the vocabulary.
            QueueFullError, EngineUnavailableError: as `tokenize`.
        """
        self._check_open(None)
        self._validator.check_token_ids(token_ids)
        with self._admission.admitting_text(client):
            return await self.tokenizer.decode(token_ids, client, skip_special_tokens)

    def abort(self, request_id: str) -> bool:
        """End a live request with reason ABORTED; False where there is none."""
        transcript = self._delivery.live.get(request_id) if self._components is not None else None
        return transcript is not None and self._delivery.end(transcript.request, FinishReason.ABORTED)

    def stats(self) -> EngineStats:
        """Counters at this moment."""
        if self._components is None:
            raise _not_started()
        return self._meter.stats()

    def integrity(self) -> dict[str, object]:
        """What past and present requests hold, by name: empty when idle, if nothing was lost.

        What begins with "blocks of" or "blocks without" is a fault at any time.
        """
        steps = self._opened.gpus.num_queued
        return {
            **self._scheduler.integrity(),
            **self._delivery.integrity(),
            **({"steps queued": steps} if steps else {}),
        }

    def heartbeat(self) -> float:
        """Seconds since a step last began while there is work; 0 when idle.

        Raises:
            EngineUnavailableError: the engine is not started.
        """
        if self._components is None:
            raise _not_started()
        return time.monotonic() - self._last_beat if self._is_busy else 0.0

    @property
    def failed_in_a_row(self) -> int:
        """Requests that could not go on, their logits not finite or without text, since one last ended with output.

        Raises:
            EngineUnavailableError: the engine is not started.
        """
        if self._components is None:
            raise _not_started()
        return self._delivery.failed_in_a_row

    @property
    def _is_busy(self) -> bool:
        return bool(self._scheduler.num_waiting or self._scheduler.num_running)

    async def wait_failed(self) -> None:
        """Returns never while the engine is well.

        Raises:
            EngineFaultError: an engine task died.
            EngineUnavailableError: the engine is not started.
        """
        if self._failed is None:
            raise _not_started()
        await asyncio.shield(self._failed)

    @property
    def _opened(self) -> Components:
        if self._components is None:
            raise _not_started()
        return self._components

    async def _run(self) -> None:
        """All tasks under one group: what fails, fails loudly and at once."""
        tasks: tuple[Task, ...] = (*self._opened.gpus.tasks, self._run_steps, self._delivery.run)
        try:
            async with asyncio.TaskGroup() as group:
                for task in tasks:
                    group.create_task(task()).add_done_callback(self._note_end)
        except* Exception:
            _log.info("the engine's tasks have ended")

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Report a fault at once: the group waits for the other tasks' threads, which may take long."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        _log.error("an engine task died", exc_info=error)
        self._accepts = False
        _forget(error)
        why = error if isinstance(error, EngineFaultError) else "an engine task died"
        fault = EngineFaultError(f"{why}; see the log")
        fault.__cause__ = error
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(fault)
            self._failed.exception()  # retrieved here: nobody may be waiting for it
        self._delivery.fail_all(fault)

    async def _run_steps(self) -> None:
        if self._opened.gpus.warms_up:
            await warm_up(self._opened, self._scheduler.limits)
        assert self._warm is not None  # made on entering
        gc.freeze()  # what was made so far stays: a collection that looks at it takes tens of milliseconds
        self._warm.set_result(None)
        async with Worker("arrays") as worker:
            await self._run_forever(worker)

    async def _run_forever(self, worker: Worker) -> None:
        scheduler, gpus = self._scheduler, self._opened.gpus
        step: Packed
        ahead: Packed | None = None
        while True:
            self._last_beat = time.monotonic()
            if ahead is not None:
                step = ahead
                step.sampling = scheduler.sampling(step.step_id)
            elif (scheduled := await self._schedule(worker)) is not None:
                step = await worker.run(partial(gpus.assemble, scheduled))
            else:
                self._wake.clear()
                await self._wake.wait()
                self._meter.begin()
                continue
            self._opened.grammars.begin(step.sampling)  # made while the device computes
            ahead = self._schedule_ahead(step)
            self._meter.note_blocks()
            try:
                result = await gpus.execute(step, ahead)
                self._meter.note_step(step.counts)
                outputs = self._commit(step, result)
            except OutOfDeviceMemoryError as error:
                outputs = self._fail_step(step, error)
            await self._delivery.put(outputs)

    async def _schedule(self, worker: Worker) -> Scheduled | None:
        """The next step, with what is drafted by then."""
        await self._speculation.draft(worker)
        return self._scheduler.schedule(self._last_beat)

    def _schedule_ahead(self, step: Packed) -> Packed | None:
        """The step after `step`, where it is known already what that will be."""
        gpus = self._opened.gpus
        if not gpus.runs_ahead or not self._speculation.leave_out():
            return None
        scheduled = self._scheduler.schedule_ahead(step)
        return None if scheduled is None else gpus.assemble(scheduled)  # its arrays are there

    def _fail_step(self, step: Packed, error: OutOfDeviceMemoryError) -> list[Output]:
        """End the step's requests; their blocks are free for the others."""
        for request in self._scheduler.requests(step.step_id):
            self._delivery.fail(request, error)
        self._scheduler.abandon(step.step_id)
        return []

    def _commit(self, step: Packed, result: StepResult | None) -> list[Output]:
        if result is None:
            self._scheduler.abandon(step.step_id)
            return []
        token_ids = [None if failed else token_id for token_id, _, failed in result.sampled]
        logprobs = [logprob for _, logprob, _ in result.sampled]
        outputs = self._scheduler.commit(step.step_id, token_ids, time.monotonic(), logprobs, result.scored)
        self._meter.generated_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _request(self, request_id: str, token_ids: list[int], applicant: Applicant, salt: str) -> Request:
        params, client, user = applicant.params, applicant.client, applicant.user
        seed = self._seeds.randrange(2**63) if params.seed is None else params.seed
        params = replace(params, seed=seed, top_k=min(params.top_k, self.spec.vocab_size))
        now = time.monotonic()
        return Request(request_id, token_ids, params, self._arrivals, now, client=client, user=user, salt=salt)

    def _add(self, request: Request, detokenizer: Detokenizer, *, is_text: bool) -> Generation:
        # The request keeps the max_tokens asked for: it tells MAX_TOKENS from CONTEXT_LENGTH.
        effective = request.params.within(self.max_model_len - request.num_prompt_tokens)
        generation = self._delivery.open(request, effective, detokenizer, is_text=is_text)
        self._arrivals += 1
        self._meter.prompt_tokens += request.num_prompt_tokens
        if not self._is_busy:
            self._last_beat = request.arrival_time
        self._scheduler.add(request)
        self._wake.set()
        return generation

    def _check_open(self, request_id: str | None) -> None:
        if not self._accepts:
            raise EngineUnavailableError("the engine is not running")
        if request_id is not None and request_id in self._delivery.live:
            raise RequestExistsError(request_id)


def _forget(error: BaseException | None) -> None:
    """What the functions that failed had: whoever holds the error would hold weights and pools with it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _not_started() -> EngineUnavailableError:
    return EngineUnavailableError("the engine is not started; use `async with Engine(...)`")


def _limits(plan: Plan, spec: ModelSpec, *, shares_prefixes: bool) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch=plan.max_batch,
        max_model_len=plan.max_model_len,
        max_prefill_tokens=plan.max_prefill_tokens,
        spare_prefill_tokens=plan.spare_prefill_tokens,
        max_idle_prefill_tokens=plan.max_idle_prefill_tokens,
        block_size=plan.block_size,
        buffers=plan.buffers,
        costs=plan.costs,
        windows=spec.sizes.windows,
        in_place=plan.in_place,
        keeps_cache=plan.keeps_cache,
        shares_prefixes=shares_prefixes,
        recompute=plan.recompute,
        max_draft_tokens=plan.max_draft_tokens,
    )
