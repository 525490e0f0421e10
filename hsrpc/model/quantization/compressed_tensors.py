"""Weights as compressed-tensors has them: groups of modules, each quantised in a way of its own.

Which modules are of which group nobody need know: the headers say what a weight has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hsrpc.model.bounds import MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import Factor
from hsrpc.model.quantization.float4 import FactorTensor, mxfp4, nvfp4
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.groups import read_bits, read_group_size
from hsrpc.model.quantization.integers import Bytes, Integers, Packed
from hsrpc.model.quantization.reader import AnyOf, Reader
from hsrpc.model.quantization.section import REMEDY, block_size, one_of

_FLOAT_STRATEGIES = ("tensor", "channel", "group", "block")
_INTEGER_STRATEGIES = ("tensor", "channel", "group")


def read_compressed_tensors(section: ConfigFile) -> Reader:
    """As `quantization_config` says.

    Raises:
        CheckpointError: a group of modules is quantised in another way than is served.
    """
    for key in ("sparsity_config", "transform_config"):
        if section.values.get(key) not in (None, {}):
            raise section.refuse(key, "nothing", REMEDY)
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.refuse("config_groups", "an object with groups of modules", REMEDY)
    by_format: dict[str, list[ConfigFile]] = {}
    for name in groups.values:
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if group is None or weights is None:
            raise groups.refuse(name, "an object that describes weights", REMEDY)
        by_format.setdefault(_format(section, group, weights), []).append(weights)
    return AnyOf(tuple(_READERS[each](weights) for each, weights in by_format.items()))


def quantises_more(section: ConfigFile) -> bool:
    """Whether anything but weights is quantised: activations of a group of modules, or caches."""
    groups = section.section("config_groups")
    named = [] if groups is None else [groups.section(name) for name in groups.values]
    keys = ("input_activations", "output_activations")
    return section.has("kv_cache_scheme") or any(group is not None and any(map(group.has, keys)) for group in named)


def _format(section: ConfigFile, group: ConfigFile, weights: ConfigFile) -> str:
    """How a group's codes lie in the files: as it says itself, or as all do."""
    holder = group if group.has("format") else section
    found = one_of(holder, "format", (*_READERS, _NAIVE))
    if found != _NAIVE:
        return found
    return "int-quantized" if weights.values.get("type") == "int" else "float-quantized"


def _floats(groups: Sequence[ConfigFile]) -> Reader:
    blocks = {_float_block(weights): weights for weights in groups}
    if len(blocks) > 1:
        raise list(blocks.values())[-1].refuse("strategy", "blocks of one size in all groups", REMEDY)
    return Fp8(*blocks)


def _float_block(weights: ConfigFile) -> tuple[int, int] | None:
    _check_floats(weights, 8)
    strategy = one_of(weights, "strategy", _FLOAT_STRATEGIES)
    if strategy == "group":
        return 1, read_group_size(weights, "group_size")
    if strategy == "block" and not weights.has("block_structure"):
        raise weights.refuse("block_structure", "two sizes", REMEDY)
    return block_size(weights, "block_structure") if strategy == "block" else None


def _of_groups(reader: Reader, bits: int, size: int, groups: Sequence[ConfigFile]) -> Reader:
    """The reader of floats with scales for so many columns."""
    for weights in groups:
        _check_floats(weights, bits)
        if weights.has("group_size") and weights.values["group_size"] != size:
            raise weights.refuse("group_size", str(size), REMEDY)
    return reader


def _check_floats(weights: ConfigFile, bits: int) -> None:
    one_of(weights, "type", ("float",))
    if weights.values.get("num_bits") != bits:
        raise weights.refuse("num_bits", str(bits), REMEDY)
    if not weights.flag("symmetric", True):
        raise weights.refuse("symmetric", "true", REMEDY)


def _integers(groups: Sequence[ConfigFile]) -> Integers:
    for weights in groups:
        one_of(weights, "type", ("int",))
    strategies = [one_of(weights, "strategy", _INTEGER_STRATEGIES) for weights in groups]
    return Integers(
        bits=tuple(sorted({read_bits(weights, "num_bits") for weights in groups}, reverse=True)),
        sizes=frozenset(map(_group_size, groups, strategies)),
        whole="tensor" in strategies,
        symmetric=any(weights.flag("symmetric", True) for weights in groups),
    )


def _group_size(weights: ConfigFile, strategy: str) -> int:
    return read_group_size(weights, "group_size") if strategy == "group" else MAX_WIDTH


_NVFP4 = nvfp4("weight_packed", FactorTensor("weight_global_scale", Factor.DIVIDES))
_NAIVE = "naive-quantized"
"""Codes of any kind, a byte each."""
_READERS: Mapping[str, Callable[[Sequence[ConfigFile]], Reader]] = {
    "float-quantized": _floats,
    "mxfp8-quantized": partial(_of_groups, Fp8((1, 32)), 8, 32),
    "nvfp4-pack-quantized": partial(_of_groups, _NVFP4, 4, 16),
    "mxfp4-pack-quantized": partial(_of_groups, mxfp4("weight_packed"), 4, 32),
    "int-quantized": lambda groups: Bytes(_integers(groups)),
    "pack-quantized": lambda groups: Packed(_integers(groups)),
}
"""By the format of a group of modules."""
