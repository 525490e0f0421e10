"""What would make a plan faster: each change is tried by planning again, with everything else as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hsrpc.config import format_bytes, format_rate
from hsrpc.errors import ConfigError
from hsrpc.plan.fitted import CODES_RATE_SHARE
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import MAX_BATCH
from hsrpc.plan.question import Question
from hsrpc.plan.sizes import LayerSizes, ModelSizes, TensorSizes, align

_FACTOR = 2
"""How much more there is in each change."""
WORTH = 0.01
"""A smaller gain than this part is within what predictions do not tell apart."""
_NUM_BEST = 2
_WEIGHT_BITS = {8: 8.0, 4: 4.25}
"""Bits that a weight takes, with a scale of 16 bits for 64 weights of 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that could be otherwise."""

    name: str
    """For people."""
    question: Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What a change is predicted to bring."""

    name: str
    tokens_per_second: float
    """While requests come and go."""
    gain: float
    """Over the plan as it is, as a part of it: 0.5 is half as much again."""


def advise(question: Question, sizes: ModelSizes, plan: Plan) -> list[Advice]:
    """Every change that was tried and fits, the one that gains most first. Each takes as long as a plan.

    `sizes` are those of the question's that the plan is for: formats stay, and requests stay as long as in the plan, so
    that the plans compare.
    """
    config = replace(question.config, max_model_len=plan.max_model_len)
    found = (_try(change, plan) for change in _changes(replace(question, choices=(sizes,), config=config), plan))
    return sorted((advice for advice in found if advice is not None), key=lambda advice: -advice.gain)


def best_advice(advice: Sequence[Advice]) -> list[Advice]:
    """Those of `advise` that help most, and that help at all."""
    return [each for each in advice if each.gain >= WORTH][:_NUM_BEST]


def _try(change: Change, plan: Plan) -> Advice | None:
    """None: with this change no plan fits."""
    try:
        _, changed = change.question.answer()
    except ConfigError:
        return None
    rate = changed.prediction.mean_tokens_per_second
    gain = rate / plan.prediction.mean_tokens_per_second - 1
    return Advice(name=change.name, tokens_per_second=rate, gain=gain)


def _changes(question: Question, plan: Plan) -> Iterator[Change]:
    config, hardware = question.config, question.machine.hardware
    device, host = _FACTOR * plan.budgets.device, _FACTOR * plan.budgets.host
    with_device = replace(config, gpu_memory=device, host_memory=plan.budgets.host)
    yield Change(
        name=f"twice the device memory, {format_bytes(device)}", question=replace(question, config=with_device)
    )
    with_host = replace(config, gpu_memory=plan.budgets.device, host_memory=host)
    yield Change(name=f"twice the host memory, {format_bytes(host)}", question=replace(question, config=with_host))
    load, store = _FACTOR * hardware.load_bandwidth, _FACTOR * hardware.store_bandwidth
    faster = replace(question.machine, hardware=replace(hardware, load_bandwidth=load, store_bandwidth=store))
    yield Change(name=f"a bus twice as fast, {format_rate(load, 'B/s')}", question=replace(question, machine=faster))
    bound = config.max_batch or max(MAX_BATCH, config.min_batch)
    if plan.max_batch == bound:
        with_batch = replace(config, max_batch=_FACTOR * bound)
        yield Change(
            name=f"max_batch {_FACTOR * bound} in place of {bound}", question=replace(question, config=with_batch)
        )
    [sizes] = question.choices
    for bits, bits_each in _WEIGHT_BITS.items():
        smaller = _with_weight_bits(sizes, bits_each)
        if smaller != sizes:
            yield Change(name=f"weights of {bits} bits", question=replace(question, choices=(smaller,)))


def _with_weight_bits(sizes: ModelSizes, bits: float) -> ModelSizes:
    """The model with matrices in so many bits for each weight of its layers, where these are fewer."""
    smaller = {layer: _layer_with_bits(layer, bits) for layer, _ in sizes.distinct}
    return replace(sizes, layers=tuple(smaller[layer] for layer in sizes.layers))


def _layer_with_bits(layer: LayerSizes, bits: float) -> LayerSizes:
    return replace(layer, tensors=tuple(_with_bits(tensor, bits) for tensor in layer.tensors))


def _with_bits(tensor: TensorSizes, bits: float) -> TensorSizes:
    """As a quantised checkpoint has it: decoded before it is used."""
    size = align(math.ceil(tensor.num_elements * bits / 8))
    if size >= tensor.bus_bytes:
        return tensor
    return replace(
        tensor,
        buffer_bytes=size,
        bus_bytes=size,
        host_bytes=size,
        decoded_bytes=tensor.device_bytes,
        decode_traffic=(size + tensor.device_bytes) / CODES_RATE_SHARE,
    )
