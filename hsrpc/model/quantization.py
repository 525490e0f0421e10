"""What config.json says of quantised weights: how they are scaled. Which tensors are, the files' headers say."""

from __future__ import annotations

from dataclasses import dataclass

from hsrpc.model.bounds import MAX_WIDTH
from hsrpc.model.config_file import ConfigFile

KEY = "quantization_config"
SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""Behind the name of a weight: the name of its scales. A weight is its code times its scale, by either name."""
_METHODS = ("fp8", "compressed-tensors", "modelopt")
_REMEDY = "serve the model's FP8 checkpoint, or its unquantized one"
_CODES = ("e4m3", "float8_e4m3fn")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Weights are float8 codes (e4m3), with scales beside them."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: whole rows do, or all of a tensor, as the shape of the scales says."""

    def scaled_block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns that share a scale in a weight of that `shape`, by its scales'; None: these do not fit."""
        rows, columns = shape
        if self.block is not None:
            return self.block if scales == grid(shape, self.block) else None
        if scales in ((), (1,), (1, 1)):
            return rows, columns
        return (1, columns) if scales in ((rows,), (rows, 1)) else None

    def expected(self, shape: tuple[int, ...]) -> str:
        """The shape of the scales of a weight of that `shape`, for an error."""
        if self.block is not None:
            return f"shape {list(grid(shape, self.block))}, a scale for each {self.block[0]} x {self.block[1]} weights"
        return f"shape [], [1] or [{shape[0]}, 1], a scale for all weights or for each row"


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix of that `shape` along each dimension; the last ones may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def read_quantization(config: ConfigFile) -> Quantization | None:
    """How the weights are scaled; None: none is quantised, as far as config.json says.

    Raises:
        CheckpointError: they are quantised in another way than is served.
    """
    if config.values.get(KEY) in (None, {}):
        return None
    section = config.section(KEY)
    assert section is not None
    method = _one_of(section, "quant_method", _METHODS)
    if method == "compressed-tensors":
        return Quantization(_compressed_block(section))
    if method == "modelopt":
        _one_of(section, "quant_algo", _ALGORITHMS)
        return Quantization(None)
    if section.has("fmt"):
        _one_of(section, "fmt", _CODES)
    return Quantization(_block(section, "weight_block_size"))


def _compressed_block(section: ConfigFile) -> tuple[int, int] | None:
    """As all groups of modules have it."""
    _one_of(section, "format", ("float-quantized",))
    for key in ("sparsity_config", "transform_config"):
        if section.values.get(key) not in (None, {}):
            raise section.refuse(key, "nothing", _REMEDY)
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.refuse("config_groups", "an object with groups of modules", _REMEDY)
    blocks = {_group_block(groups, name) for name in groups.values}
    if len(blocks) > 1:
        raise section.refuse("config_groups", "blocks of one size in all groups", _REMEDY)
    return blocks.pop()


def _group_block(groups: ConfigFile, name: str) -> tuple[int, int] | None:
    group = groups.section(name)
    weights = None if group is None else group.section("weights")
    if weights is None:
        raise groups.refuse(name, "an object that describes weights", _REMEDY)
    _one_of(weights, "type", ("float",))
    if weights.values.get("num_bits") != 8:
        raise weights.refuse("num_bits", "8", _REMEDY)
    if not weights.flag("symmetric", True):
        raise weights.refuse("symmetric", "true", _REMEDY)
    strategy = _one_of(weights, "strategy", _STRATEGIES)
    if strategy == "block" and not weights.has("block_structure"):
        raise weights.refuse("block_structure", "two sizes", _REMEDY)
    return _block(weights, "block_structure") if strategy == "block" else None


def _block(section: ConfigFile, key: str) -> tuple[int, int] | None:
    """Two sizes; None where none are there."""
    if not section.has(key):
        return None
    sizes = section.values[key]
    if isinstance(sizes, list) and len(sizes) == 2:
        rows, columns = sizes
        if all(type(size) is int and 1 <= size <= MAX_WIDTH for size in sizes):
            return rows, columns
    raise section.refuse(key, f"two whole numbers from 1 to {MAX_WIDTH}", _REMEDY)


def _one_of(section: ConfigFile, key: str, choices: tuple[str, ...]) -> str:
    """The value, with a remedy for checkpoints that have another."""
    value = section.values.get(key)
    if not isinstance(value, str) or value not in choices:
        raise section.refuse(key, "one of " + ", ".join(choices), _REMEDY)
    return value
