"""Turns a checkpoint in PyTorch's pickle format into a safetensors one, without running code from it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hsrpc.errors import CheckpointError, ConfigError
from hsrpc.model.checkpoint import INDEX_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE, Checkpoint
from hsrpc.model.config_file import read_config
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family
from hsrpc.model.foreign import check_own, gguf_files, read_head, refuse_gguf
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.shards import check_complete, is_one_set
from hsrpc.model.spec import load_spec

MAX_SHARD_BYTES = 5_000_000_000
PICKLE_INDEX = "pytorch_model.bin.index.json"
_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_SAVE_AGAIN = "save the model's state_dict() alone"
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What `torch.load` raises on damaged files, besides UnpicklingError."""
_TRAINING_FILES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


def convert_checkpoint(src: Path, dst: Path, progress: bool = True, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the model in `src` to the new directory `dst`; `dst` appears when it is complete and checked.

    Raises:
        CheckpointError: `src` is not a model that hsrpc serves, or its weights are corrupt or hold code.
        ConfigError: `dst` is not empty.
    """
    dst = dst.resolve()
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise ConfigError("dst", str(dst), "exists and is not an empty directory", "give a new directory")
    family = create_family(load_spec(src, None))
    files = _pickle_files(src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as scratch:
        part = Path(scratch) / dst.name
        part.mkdir()
        _convert_files(files, part, progress, max_shard_bytes)
        _copy_small_files(src, part)
        _check_converted(part, family, src)
        os.replace(part, dst)


def _check_converted(part: Path, family: Family, src: Path) -> None:
    """Check that all of the model is there; what is missing, or of another shape, is missing in the source."""
    try:
        Checkpoint(part, read_quantization(family.spec.config)).check_model(family)
    except CheckpointError as error:
        converted = rf"{re.escape(str(part))}(/[\w.-]+)?"
        raise CheckpointError(re.sub(converted, lambda _: str(src), str(error))) from None


def _pickle_files(src: Path) -> list[Path]:
    """Files that hold the weights: those of the index, all shards of a numbered set, or the only one there is."""
    index = src / PICKLE_INDEX
    if index.exists():
        return _indexed_files(index)
    pickled = sorted(path for path in src.iterdir() if path.suffix in PICKLE_SUFFIXES)
    weights = [path for path in pickled if not path.name.startswith(_TRAINING_FILES)]
    preferred = [path for path in weights if path.name == "pytorch_model.bin"] or weights
    if is_one_set(path.name for path in preferred):
        check_complete(src, {path.name for path in preferred})
        return preferred
    if len(preferred) == 1:
        return preferred
    if not preferred and (gguf := gguf_files(src)):
        raise refuse_gguf(gguf[0])
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


def _convert_files(files: list[Path], part: Path, progress: bool, max_shard_bytes: int) -> None:
    """Writes shards as they fill; a single one takes the name of an unsharded checkpoint."""
    placed: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0
    with tqdm(total=0, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar:
        for name, tensor in _tensors(files, bar):
            if shard and size + tensor.nbytes > max_shard_bytes:
                _write_shard(part, shard, placed)
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        _write_shard(part, shard, placed)
    _write_index(part, placed)


def _tensors(files: list[Path], bar: tqdm[NoReturn]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all files; tensors that share memory come as copies."""
    for path in files:
        state = _load(path)
        bar.total = (bar.total or 0) + sum(tensor.nbytes for tensor in state.values())
        storages: set[int] = set()
        for name, tensor in state.items():
            shared = tensor.untyped_storage().data_ptr() in storages
            storages.add(tensor.untyped_storage().data_ptr())
            yield name, tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
            bar.update(tensor.nbytes)


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


def _write_shard(part: Path, shard: dict[str, torch.Tensor], placed: dict[str, str]) -> None:
    file = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
    save_file(shard, part / file, metadata={"format": "pt"})
    placed.update(dict.fromkeys(shard, file))


def _write_index(part: Path, placed: dict[str, str]) -> None:
    files = sorted(set(placed.values()))
    if len(files) <= 1:
        for file in files:
            os.replace(part / file, part / WEIGHTS_FILE)
        return
    total = sum((part / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (part / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_small_files(src: Path, part: Path) -> None:
    for path in src.iterdir():
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copy2(path, part / path.name)
