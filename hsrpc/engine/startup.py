"""From a configuration to everything an engine is made of: model, device, calibration, plan, weights, pools."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from hsrpc.config import ALL_GPUS, DeviceKind, DType, EngineConfig, GenerationDefaults, WeightCoding, format_bytes
from hsrpc.device.calibration import calibrate, sustained_load
from hsrpc.device.device import Device, device_kind, num_devices, open_device
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.device.host_memory import HostMemory
from hsrpc.engine.chat_template import read_template
from hsrpc.engine.forward import Forward
from hsrpc.engine.gpus.contract import Gpus
from hsrpc.engine.gpus.one import OneGpu
from hsrpc.engine.gpus.ranks import Ranks
from hsrpc.engine.grammars.grammars import Grammars, NoGrammars
from hsrpc.engine.graphs import DecodeGraphs, can_capture
from hsrpc.engine.loading import OverBoundError, compile_formats, load_weights
from hsrpc.engine.no_tokenizer import NoTokenizer
from hsrpc.engine.run_to_end import run_to_end
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.tasks.executor import Executor
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.engine.validation import max_characters
from hsrpc.errors import ConfigError
from hsrpc.model.attention import Attention, HeadShape
from hsrpc.model.checkpoint import Checkpoint, RandomWeights, has_weights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family, ModelSpec
from hsrpc.model.formats.choice import with_caches, with_scaled
from hsrpc.model.formats.format import WeightSource
from hsrpc.model.formats.rows import Rows
from hsrpc.model.generation_config import read_default_params
from hsrpc.model.hub import resolve_model
from hsrpc.model.quantization.registry import read_quantization, says_more
from hsrpc.model.quantization.section import KEY as QUANTIZATION
from hsrpc.model.random_codes import split_format
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.model.spec import DTYPES, in_formats, load_spec, named_spec
from hsrpc.model.tensor import dtype_name
from hsrpc.plan.device_memory import score_rows
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.question import Question
from hsrpc.request import SamplingParams
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.blocks import BlockManager
from hsrpc.schedule.sweep import Places

_log = logging.getLogger(__name__)
ChoosePlan: TypeAlias = Callable[[Planner], Plan]
"""Another policy is another plan, made with hsrpc's planner for the model, the machine and the settings."""
_CPU_MAX_BATCH = 32
_CPU_PREFILL_TOKENS = 256
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
class Model:
    """A model as its files declare it, in each choice of formats."""

    spec: ModelSpec
    choices: list[ModelSpec]
    directory: Path | None
    """None: random weights."""
    checkpoint: Checkpoint | None
    """The weights in the directory, checked from their headers; None: it has none, or they are random."""

    @classmethod
    def read(cls, config: EngineConfig, device: torch.device) -> Model:
        """The model that a configuration names, for a kind of device; reads no weights.

        Raises:
            ConfigError, CheckpointError, ModelNotFoundError: as their names say.
        """
        spec, directory = _read_spec(config, device), _directory(config)
        family, quantization = create_family(spec), read_quantization(spec.config)
        formats, checkpoint = family.format_choices(config.weight_coding, device), None
        if directory is None:
            drawn = split_format(config.model.removeprefix(RANDOM_PREFIX))[1]
            formats = with_scaled(formats, drawn.formats(family) if drawn else {}, config.weight_coding)
        elif has_weights(directory):
            checkpoint = Checkpoint(directory, quantization)
            checkpoint.check_model(family)
            if says_more(spec.config):
                _log.warning("%s: activations are not quantised, nor caches; scales of theirs are ignored", directory)
            formats = with_scaled(formats, checkpoint.scaled(family), config.weight_coding)
        elif quantization is not None:
            raise spec.config.refuse(QUANTIZATION, "weights beside it, which say what is quantised", "fetch them")
        formats = with_caches(formats, config.cache_format)
        return cls(spec, [in_formats(spec, each) for each in formats], directory, checkpoint)

    def spec_of(self, choice: int, plan: Plan) -> ModelSpec:
        """The model in the formats of a plan for that choice."""
        spec = self.choices[choice]
        formats = spec.formats.holding(plan.kinds)
        return spec if formats == spec.formats else in_formats(spec, formats)

    @property
    def source(self) -> WeightSource:
        """Where its weights come from."""
        if self.directory is None:
            return RandomWeights(0)
        return self.checkpoint or Checkpoint(self.directory)


@dataclass(frozen=True, slots=True)
class Planned:
    """A model and its plan, before any weight is read."""

    model: Model
    choice: int
    """Number of the model's choice of formats that the plan is for."""
    spec: ModelSpec
    """The model in these, as the plan has them."""
    question: Question
    planner: Planner
    """hsrpc's own, whoever made the plan."""
    plan: Plan
    default_params: SamplingParams
    """What a request takes that says nothing else."""

    @property
    def directory(self) -> Path | None:
        """None: random weights."""
        return self.model.directory


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
    model = Model.read(config, torch.device(machine.kind))
    return _plan(model, machine.at_once(config.num_gpus), config, Planner.plan)


def _plan_here(device: Device, config: EngineConfig, choose_plan: ChoosePlan) -> Planned:
    model = Model.read(config, device.torch_device)
    _check_layer(model.choices, config, device)
    if config.host_memory is None:
        _tell_of_growth(HostMemory.read())
    return _plan(model, measure(device, model.spec).at_once(config.num_gpus), config, choose_plan)


def _plan(model: Model, machine: Machine, config: EngineConfig, choose_plan: ChoosePlan) -> Planned:
    if machine.kind is DeviceKind.CPU:
        config = replace(
            config,
            max_batch=config.max_batch or max(_CPU_MAX_BATCH, config.min_batch),
            max_prefill_tokens=config.max_prefill_tokens or _CPU_PREFILL_TOKENS,
        )
    sizes = tuple(spec.sizes.on_gpus(config.num_gpus) for spec in model.choices)
    question = Question(choices=sizes, machine=machine, config=config)
    planner, plan = question.answer(choose_plan)
    [choice] = [number for number, each in enumerate(sizes) if each is planner.sizes]
    spec, default_params = model.spec_of(choice, plan), _default_params(config, model.directory)
    return Planned(model, choice, spec, question, planner, plan, default_params)


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


def measure(device: Device, spec: ModelSpec) -> Machine:
    """The memory of a device and of this host, and the rates at which it computes a model."""
    device_memory, host_memory = device.free_memory, HostMemory.read().free  # before calibration takes some
    return Machine(
        name=device.name,
        kind=DeviceKind(device.torch_device.type),
        device_memory=device_memory,
        host_memory=host_memory,
        dtype=dtype_name(spec.dtype),
        hardware=calibrate(device, spec.sizes, spec.dtype),
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
    return _read_spec(config, device.torch_device), device


def _read_spec(config: EngineConfig, device: torch.device) -> ModelSpec:
    dtype = _dtype(config.dtype, on_cpu=device.type == "cpu")
    directory = _directory(config)
    if directory is None:
        shape, form = split_format(config.model.removeprefix(RANDOM_PREFIX))
        spec = named_spec(shape, dtype)
        return spec if form is None else replace(spec, name=f"{spec.name}:{form.name}")
    return load_spec(directory, dtype)


def _directory(config: EngineConfig) -> Path | None:
    """The model's; None: its weights are random."""
    if config.model.startswith(RANDOM_PREFIX):
        return None
    return resolve_model(config.model, trust_links=config.trust_links)


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
    model = await asyncio.to_thread(Model.read, config, torch.device(device_kind(config.device)))
    ranks = await Ranks.start(config, progress)
    try:
        planned = await asyncio.to_thread(_plan, model, ranks.machine, config, choose_plan)
        await ranks.load(planned.plan, planned.choice, planned.spec.sizes.windows)
        tokenizer = await asyncio.to_thread(open_tokenizer, planned, config)
        return await asyncio.to_thread(_components, planned, tokenizer, ranks)
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
    if there is not None and config.num_gpus > there:
        raise ConfigError("gpus", config.gpus, f"there are {there}", "give at most that, or all")
    return config


def _open_here(config: EngineConfig, choose_plan: ChoosePlan, progress: bool, stop: threading.Event) -> Components:
    """One GPU, in this process."""
    with ExitStack() as undo:
        _template(config)  # first: what is wrong with it is told before anything takes time
        device = open_device(config.device)
        planned = _plan_here(device, config, choose_plan)
        undo.callback(device.release_pinned)
        source = planned.model.source  # before the tokenizer: what fails here leaves no threads behind
        tokenizer = open_tokenizer(planned, config)
        undo.callback(tokenizer.close)
        gpu = open_gpu(planned.spec, planned.plan, source, device, stop, progress=progress)
        components = _components(planned, tokenizer, gpu)
        undo.pop_all()
        return components


def _components(planned: Planned, tokenizer: Tokenizer | NoTokenizer, gpus: Gpus[Any]) -> Components:
    ends = dict.fromkeys((*planned.spec.eos_token_ids, *tokenizer.end_token_ids))
    spec = replace(planned.spec, eos_token_ids=tuple(ends))
    grammars = open_grammars(tokenizer, spec)
    return Components(spec, planned.question, planned.plan, planned.default_params, tokenizer, grammars, gpus)


def open_gpu(
    spec: ModelSpec,
    plan: Plan,
    source: WeightSource,
    device: Device,
    stop: threading.Event,
    *,
    group: DeviceGroup = ALONE,
    progress: bool = False,
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
    family, torch_device = create_family(spec, plan.max_model_len), device.torch_device
    attention = _attention(family, family.heads, family.kv_rows, plan, torch_device)
    absorbed = _absorbed_attention(family, plan, torch_device)
    with torch.inference_mode(), ThreadPoolExecutor(1, thread_name_prefix="compile") as compiler:
        compile_formats(family, plan, device)  # before the other thread compiles
        compiled = [compiler.submit(each.compile) for each in (attention, absorbed) if each is not None]
        compiled.append(compiler.submit(family.activations.compile, torch_device))
        weights = load_weights(family, source, plan, device, stop, group=group, progress=progress)
        device.release_cached()  # what packing used
        cache = CacheManager(spec.sizes, plan, device, family.rows)
        prefetcher = WeightPrefetcher(weights, plan, device, family, group)
        forward = Forward(
            family, weights.fixed, device, prefetcher=prefetcher, cache=cache, attention=attention, absorbed=absorbed
        )
        for each in compiled:
            each.result()
        device.drain()
        assembler = Assembler(
            layers=_places(prefetcher, plan),
            block_size=plan.block_size,
            windows=spec.sizes.windows,
            max_queries=plan.buffers.queries,
            in_place=plan.in_place,
        )
        graphs = None
        if can_capture(plan):
            graphs = DecodeGraphs(forward, cache, prefetcher, device, layers=assembler.layers, plan=plan)
        executor = Executor(
            assembler,
            device,
            prefetcher=prefetcher,
            cache=cache,
            forward=forward,
            graphs=graphs,
            score_rows=score_rows(spec.sizes, plan.max_batch, plan.buffers.queries),
        )
    return OneGpu(device, prefetcher, cache, executor)


def _absorbed_attention(family: Family, plan: Plan, device: torch.device) -> Attention | None:
    """Attention of single queries to activations as they are stored, where the plan has it."""
    absorption = family.absorption
    if not plan.absorbs or absorption is None:
        return None
    return _attention(family, absorption.heads, family.activation_rows, plan, device)


def _attention(family: Family, heads: HeadShape, rows: Rows, plan: Plan, device: torch.device) -> Attention:
    return Attention(
        heads,
        family.attention_scale,
        plan.block_size,
        device,
        family.spec.dtype,
        rows=rows,
        windows=family.sizes.windows.distinct,
        extras=family.attention_extras,
    )


def _places(prefetcher: WeightPrefetcher, plan: Plan) -> Places:
    """Placement of each layer's weights, and whether anything is rebuilt in it."""
    return tuple(place._replace(rebuilds=layer not in plan.kv_layers) for layer, place in enumerate(prefetcher.places))


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
    template = _template(config)
    if planned.directory is None:
        return NoTokenizer()
    longest = max_characters(planned.plan.max_model_len)
    return Tokenizer(planned.directory, planned.spec.vocab_size, chat_template=template, max_characters=longest)


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


def _dtype(wanted: DType, on_cpu: bool) -> torch.dtype | None:
    """None: the checkpoint's own."""
    if wanted is DType.AUTO:
        return torch.float32 if on_cpu else None
    return DTYPES[wanted]
