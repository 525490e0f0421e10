"""Weights in PyTorch's pickle format, read without running code from them."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import PICKLE_SUFFIXES, Checkpoint
from hsrpc.model.config_file import read_config
from hsrpc.model.families.registry import create_family
from hsrpc.model.foreign import check_own, read_head
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.shards import check_complete, is_one_set
from hsrpc.model.spec import load_spec

PICKLE_INDEX = "pytorch_model.bin.index.json"
_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_SAVE_AGAIN = "save the model's state_dict() alone"
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What `torch.load` raises on damaged files, besides UnpicklingError."""
_TRAINING_FILES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


class PickledModel:
    """A model directory in Hugging Face format with pickled weights.

    Raises:
        CheckpointError: on construction, `directory` is not a model that hsrpc serves, or which files hold its weights
            is open.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._family = create_family(load_spec(directory, None))
        self._files = _pickle_files(directory)

    def write_files(self, directory: Path) -> None:
        """Copies configuration and tokenizer to `directory`."""
        for path in self._directory.iterdir():
            if path.is_file() and path.suffix in _KEPT_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copy2(path, directory / path.name)

    def tensors(self, expect: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of all files, of which `expect` is told the bytes; tensors that share memory come as copies.

        Raises:
            CheckpointError: a file is corrupt or holds code.
        """
        for path in self._files:
            state = _load(path)
            expect(sum(tensor.nbytes for tensor in state.values()))
            storages: set[int] = set()
            for name, tensor in state.items():
                shared = tensor.untyped_storage().data_ptr() in storages
                storages.add(tensor.untyped_storage().data_ptr())
                yield name, tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()

    def check(self, directory: Path) -> None:
        """Check that all of the model is in `directory`; what is missing, or of another shape, is so in the source.

        Raises:
            CheckpointError: it is not.
        """
        try:
            Checkpoint(directory, read_quantization(self._family.spec.config)).check_model(self._family)
        except CheckpointError as error:
            converted = rf"{re.escape(str(directory))}(/[\w.-]+)?"
            raise CheckpointError(re.sub(converted, lambda _: str(self._directory), str(error))) from None


def has_pickles(directory: Path) -> bool:
    """Whether there are files of that format in the directory."""
    return bool(_pickled(directory))


def _pickled(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)


def _pickle_files(src: Path) -> list[Path]:
    """Files that hold the weights: those of the index, all shards of a numbered set, or the only one there is."""
    index = src / PICKLE_INDEX
    if index.exists():
        return _indexed_files(index)
    pickled = _pickled(src)
    weights = [path for path in pickled if not path.name.startswith(_TRAINING_FILES)]
    preferred = [path for path in weights if path.name == "pytorch_model.bin"] or weights
    if is_one_set(path.name for path in preferred):
        check_complete(src, {path.name for path in preferred})
        return preferred
    if len(preferred) == 1:
        return preferred
    found = ", ".join(path.name for path in preferred) or "none"
    expected = f"{PICKLE_INDEX}, or one file of weights ({', '.join(PICKLE_SUFFIXES)})"
    raise CheckpointError(f"{src}: expected {expected}, found {found}; leave one, or serve safetensors as they are")


def _indexed_files(index: Path) -> list[Path]:
    config = read_config(index)
    section = config.section("weight_map")
    if section is None:
        raise config.refuse("weight_map", "an object of tensor and file names", "fetch the file again")
    for tensor, name in section.values.items():
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise section.refuse(tensor, "a file of the same directory", "fetch the missing file")
    return [index.parent / name for name in sorted({str(name) for name in section.values.values()})]


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, mapped from disk where the file's format allows."""
    check_own(path, read_head(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        remedy = "do not use this file; find the model as safetensors"
        raise CheckpointError(f"{path}: expected tensors alone, found code or damage ({reason}); {remedy}") from None
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: expected a PyTorch file, found {reason}; fetch the file again") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(state).__name__}; {_SAVE_AGAIN}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            found = type(value).__name__ if not isinstance(value, torch.Tensor) else value.layout
            raise CheckpointError(f"{path}: {name}: expected a dense tensor, found {found}; {_SAVE_AGAIN}")
    return state
