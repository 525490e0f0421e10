"""Weights as compressed-tensors has them: groups of modules, each quantised in a way of its own.

Which modules are of which group nobody need know: the headers say what a weight has.
"""

from __future__ import annotations

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.reader import AnyOf, Reader
from hsrpc.model.quantization.section import REMEDY, block_size, one_of

_STRATEGIES = ("tensor", "channel", "block")


def read_compressed_tensors(section: ConfigFile) -> Reader:
    """As `quantization_config` says.

    Raises:
        CheckpointError: a group of modules is quantised in another way than is served.
    """
    one_of(section, "format", ("float-quantized",))
    for key in ("sparsity_config", "transform_config"):
        if section.values.get(key) not in (None, {}):
            raise section.refuse(key, "nothing", REMEDY)
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.refuse("config_groups", "an object with groups of modules", REMEDY)
    blocks = {_group_block(groups, name) for name in groups.values}
    if len(blocks) > 1:
        raise section.refuse("config_groups", "blocks of one size in all groups", REMEDY)
    return AnyOf((Fp8(blocks.pop()),))


def _group_block(groups: ConfigFile, name: str) -> tuple[int, int] | None:
    group = groups.section(name)
    weights = None if group is None else group.section("weights")
    if weights is None:
        raise groups.refuse(name, "an object that describes weights", REMEDY)
    one_of(weights, "type", ("float",))
    if weights.values.get("num_bits") != 8:
        raise weights.refuse("num_bits", "8", REMEDY)
    if not weights.flag("symmetric", True):
        raise weights.refuse("symmetric", "true", REMEDY)
    strategy = one_of(weights, "strategy", _STRATEGIES)
    if strategy == "block" and not weights.has("block_structure"):
        raise weights.refuse("block_structure", "two sizes", REMEDY)
    return block_size(weights, "block_structure") if strategy == "block" else None
