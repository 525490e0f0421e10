"""A model's own sampling settings, from its generation_config.json: what a request takes that says nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsrpc.errors import InvalidRequestError
from hsrpc.model.config_file import read_config
from hsrpc.request import SamplingParams

GENERATION_FILE = "generation_config.json"
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is taken of the file. `do_sample` is not, as elsewhere: temperature 0 says that choices are greedy. Nor are
lengths: they bound the examples of whoever made the file."""
_REMEDY = "correct the file, or use --generation-config none"


def read_default_params(directory: Path) -> SamplingParams:
    """The settings in the directory's file; those that it does not have, or no file, are `SamplingParams`' own.

    Raises:
        CheckpointError: the file cannot be read, or a value is none that the setting may have.
    """
    path = directory / GENERATION_FILE
    if not path.exists():
        return SamplingParams()
    file = read_config(path)
    given: dict[str, Any] = {name: file.values[name] for name in SETTINGS if file.has(name)}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise file.refuse(name, "a whole number" if name == "top_k" else "a number", _REMEDY)
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        raise file.refuse(error.field, f"another number ({error.description})", _REMEDY) from None
