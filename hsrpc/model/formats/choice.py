"""Which formats a model's weights and caches may have: decided here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from hsrpc.config import CacheCoding, WeightCoding
from hsrpc.errors import ConfigError
from hsrpc.model.formats.format import CacheFormat, Formats, WeightFormat
from hsrpc.model.formats.lossless import Lossless
from hsrpc.model.formats.plain import Plain
from hsrpc.model.formats.rows import Codes
from hsrpc.model.tensor import TensorSpec


def uniform(weight: WeightFormat, dtype: torch.dtype) -> Formats:
    """One format for the weights of the layers, except exact ones; and caches of the type that is computed with."""
    exact = Plain(torch.float32)
    rows = CacheFormat(dtype)
    return Formats(weight=lambda tensor: exact if tensor.exact else weight, kv=rows, activation=rows)


_CODES = {CacheCoding.PLAIN: None, CacheCoding.FP8: Codes.FP8, CacheCoding.INT8: Codes.INT8}
"""What K and V are coded as; activations have outliers, which float8 takes and whole numbers do not."""


def with_caches(choices: Sequence[Formats], coding: CacheCoding) -> Sequence[Formats]:
    """The same choices with caches in that format."""
    kv, activation = _CODES[coding], None if coding is CacheCoding.PLAIN else Codes.FP8
    codes_weight = coding is CacheCoding.FP8
    return [
        replace(
            each,
            kv=replace(each.kv, codes=kv),
            activation=replace(each.activation, codes=activation),
            codes_weight=codes_weight,
        )
        for each in choices
    ]


def with_scaled(
    choices: Sequence[Formats], scaled: Mapping[TensorSpec, WeightFormat], coding: WeightCoding
) -> Sequence[Formats]:
    """The first of the choices, with the formats of tensors that have scales; all of them, where none has.

    Raises:
        ConfigError: weights were to be coded, which quantised ones cannot be.
    """
    if not scaled:
        return choices
    if coding is WeightCoding.LOSSLESS:
        raise ConfigError("weight_coding", coding.value, "the weights are quantised already", "use weight_coding=auto")
    others = choices[0].weight
    return [replace(choices[0], weight=lambda tensor: scaled.get(tensor) or others(tensor))]


def format_choices(coding: WeightCoding, dtype: torch.dtype, device: torch.device) -> Sequence[Formats]:
    """What the planner may choose from, the first one where two are as fast: weights as they are, and coded.

    Raises:
        ConfigError: weights of that type cannot be coded, and were to be.
    """
    plain, can_code = uniform(Plain(dtype), dtype), Lossless.takes(dtype)
    if coding is WeightCoding.LOSSLESS and not can_code:
        problem = f"{dtype} weights cannot be coded"
        raise ConfigError(
            "weight_coding", coding.value, problem, "use dtype=float16 or bfloat16, or weight_coding=auto"
        )
    if coding is WeightCoding.LOSSLESS:
        return [uniform(Lossless(dtype), dtype)]
    if coding is WeightCoding.AUTO and can_code and Lossless.pays_on(device):
        return [plain, uniform(Lossless(dtype), dtype)]
    return [plain]
