"""Turns a checkpoint in another format into a safetensors one: PyTorch's pickles, whose code is not run, or GGUF."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hsrpc.config import DType
from hsrpc.errors import CheckpointError, ConfigError
from hsrpc.model.checkpoint import INDEX_FILE, WEIGHTS_FILE
from hsrpc.model.foreign import gguf_files, is_gguf
from hsrpc.model.pickles import PickledModel, has_pickles
from hsrpc.model.shards import is_one_set
from hsrpc.model.spec import DTYPES

MAX_SHARD_BYTES = 5_000_000_000


class Source(Protocol):
    """A model in a format that is not served."""

    def write_files(self, directory: Path) -> None:
        """Writes all but the weights to `directory`: configuration and tokenizer."""

    def tensors(self, expect: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of the weights; `expect` is told the bytes of those that come next."""

    def check(self, directory: Path) -> None:
        """Check that `directory` has all of the model, once it is written."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    dtype: DType = DType.AUTO,
    keep_quantized: bool = False,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model in `src` to the new directory `dst`; `dst` appears when it is complete and checked.

    `src` is a GGUF file, or a directory with one, or with pickled weights. Those of a GGUF file are written in `dtype`;
    `auto` takes the type that suits most of them. With `keep_quantized` its layers keep codes that have a layout.

    Raises:
        CheckpointError: `src` is not a model that hsrpc serves, or its weights are corrupt or hold code.
        ConfigError: `dst` is not empty, or `dtype` or `keep_quantized` is given for pickled weights.
    """
    dst = dst.resolve()
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise ConfigError("dst", str(dst), "exists and is not an empty directory", "give a new directory")
    source = _open(src, dtype, keep_quantized)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as scratch:
        part = Path(scratch) / dst.name
        part.mkdir()
        source.write_files(part)
        _write_weights(source, part, progress, max_shard_bytes)
        source.check(part)
        os.replace(part, dst)


def _open(src: Path, dtype: DType, keep_quantized: bool) -> Source:
    if (file := _gguf_file(src)) is not None:
        from hsrpc.model.gguf.source import GgufModel  # reads with packages that pickles do not need

        return GgufModel(file, DTYPES.get(dtype), keep_quantized=keep_quantized)
    if dtype != DType.AUTO:
        raise ConfigError(
            "dtype", dtype.value, "pickled weights keep their type", "leave it out, and serve with --dtype"
        )
    if keep_quantized:
        raise ConfigError("keep_quantized", True, "pickled weights are not quantised", "leave it out")
    return PickledModel(src)


def _gguf_file(src: Path) -> Path | None:
    """The file at `src`; or the only one there, or the first shard, where a directory has no other weights."""
    if not src.is_dir():
        return src if is_gguf(src) else None
    files = gguf_files(src)
    if len(files) > 1 and not is_one_set(file.name for file in files):
        found = ", ".join(file.name for file in files)
        raise CheckpointError(
            f"{src}: expected one GGUF file, or the shards of one, found {found}; give the file itself"
        )
    return files[0] if files and not has_pickles(src) else None


def _write_weights(source: Source, part: Path, progress: bool, max_shard_bytes: int) -> None:
    """Writes shards as they fill; a single one takes the name of an unsharded checkpoint."""
    with tqdm(total=0, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar:

        def expect(num_bytes: int) -> None:
            bar.total = (bar.total or 0) + num_bytes

        _write_shards(_counted(source.tensors(expect), bar.update), part, max_shard_bytes)


def _counted(
    tensors: Iterable[tuple[str, torch.Tensor]], count: Callable[[int], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        count(tensor.nbytes)


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], part: Path, max_shard_bytes: int) -> None:
    placed: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            _write_shard(part, shard, placed)
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    _write_shard(part, shard, placed)
    _write_index(part, placed)


def _write_shard(part: Path, shard: dict[str, torch.Tensor], placed: dict[str, str]) -> None:
    file = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
    (part / file).touch()
    mode = (part / file).stat().st_mode
    save_file(shard, part / file, metadata={"format": "pt"})
    (part / file).chmod(mode)  # that of other new files: the library's own is for its owner alone
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
