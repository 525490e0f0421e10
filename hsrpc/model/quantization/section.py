"""Values of a `quantization_config`, with remedies for checkpoints that have others."""

from __future__ import annotations

from hsrpc.model.bounds import MAX_WIDTH
from hsrpc.model.config_file import ConfigFile

KEY, METHOD = "quantization_config", "quant_method"
"""Key of config.json for what it says of quantised weights; key of this section for who quantised them."""
REMEDY = "serve a checkpoint of the model that is quantised in a way served (docs/models.md), or its unquantized one"


def one_of(section: ConfigFile, key: str, choices: tuple[str, ...]) -> str:
    """The value under `key`.

    Raises:
        CheckpointError: it is none of the choices.
    """
    value = section.values.get(key)
    if not isinstance(value, str) or value not in choices:
        raise section.refuse(key, "one of " + ", ".join(choices), REMEDY)
    return value


def block_size(section: ConfigFile, key: str) -> tuple[int, int] | None:
    """Two sizes; None where none are there.

    Raises:
        CheckpointError: something else is there.
    """
    if not section.has(key):
        return None
    sizes = section.values[key]
    if isinstance(sizes, list) and len(sizes) == 2:
        rows, columns = sizes
        if all(type(size) is int and 1 <= size <= MAX_WIDTH for size in sizes):
            return rows, columns
    raise section.refuse(key, f"two whole numbers from 1 to {MAX_WIDTH}", REMEDY)
