"""From a configuration to a model as its files declare it, before any weight is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hsrpc.config import DeviceKind, DType, EngineConfig
from hsrpc.model.checkpoint import Checkpoint, RandomWeights, has_weights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import ModelSpec
from hsrpc.model.formats.choice import with_caches, with_scaled
from hsrpc.model.formats.format import WeightSource
from hsrpc.model.hub import resolve_model
from hsrpc.model.quantization.registry import read_quantization, says_more
from hsrpc.model.quantization.section import KEY as QUANTIZATION
from hsrpc.model.random_codes import split_format
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.model.spec import DTYPES, in_formats, load_spec, named_spec
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.plan.question import Question

_log = logging.getLogger(__name__)

_CPU_MAX_BATCH = 32
_CPU_PREFILL_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model as its files declare it, in each choice of formats."""

    spec: ModelSpec
    choices: list[ModelSpec]
    directory: Path | None
    """None: random weights."""
    checkpoint: Checkpoint | None
    """The weights in the directory, checked from their headers; None: it has none, or they are random."""

    @classmethod
    def read(cls, config: EngineConfig, device: torch.device) -> ModelFiles:
        """Read the configuration and the headers of the weights, and check one against the other.

        Raises:
            ConfigError, CheckpointError, ModelNotFoundError: as their names say.
        """
        spec, directory = read_spec(config, device), model_directory(config)
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

    def question(self, machine: Machine, config: EngineConfig) -> Question:
        """What a plan for the machine answers; on a CPU with a batch and chunks that are no larger than it needs."""
        if machine.kind is DeviceKind.CPU:
            config = replace(
                config,
                max_batch=config.max_batch or max(_CPU_MAX_BATCH, config.min_batch),
                max_prefill_tokens=config.max_prefill_tokens or _CPU_PREFILL_TOKENS,
            )
        sizes = tuple(spec.sizes.on_gpus(config.num_gpus) for spec in self.choices)
        return Question(choices=sizes, machine=machine, config=config)

    def spec_of(self, choice: int, plan: Plan) -> ModelSpec:
        """The model in the formats of a plan for the choice of that number."""
        spec = self.choices[choice]
        formats = spec.formats.holding(plan.kinds)
        return spec if formats == spec.formats else in_formats(spec, formats)

    @property
    def source(self) -> WeightSource:
        """Where the weights are read from.

        Raises:
            CheckpointError: there are none.
        """
        if self.directory is None:
            return RandomWeights(0)
        return self.checkpoint or Checkpoint(self.directory)


def read_spec(config: EngineConfig, device: torch.device) -> ModelSpec:
    """The spec of the model that a configuration names; reads no weights.

    Raises:
        ConfigError, CheckpointError, ModelNotFoundError: as their names say.
    """
    dtype = _dtype(config.dtype, on_cpu=device.type == "cpu")
    directory = model_directory(config)
    if directory is None:
        shape, form = split_format(config.model.removeprefix(RANDOM_PREFIX))
        spec = named_spec(shape, dtype)
        return spec if form is None else replace(spec, name=f"{spec.name}:{form.name}")
    return load_spec(directory, dtype)


def model_directory(config: EngineConfig) -> Path | None:
    """The model's; None: its weights are random."""
    if config.model.startswith(RANDOM_PREFIX):
        return None
    return resolve_model(config.model, trust_links=config.trust_links)


def _dtype(wanted: DType, on_cpu: bool) -> torch.dtype | None:
    """None: the checkpoint's own."""
    if wanted is DType.AUTO:
        return torch.float32 if on_cpu else None
    return DTYPES[wanted]
