"""From a configuration to everything an engine is made of: model, device, calibration, plan, weights, pools."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from hsrpc.config import ALL_GPUS, DeviceKind, DraftMethod, EngineConfig, GenerationDefaults, WeightCoding, format_bytes
from hsrpc.device.calibration import calibrate, gather_bandwidth, sustained_load
from hsrpc.device.device import Device, device_kind, num_devices, open_device
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.device.host_memory import HostMemory
from hsrpc.draft.drafter import Drafter
from hsrpc.draft.ngrams import NgramDrafter
from hsrpc.draft.suffix import SuffixDrafter
from hsrpc.engine.chat_template import read_template
from hsrpc.engine.draft_model import PlannedDraftModel, plan_draft_model
from hsrpc.engine.gpus.contract import GpuFacts, Gpus
from hsrpc.engine.gpus.one import OneGpu
from hsrpc.engine.gpus.ranks import Ranks
from hsrpc.engine.grammars.grammars import Grammars, NoGrammars
from hsrpc.engine.loading import OverBoundError, Progress
from hsrpc.engine.loading_progress import LoadingProgress
from hsrpc.engine.model_files import ModelFiles, model_directory, read_spec
from hsrpc.engine.no_tokenizer import NoTokenizer
from hsrpc.engine.opened_model import OpenedModel
from hsrpc.engine.run_to_end import run_to_end
from hsrpc.engine.tasks.executor import Executor
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.engine.validation import max_characters
from hsrpc.errors import ConfigError
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import ModelSpec
from hsrpc.model.formats.format import WeightSource
from hsrpc.model.generation_config import read_default_params
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.model.tensor import dtype_name
from hsrpc.plan.forecast import longest_step
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.question import Question
from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockManager

_log = logging.getLogger(__name__)
ChoosePlan: TypeAlias = Callable[[Planner], Plan]
"""Another policy is another plan, made with hsrpc's planner for the model, the machine and the settings."""
_MUCH_MORE = 1.25
_LOWER = "lower it, or end what else uses the memory"


@dataclass(frozen=True, slots=True)
class Components:
    """What an engine owns while it runs."""

    spec: ModelSpec
    question: Question
    """What the plan answers."""
    plan: Plan
    default_params: SamplingParams
    """What a request takes that says nothing else."""
    tokenizer: Tokenizer | NoTokenizer
    grammars: Grammars | NoGrammars
    gpus: Gpus[Any]
    facts: Sequence[GpuFacts]
    """What was found of each GPU."""
    drafter: Drafter | None
    """What drafts tokens; None: nothing is drafted."""

    def new_blocks(self) -> list[BlockManager]:
        """Blocks of each GPU, all free."""
        plan = self.plan
        return [BlockManager(plan.num_blocks, plan.max_batch, plan.kind_rule) for _ in range(self.gpus.count)]

    async def close(self) -> Callable[[], None]:
        """End the threads of texts and constraints, and give host memory back, as `Gpus.close`."""
        self.tokenizer.close()
        self.grammars.close()
        return await self.gpus.close()


@dataclass(frozen=True, slots=True)
class Planned:
    """A model and its plan, before any weight is read."""

    files: ModelFiles
    choice: int
    """Number of the model's choice of formats that the plan is for."""
    spec: ModelSpec
    """The model in these, as the plan has them."""
    question: Question
    planner: Planner
    """hsrpc's own, whoever made the plan."""
    plan: Plan
    draft_model: PlannedDraftModel | None
    default_params: SamplingParams
    """What a request takes that says nothing else."""

    @property
    def used_draft_model(self) -> PlannedDraftModel | None:
        """The draft model that is loaded; None: there is none, or nothing is drafted."""
        return self.draft_model if self.plan.max_draft_tokens else None


def make_plan(config: EngineConfig, choose_plan: ChoosePlan = Planner.plan) -> Planned:
    """Read the model's configuration, open the device, calibrate, and plan. Takes seconds.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    config = _counted(config)
    return _plan_here(open_device(config.device), config, choose_plan)


def plan_for(machine: Machine, config: EngineConfig) -> Planned:
    """Read the model's configuration, and plan for a machine that may be elsewhere: no device is opened.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    model = ModelFiles.read(config, torch.device(machine.kind))
    return _plan(model, machine.at_once(config.num_gpus), config, Planner.plan)


def _plan_here(device: Device, config: EngineConfig, choose_plan: ChoosePlan) -> Planned:
    model = ModelFiles.read(config, device.torch_device)
    _check_layer(model.choices, config, device)
    if config.host_memory is None:
        _tell_of_growth(HostMemory.read())
    return _plan(model, measure(device, model.spec).at_once(config.num_gpus), config, choose_plan)


def _plan(model: ModelFiles, machine: Machine, config: EngineConfig, choose_plan: ChoosePlan) -> Planned:
    question, drafting = model.question(machine, config), None
    if config.draft_model is not None:
        drafting = plan_draft_model(config.draft_model, config, model, machine)
        question = replace(question, draft_model_bytes=drafting.device_bytes, draft_time=drafting.time)
    planner, plan = question.answer(choose_plan)
    choice = question.choice_of(planner)
    spec, default_params = model.spec_of(choice, plan), _default_params(config, model.directory)
    return Planned(model, choice, spec, question, planner, plan, drafting, default_params)


def _tell_of_growth(memory: HostMemory) -> None:
    """Say that the default counts on what is free now alone, where the machine has much more."""
    if memory.obtainable > _MUCH_MORE * memory.free:
        free, more = format_bytes(memory.free), format_bytes(memory.obtainable)
        _log.warning("host memory: %s are free, and up to %s as it is used; give host_memory to use more", free, more)


def _default_params(config: EngineConfig, directory: Path | None) -> SamplingParams:
    if directory is None or config.generation_config is GenerationDefaults.NONE:
        return SamplingParams()
    return read_default_params(directory)


def _check_layer(choices: Sequence[ModelSpec], config: EngineConfig, device: Device) -> None:
    """Check before calibration, which multiplies by a layer's weights: all of a layer is on the device at once.

    Raises:
        ConfigError: the device has less memory than the weights of a layer take, whatever the choice of formats.
    """
    largest = min(int(spec.sizes.largest(lambda layer: layer.weight_bytes)) for spec in choices)
    free = device.free_memory
    if largest > free:
        problem = f"one layer of {choices[0].name} takes {format_bytes(largest)}, and {format_bytes(free)} are free"
        budget = int(config.gpu_memory or free)
        raise ConfigError(
            "gpu_memory", format_bytes(budget), problem, "end what else uses it, or serve a smaller model"
        )


def measure_machine(config: EngineConfig) -> Machine:
    """The device that a configuration names, as it is now: its memory, and its rates for the model's sizes."""
    spec, device = describe_model(config)
    return measure(device, spec)


def measure(device: Device, spec: ModelSpec, group: DeviceGroup = ALONE) -> Machine:
    """The memory of a device and of this host, and the rates at which it computes a model.

    Those of a `group` of devices measure at once.
    """
    device_memory, host_memory = device.free_memory, HostMemory.read().free  # before calibration takes some
    hardware = calibrate(device, spec.sizes, spec.dtype)
    if not group.is_alone:
        hardware = replace(hardware, gather_bandwidth=gather_bandwidth(device, group))
        device.release_cached()
    return Machine(
        name=device.name,
        kind=DeviceKind(device.torch_device.type),
        device_memory=device_memory,
        host_memory=host_memory,
        dtype=dtype_name(spec.dtype),
        hardware=hardware,
    )


def measure_sustained_load(config: EngineConfig) -> float:
    """Bytes/s that the bus keeps up now, whatever disturbs it."""
    return sustained_load(open_device(config.device))


def describe_model(config: EngineConfig) -> tuple[ModelSpec, Device]:
    """The model and the device that a configuration names; reads no weights.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    device = open_device(config.device)
    return read_spec(config, device.torch_device), device


async def open_components(config: EngineConfig, choose_plan: ChoosePlan, progress: bool) -> Components:
    """Everything, loaded and ready to run. Cancelled, it stops after the layers being read and gives all back.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    config = _counted(config)
    try:
        return await _open(config, choose_plan, progress)
    except OverBoundError as error:
        if config.weight_coding is not WeightCoding.AUTO:
            raise
        _log.warning("%s; loading them as they are", error)
        return await _open(replace(config, weight_coding=WeightCoding.NONE), choose_plan, progress)


async def _open(config: EngineConfig, choose_plan: ChoosePlan, progress: bool) -> Components:
    if config.num_gpus > 1:
        return await _open_ranks(config, choose_plan, progress)
    stop = threading.Event()
    opening = asyncio.create_task(asyncio.to_thread(_open_here, config, choose_plan, progress, stop))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        stop.set()
        await run_to_end(_close_opened(opening))
        raise


async def _close_opened(opening: asyncio.Task[Components]) -> None:
    with suppress(Exception):  # nobody is there to be told
        await (await opening).close()


async def _open_ranks(config: EngineConfig, choose_plan: ChoosePlan, progress: bool) -> Components:
    """Several GPUs, each opened by a process of its own; model, plan and tokenizer are this one's."""
    _template(config)  # first: what is wrong with it is told before anything takes time
    model = await asyncio.to_thread(ModelFiles.read, config, torch.device(device_kind(config.device)))
    ranks = await Ranks.start(config)
    try:
        planned = await asyncio.to_thread(_plan, model, ranks.machine, config, choose_plan)
        sizes, draft_model = planned.spec.sizes, planned.used_draft_model
        longest = longest_step(planned.plan, sizes)
        await ranks.load(planned.plan, planned.choice, sizes.windows, longest, draft_model, bars=progress)
        tokenizer = await asyncio.to_thread(open_tokenizer, planned, config)
        drafter = _drafter(planned, config) if draft_model is None else ranks.drafter()
        return await asyncio.to_thread(_components, planned, tokenizer, ranks, ranks.facts, drafter)
    except BaseException:
        await run_to_end(_close_ranks(ranks))
        raise


async def _close_ranks(ranks: Ranks) -> None:
    await ranks.close()


def _counted(config: EngineConfig) -> EngineConfig:
    """The configuration with a number of GPUs.

    Raises:
        ConfigError: there are fewer than it wants.
    """
    there = num_devices(config.device)
    if config.gpus == ALL_GPUS:
        return replace(config, gpus=there or 1)
    if there is not None and config.num_gpus > max(1, there):  # without any, opening one says so
        raise ConfigError("gpus", config.gpus, f"there are {there}", "give at most that, or all")
    return config


def _open_here(config: EngineConfig, choose_plan: ChoosePlan, progress: bool, stop: threading.Event) -> Components:
    """One GPU, in this process."""
    with ExitStack() as undo:
        _template(config)  # first: what is wrong with it is told before anything takes time
        device = open_device(config.device)
        planned = _plan_here(device, config, choose_plan)
        undo.callback(device.release_pinned)
        source = planned.files.source  # before the tokenizer: what fails here leaves no threads behind
        tokenizer = open_tokenizer(planned, config)
        undo.callback(tokenizer.close)
        with LoadingProgress(1, bars=progress) as shown:
            gpu = open_gpu(planned.spec, planned.plan, source, device, stop, progress=partial(shown.note, 0))
        draft_model = planned.used_draft_model
        drafter = _drafter(planned, config) if draft_model is None else draft_model.open(device, stop)
        facts = GpuFacts(device.uuid, planned.question.machine)
        components = _components(planned, tokenizer, gpu, [facts], drafter)
        undo.pop_all()
        return components


def _components(
    planned: Planned,
    tokenizer: Tokenizer | NoTokenizer,
    gpus: Gpus[Any],
    facts: Sequence[GpuFacts],
    drafter: Drafter | None,
) -> Components:
    ends = dict.fromkeys((*planned.spec.eos_token_ids, *tokenizer.end_token_ids))
    spec = replace(planned.spec, eos_token_ids=tuple(ends))
    grammars = open_grammars(tokenizer, spec)
    question, plan, default_params = planned.question, planned.plan, planned.default_params
    return Components(spec, question, plan, default_params, tokenizer, grammars, gpus, facts, drafter)


def _drafter(planned: Planned, config: EngineConfig) -> Drafter | None:
    """What drafts tokens without a model; None: nothing does."""
    if planned.draft_model is not None or not planned.plan.max_draft_tokens:
        return None
    return NgramDrafter() if config.drafter is DraftMethod.NGRAM else SuffixDrafter()


def open_gpu(
    spec: ModelSpec,
    plan: Plan,
    source: WeightSource,
    device: Device,
    stop: threading.Event,
    *,
    group: DeviceGroup = ALONE,
    progress: Progress = lambda done, total: None,
) -> OneGpu:
    """The model on a device, as the plan wants it; `group`: GPUs that load what streams for each other.

    Once `stop` is set, no further layer is loaded.

    Raises:
        ConfigError, CheckpointError: as their names say.
        EngineUnavailableError: it was stopped.
    """
    device.release_cached()  # what calibration used
    _check_room(plan, device, group.size)
    group.meet()  # nobody takes memory before all have looked
    device.limit_memory(plan.budgets.device)
    family = create_family(spec, plan.max_model_len)
    opened = OpenedModel.open(family, source, plan, device, stop, group=group, progress=progress)
    executor = Executor(
        opened.assembler,
        device,
        prefetcher=opened.prefetcher,
        cache=opened.cache,
        forward=opened.forward,
        graphs=opened.graphs,
        score_rows=opened.score_rows,
    )
    return OneGpu(device, opened.prefetcher, opened.cache, executor)


def _check_room(plan: Plan, device: Device, num_gpus: int = 1) -> None:
    """Check the free memory before anything is allocated: a host that runs out ends this program, or another.

    `num_gpus` take as much of the host's.

    Raises:
        ConfigError: the device or the host has less memory left than the plan takes, or a limit is too low for it.
    """
    device_bytes, host_bytes = (sum(parts.values()) for parts in (plan.device_bytes, plan.host_bytes))
    memory = HostMemory.read()
    others = 0
    if device.torch_device.type == "cpu":  # one memory for both
        others = num_gpus * device_bytes
        _check_host_room("gpu_memory", plan.budgets.device, others, 0, memory)
    elif device_bytes > (free := device.free_memory):
        problem = f"the plan takes {format_bytes(device_bytes)} of it, and {format_bytes(free)} are free"
        raise ConfigError("gpu_memory", format_bytes(plan.budgets.device), problem, _LOWER)
    _check_host_room("host_memory", num_gpus * plan.budgets.host, num_gpus * host_bytes, others, memory)
    device.check_pinning(host_bytes)


def _check_host_room(field: str, budget: int, size: int, others: int, memory: HostMemory) -> None:
    """Check that `size` bytes fit the host's memory beside `others`, which come out of it too.

    What is not free yet but would be if the machine brought in all of its memory is tried.
    """
    if size + others <= memory.free:
        return
    problem = f"the plan takes {format_bytes(size)} of it"
    limit = memory.limit
    if limit is not None and size + others > limit.left:
        left = format_bytes(max(0, limit.left - others))
        problem += f", and the memory limit of {format_bytes(limit.size)} ({limit.file}) leaves {left}"
        raise ConfigError(field, format_bytes(budget), problem, "lower it, or raise that limit")
    free = format_bytes(max(0, memory.free - others))
    if size + others > memory.obtainable:
        raise ConfigError(field, format_bytes(budget), f"{problem}, and {free} are free", _LOWER)
    _log.warning("%s: %s, %s are free, and the machine may bring in the rest: trying it", field, problem, free)


def _template(config: EngineConfig) -> str | None:
    """The chat template in place of the model's own; None: none is given.

    Raises:
        ConfigError: it cannot be read, or nothing can be made of it.
    """
    if config.chat_template is None:
        return None
    if config.model.startswith(RANDOM_PREFIX):
        raise ConfigError("chat_template", config.chat_template, f"{config.model} has no tokenizer", "leave it out")
    return read_template(config.chat_template)


def open_tokenizer(planned: Planned, config: EngineConfig) -> Tokenizer | NoTokenizer:
    """The tokenizer of a planned model, with the chat template that `config` gives; takes seconds.

    Raises:
        ConfigError, CheckpointError: as their names say.
    """
    return _open_tokenizer(config, planned.files.directory, planned.spec, planned.plan.max_model_len)


def open_model_tokenizer(config: EngineConfig) -> Tokenizer | NoTokenizer:
    """The tokenizer of the model that a configuration names, before there is a plan; takes seconds.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    directory, spec = model_directory(config), read_spec(config, torch.device("cpu"))
    return _open_tokenizer(config, directory, spec, config.max_model_len or spec.sizes.context_length)


def _open_tokenizer(
    config: EngineConfig, directory: Path | None, spec: ModelSpec, max_model_len: int
) -> Tokenizer | NoTokenizer:
    template = _template(config)
    if directory is None:
        return NoTokenizer()
    longest = max_characters(max_model_len)
    return Tokenizer(directory, spec.vocab_size, chat_template=template, max_characters=longest)


def open_grammars(tokenizer: Tokenizer | NoTokenizer, spec: ModelSpec) -> Grammars | NoGrammars:
    """What constrains outputs; takes half a second of a large vocabulary."""
    if isinstance(tokenizer, NoTokenizer):
        return NoGrammars("this model has no tokenizer, which says what text its tokens are")
    if not spec.eos_token_ids:
        return NoGrammars("this model has no token that ends a text, by which constrained output would end")
    try:
        return Grammars(tokenizer.vocabulary(spec.eos_token_ids))
    except ValueError as error:
        _log.warning("outputs cannot be constrained: %s", error)
        return NoGrammars("this model's tokenizer does not say what text its tokens are")
