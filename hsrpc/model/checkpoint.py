"""Where weights come from: a safetensors checkpoint on disk, or random numbers of the right shapes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.config_file import read_config, shortened
from hsrpc.model.family import Family
from hsrpc.model.foreign import gguf_files, refuse_gguf
from hsrpc.model.formats.scaled import Scaled, ScaledSource, decode
from hsrpc.model.quantization import KEY, SCALE_SUFFIXES, Quantization
from hsrpc.model.safetensors_file import CODES, DTYPES, SafetensorsFile
from hsrpc.model.shards import check_complete
from hsrpc.model.tensor import RowOrder, Stacked, TensorSpec, dtype_name
from hsrpc.model.tensor_names import EMBEDDING, HEAD, TensorNames, part_of

_log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_log = logging.getLogger(__name__)
_OTHER_CONFIG = "use the config.json of this checkpoint, or fetch it again"
_TIE = "fetch the checkpoint again, or set tie_word_embeddings to true in config.json if the embedding is the head too"
_UNQUANTIZED = "serve the model's unquantized checkpoint"
_REFETCH = "fetch the checkpoint again"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_NO_SHARDS = ("consolidated", "adapter_model", "optimizer", "training_args")
"""Beginnings of the names of safetensors files that hold no part of the model under its Hugging Face names."""

_RANDOM_BLOCK = 130_267
"""A prime: rows of a tensor filled with repeats of one block never coincide, and it is next to no power of two, by
which they would be one apart. Small: drawing is what takes long."""


class WeightSource(Protocol):
    """Anything that can fill packed tensors; safe to call from several threads at once."""

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, in its own element type and on its own device."""


class _Located(NamedTuple):
    """Where a source of a tensor is read."""

    file: SafetensorsFile
    name: str
    """In the file."""
    numel: int
    """Elements that are read."""
    scaled: ScaledSource | None = None
    """How its codes are scaled; None: it has values."""


def has_weights(directory: Path) -> bool:
    """Whether a `Checkpoint` can be made of the directory; a plan needs none."""
    return (directory / INDEX_FILE).exists() or bool(_weight_files(directory))


class Checkpoint:
    """The safetensors files of a model directory, whose config.json says that weights have codes if any have.

    Raises:
        CheckpointError: on construction, when the directory has none, or a file is truncated or corrupt.
    """

    def __init__(self, directory: Path, quantization: Quantization | None = None) -> None:
        self.directory = directory
        self._quantization = quantization
        self._promised: dict[str, Path] = {}
        """Tensors that the index places in a shard that is missing, or has them not: nobody may need them."""
        if (directory / WEIGHTS_FILE).exists() or not (directory / INDEX_FILE).exists():
            self._files = _open_files(directory)
        else:
            self._files, self._promised = _open_indexed(directory)
        self._names = TensorNames({**self._files, **self._promised})

    def has_own_head(self, family: Family) -> bool:
        """Whether the files have a head that is not the embedding, though the family ties them: then they are right."""
        embedding = next((each for each in family.fixed_tensors() if each.sources[0].endswith(EMBEDDING)), None)
        if embedding is None or _has_head(family):
            return False
        first, head = self._names.find(embedding.sources[0]), self._names.find(HEAD)
        if first is None or head is None or first == head:
            return False
        return not self._file(first).same(first, self._file(head), head)

    def check_model(self, family: Family) -> None:
        """Checks from the headers that all tensors of a model can be read; that each of its layers is there, first.

        Raises:
            CheckpointError: the configuration has other layers than the files, or as `check`.
        """
        missing = [layer for layer in range(family.num_layers) if not self._has_layer(family, layer)]
        found = family.num_layers - len(missing)
        if missing and missing[0] == found > 0:
            expected = f"{found}, since {self.directory} has weights of the first {found} layers alone"
            raise family.spec.config.refuse("num_hidden_layers", expected, _OTHER_CONFIG)
        if missing and found:
            expected = f"weights of {family.num_layers} layers, as num_hidden_layers in config.json says"
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            found_layers = f"{found} layers, without layer {missing[0]}{more}"
            raise CheckpointError(f"{self.directory}: expected {expected}, found {found_layers}; {_OTHER_CONFIG}")
        self.check(family.all_tensors())
        self._check_ties(family)
        if ignored := self._parts_beside(family):
            _log.warning("%s: serving the language model alone, without its %s", self.directory, ", ".join(ignored))
        if self._quantization is not None:
            _log.warning("%s: activations are not quantised, nor caches; scales of theirs are ignored", self.directory)

    def scaled(self, family: Family) -> dict[TensorSpec, Scaled]:
        """The format of each tensor of the layers that has codes and scales here, and can be used with them.

        One whose rows get another order is decoded when it is loaded, and so is one of which a source has no codes.

        Raises:
            CheckpointError: as `check`, or weights may be too large for the type that is computed in.
        """
        found: dict[TensorSpec, Scaled] = {}
        for layer in range(family.num_layers if self._quantization is not None else 0):
            for tensor in family.layer_tensors(layer):
                sources = [located.scaled for located in self._locate(tensor)]
                scaled = tuple(source for source in sources if source is not None)
                self._check_range(scaled, tensor.dtype(family.spec.dtype))
                if tensor.order is None and len(scaled) == len(sources):
                    found[tensor] = Scaled(tensor.dtype(family.spec.dtype), scaled)
        return found

    def _parts_beside(self, family: Family) -> list[str]:
        """What there are weights of that the model does not have: what sees, layers that predict further tokens."""
        served = {part_of(source) for tensor in family.all_tensors() for source in tensor.sources}
        return sorted(self._names.parts - served - {part_of(HEAD)})

    def _has_layer(self, family: Family, layer: int) -> bool:
        """Whether any tensor of the layer is there."""
        return any(self._names.find(source) for tensor in family.layer_tensors(layer) for source in tensor.sources)

    def _check_ties(self, family: Family) -> None:
        """Where the head is a tensor of its own, it does not stand for the embedding."""
        for tensor in family.fixed_tensors() if _has_head(family) else ():
            if tensor.sources[0] != HEAD and self._names.find(tensor.sources[0]) == self._names.find(HEAD):
                raise self._missing(tensor.sources[0])

    def _check_range(self, sources: Iterable[ScaledSource], dtype: torch.dtype) -> None:
        """Check that the largest code has a weight in `dtype`; of types that reach as far as float32, all have."""
        if torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
            return
        most = torch.finfo(dtype).max / torch.finfo(DTYPES[CODES]).max
        for source in sources:
            largest = self._read_scales(source).abs().max().item()
            if largest > most:
                expected = f"scales of at most {most:.4g}, for weights in {dtype_name(dtype)}"
                remedy = "serve it with --dtype bfloat16"
                raise self._file(source.scales).refuse(expected, f"{largest:.4g}", remedy, source.scales)

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Checks from the headers that all `tensors` can be read.

        Raises:
            CheckpointError: a tensor is missing, or its shape or element type is wrong.
        """
        for tensor in tensors:
            for _ in self._locate(tensor):
                pass

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, with its sources one after the other.

        Weights with scales are decoded; where `out` has the type of codes, it gets their codes.

        Raises:
            CheckpointError: as `check`, or a file has become shorter since.
        """
        stacked = self._stacked(tensor)
        if stacked is not None:
            self._read_stacked(tensor, stacked, out)
            return
        located = list(self._locate(tensor))
        flat, start = _flat(tensor, out), 0
        for each in located:
            self._read_located(each, flat[start : start + each.numel])
            start += each.numel
        _reorder(flat, tensor.order)

    def _read_located(self, located: _Located, out: torch.Tensor) -> None:
        scaled = located.scaled
        if scaled is None or out.dtype == DTYPES[CODES]:
            located.file.read(located.name, out)
            return
        codes = torch.empty(located.numel, dtype=DTYPES[CODES])
        located.file.read(located.name, codes)
        decode(codes.view(scaled.shape), self._read_scales(scaled), scaled.block, out.view(scaled.shape))

    def _read_scales(self, scaled: ScaledSource) -> torch.Tensor:
        scales = torch.empty(scaled.grid, dtype=torch.float32)
        self._file(scaled.scales).read(scaled.scales, scales.view(-1))
        return scales

    def _read_stacked(self, tensor: TensorSpec, stacked: Stacked, out: torch.Tensor) -> None:
        [(file, name, count, _)] = self._locate(tensor)
        flat = _flat(tensor, out)
        if stacked.transposed:
            turned = torch.empty_like(flat)
            file.read(name, turned, stacked.index * count)
            out.copy_(turned.view(out.shape[::-1]).t())
        else:
            file.read(name, flat, stacked.index * count)
        _reorder(flat, stacked.order)

    def _stacked(self, tensor: TensorSpec) -> Stacked | None:
        """What the tensor is read from, where that is a part of one that is there and its own sources are not."""
        stacked = tensor.stacked
        if stacked is None or self._names.find(tensor.sources[0]) is not None:
            return None
        return None if self._names.find(stacked.source) is None else stacked

    def _locate(self, tensor: TensorSpec) -> Iterator[_Located]:
        """Where each source is read."""
        if stacked := self._stacked(tensor):
            file, name = self._find(stacked.source, stacked.shape(tensor.shape))
            if file.entries[name].dtype == CODES:
                raise file.refuse("a tensor for each expert", "codes of all in one", _UNQUANTIZED, name)
            yield _Located(file, name, tensor.numel)
            return
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            file, name = self._find(source, shape)
            yield _Located(file, name, math.prod(shape), self._scaled(file, name))

    def _scaled(self, file: SafetensorsFile, name: str) -> ScaledSource | None:
        """How the tensor is scaled; None: it has values, not codes."""
        codes = file.entries[name]
        if codes.dtype != CODES:
            return None
        if self._quantization is None:
            raise file.refuse(f"{KEY} in config.json, for codes ({CODES})", "none", _OTHER_CONFIG, name)
        suffix = next((each for each in SCALE_SUFFIXES if self._has(name + each)), None)
        if suffix is None or len(codes.shape) != 2:
            expected = f"a matrix, and its scales {name}{' or '.join(SCALE_SUFFIXES)}"
            raise file.refuse(expected, f"shape {list(codes.shape)} without scales", _REFETCH, name)
        scales = name + suffix
        holder = self._file(scales)
        holder.check_dtype(scales)
        entry = holder.entries[scales]
        block = self._quantization.scaled_block(codes.shape, entry.shape)
        if block is None or entry.dtype == CODES:
            found = f"{entry.dtype} of shape {list(entry.shape)}"
            raise holder.refuse(self._quantization.expected(codes.shape), found, _REFETCH, scales)
        return ScaledSource(*codes.shape, block, scales, entry.shape)

    def _has(self, name: str) -> bool:
        return name in self._files or name in self._promised

    def _find(self, source: str, shape: tuple[int, ...]) -> tuple[SafetensorsFile, str]:
        """File and name in it of a tensor of that shape."""
        name = self._names.find(source)
        if name is None:
            raise self._missing(source)
        file = self._file(name)
        file.check_dtype(name)
        found = file.entries[name].shape
        if found != shape:
            raise file.refuse(f"shape {list(shape)}", list(found), "use the config.json of this checkpoint", name)
        return file, name

    def _file(self, name: str) -> SafetensorsFile:
        if name in self._files:
            return self._files[name]
        shard = SafetensorsFile(self._promised[name])  # most often it is missing, which this says
        raise shard.refuse("the tensor that the index places here", "none of that name", tensor=name)

    def _missing(self, source: str) -> CheckpointError:
        nearest = ", ".join(map(shortened, self._names.nearest(source))) or "no tensor at all"
        remedy = _TIE if source == HEAD else _OTHER_CONFIG
        return CheckpointError(f"{self.directory}: expected tensor {source}, found as the nearest {nearest}; {remedy}")


def _has_head(family: Family) -> bool:
    return any(HEAD in tensor.sources for tensor in family.fixed_tensors())


def _weight_files(directory: Path) -> list[Path]:
    """What holds the weights of a directory without an index: the single file, or all that may be shards."""
    single = directory / WEIGHTS_FILE
    if single.exists():
        return [single]
    paths = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith(_NO_SHARDS))
    return [path for path in paths if path.name.startswith("model")] or paths


def _open_files(directory: Path) -> dict[str, SafetensorsFile]:
    paths = _weight_files(directory)
    if not paths:
        raise _no_weights(directory)
    check_complete(directory, {path.name for path in paths})
    files: dict[str, SafetensorsFile] = {}
    for shard in map(SafetensorsFile, paths):
        for tensor in shard.entries:
            if tensor in files:
                found = f"it in {files[tensor].path.name} too"
                raise shard.refuse("each tensor in one file", found, "remove the files of another model", tensor)
            files[tensor] = shard
    return files


def _open_indexed(directory: Path) -> tuple[dict[str, SafetensorsFile], dict[str, Path]]:
    """The file of each tensor, by the index first; and the tensors that are not where the index says."""
    placed = _read_index(directory)
    shards = {name: SafetensorsFile(directory / name) for name in set(placed.values()) if (directory / name).exists()}
    files = {tensor: shard for shard in shards.values() for tensor in shard.entries}
    for tensor, name in placed.items():
        if name in shards and tensor in shards[name].entries:
            files[tensor] = shards[name]
    return files, {tensor: directory / name for tensor, name in placed.items() if tensor not in files}


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor to shard."""
    index = read_config(directory / INDEX_FILE)
    section = index.section("weight_map")
    if section is None:
        raise index.refuse("weight_map", "an object of tensor and file names", "fetch the file again")
    placed: dict[str, str] = {}
    for tensor, shard in section.values.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise section.refuse(tensor, "a .safetensors file of the same directory", "fetch the file again")
        placed[tensor] = shard
    return placed


def _no_weights(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError(f"{directory}: expected a directory, found none; give the model's directory")
    other = sorted(path.name for path in directory.glob("*.safetensors"))
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if gguf := gguf_files(directory):
        return refuse_gguf(gguf[0])
    if other:
        remedy = "fetch the model's weights under their Hugging Face names"
        return CheckpointError(f"{directory}: expected {WEIGHTS_FILE}, found {', '.join(other[:3])}; {remedy}")
    if pickled:
        remedy = f"run `hsrpc convert {directory} DIRECTORY` and serve DIRECTORY"
        return CheckpointError(f"{directory}: expected {WEIGHTS_FILE}, found {', '.join(pickled[:3])}; {remedy}")
    remedy = "fetch the model's weights in that format"
    return CheckpointError(f"{directory}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; {remedy}")


class RandomWeights:
    """Weights drawn afresh: the same for the same seed and tensor, whatever the device, rounded to the element type.

    Matrices are normal with variance 1 / columns, so that values neither vanish nor overflow in float16.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape; large tensors repeat a block."""
        flat = _flat(tensor, out)
        mean, deviation = _distribution(tensor)
        drawn = torch.empty(min(len(flat), _RANDOM_BLOCK)).normal_(mean, deviation, generator=self._generator(tensor))
        block = drawn.to(out.device, out.dtype)
        end = len(flat) // len(block) * len(block)
        flat[:end].view(-1, len(block)).copy_(block)
        flat[end:].copy_(block[: len(flat) - end])

    def _generator(self, tensor: TensorSpec) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}:{':'.join(tensor.sources)}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _distribution(tensor: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation."""
    is_matrix = len(tensor.shape) > 1 and not tensor.mean
    return tensor.mean, float(tensor.shape[-1] ** -0.5) if is_matrix else 0.02


def _reorder(flat: torch.Tensor, order: RowOrder | None) -> None:
    """Brings the rows of a tensor, given as one dimension, to their order."""
    if order is not None:
        index = order.index().to(flat.device)
        pieces = flat.view(len(index), -1)
        pieces.copy_(pieces[index])


def _flat(tensor: TensorSpec, out: torch.Tensor) -> torch.Tensor:
    """`out` as one dimension, after checking that it can take the tensor."""
    if tuple(out.shape) != tensor.shape or not out.is_contiguous():
        raise ValueError(f"{tensor.name}: out must be contiguous and {list(tensor.shape)}, found {list(out.shape)}")
    return out.view(-1)
