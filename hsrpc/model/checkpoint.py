"""Where weights come from: a safetensors checkpoint on disk, or random numbers of the right shapes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.config_file import read_config, shortened
from hsrpc.model.family import Family
from hsrpc.model.foreign import gguf_files, refuse_gguf
from hsrpc.model.formats.codes import CodedParts, decode, scales_of
from hsrpc.model.formats.scaled import Scaled
from hsrpc.model.quantization.fp8 import CODES
from hsrpc.model.quantization.reader import Quantized, Reader, Stored, WeightTensors
from hsrpc.model.quantization.section import KEY
from hsrpc.model.random_codes import draw_codes, repeat
from hsrpc.model.safetensors_file import SafetensorsFile
from hsrpc.model.shards import check_complete
from hsrpc.model.tensor import RowOrder, Stacked, TensorSpec, dtype_name
from hsrpc.model.tensor_names import EMBEDDING, HEAD, TensorNames, part_of

_log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_CONFIG = "use the config.json of this checkpoint, or fetch it again"
_TIE = "fetch the checkpoint again, or set tie_word_embeddings to true in config.json if the embedding is the head too"
_WEIGHT = ".weight"
"""What the name of a linear layer's weight ends with."""
_CODE_ENDS = (".qweight", ".weight_packed")
"""What names of its codes end with, where these are in words."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_NO_SHARDS = ("consolidated", "adapter_model", "optimizer", "training_args")
"""Beginnings of the names of safetensors files that hold no part of the model under its Hugging Face names."""

_RANDOM_BLOCK = 130_267
"""A prime: rows of a tensor filled with repeats of one block never coincide, and it is next to no power of two, by
which they would be one apart. Small: drawing is what takes long."""


class _Plain(NamedTuple):
    """A source of a tensor that has values."""

    stored: Stored
    transposed: bool = False
    """Its two dimensions are exchanged."""


class _Located(NamedTuple):
    """Where a tensor is read."""

    sources: Sequence[Quantized | _Plain]
    order: RowOrder | None
    """Order that the rows of its sources get."""


def has_weights(directory: Path) -> bool:
    """Whether a `Checkpoint` can be made of the directory; a plan needs none."""
    return (directory / INDEX_FILE).exists() or bool(_weight_files(directory))


class Checkpoint:
    """The safetensors files of a model directory; `reader` reads weights that have codes, as config.json says.

    Raises:
        CheckpointError: on construction, when the directory has none, or a file is truncated or corrupt.
    """

    def __init__(self, directory: Path, reader: Reader | None = None) -> None:
        self.directory = directory
        self._reader = reader
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

    def scaled(self, family: Family) -> dict[TensorSpec, Scaled]:
        """The format of each tensor of the layers that has codes here, of all its sources.

        One of which a source has values is decoded when it is loaded, and so is one whose rows change places between
        sources.

        Raises:
            CheckpointError: as `check`.
        """
        found: dict[TensorSpec, Scaled] = {}
        for layer in range(family.num_layers if self._reader is not None else 0):
            for tensor in family.layer_tensors(layer):
                quantized = self._quantized(tensor)
                if quantized is not None:
                    sources = tuple(each.matrix for each in quantized)
                    found[tensor] = Scaled(tensor.dtype(family.spec.dtype), sources)
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
                raise self.missing(tensor.sources[0])

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Checks from the headers that all `tensors` can be read.

        Raises:
            CheckpointError: a tensor is missing, or its shape or element type is wrong.
        """
        for tensor in tensors:
            self._locate(tensor)

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, with its sources one after the other, decoded.

        Raises:
            CheckpointError: as `check`, or a file has become shorter since, or a value is too large for the type.
        """
        flat, start, located = _flat(tensor, out), 0, self._locate(tensor)
        for each in located.sources:
            shape = each.matrix.shape if isinstance(each, Quantized) else each.stored.shape
            piece = flat[start : start + math.prod(shape)]
            if isinstance(each, Quantized):
                _decode(each, piece.view(shape))
            else:
                each.stored.read(piece, transposed=each.transposed)
            start += len(piece)
        _reorder(flat, located.order)

    def read_codes(self, tensor: TensorSpec, out: Sequence[CodedParts], dtype: torch.dtype) -> None:
        """Fills the parts of each source of a tensor that is `scaled`.

        Raises:
            CheckpointError: a file has become shorter, or a weight may be too large for `dtype`.
        """
        quantized = self._quantized(tensor)
        assert quantized is not None
        for each, parts in zip(quantized, out, strict=True):
            _fill(each, parts, dtype)

    def _quantized(self, tensor: TensorSpec) -> list[Quantized] | None:
        """What the tensor's sources have, rows in their order; None: not all have codes, or rows leave their source."""
        sources, order = self._locate(tensor)
        quantized = [each for each in sources if isinstance(each, Quantized)]
        if len(quantized) < len(sources):
            return None
        if order is None:
            return quantized
        index, first, found = order.index(), 0, list[Quantized]()
        for each in quantized:
            rows = index[first : first + each.matrix.rows] - first
            if not bool(((rows >= 0) & (rows < each.matrix.rows)).all()):
                return None
            found.append(each.in_order(rows))
            first += each.matrix.rows
        return found

    def _locate(self, tensor: TensorSpec) -> _Located:
        """Where its sources are read; or the one that it is stacked in with others, where that alone is there."""
        found = list[Quantized | _Plain]()
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            one = self._one_source(source, shape)
            stacked = None if one is not None or found else self._from_stacked(tensor)
            if stacked is not None:
                return stacked
            if one is None:
                raise self.missing(source)
            found.append(one)
        return _Located(found, tensor.order)

    def _one_source(self, source: str, shape: tuple[int, ...]) -> Quantized | _Plain | None:
        """Where a source is read; None: it is not there."""
        if len(shape) == 2 and source.endswith(_WEIGHT):
            found = self._with_codes(source.removesuffix(_WEIGHT), shape, None)
            if found is not None:
                return found
        stored = self.stored(source)
        return None if stored is None else _Plain(self._checked(stored, shape))

    def _from_stacked(self, tensor: TensorSpec) -> _Located | None:
        """Where it is read as a part of a stacked tensor; None: that is not there."""
        stacked = tensor.stacked
        if stacked is None:
            return None
        found = self._with_codes(stacked.source, tensor.shape, stacked)
        if found is not None:
            return _Located([found], stacked.order)
        stored = self.stored(stacked.source)
        if stored is None:
            return None
        part = self._checked(stored, stacked.shape(tensor.shape)).part(stacked.index)
        return _Located([_Plain(part, stacked.transposed)], stacked.order)

    def _with_codes(self, name: str, shape: tuple[int, ...], stacked: Stacked | None) -> Quantized | None:
        """How a weight's tensors become codes; None: it has none."""
        if self._reader is None:
            return None
        rows, columns = shape
        return self._reader.find(WeightTensors(name, rows, columns, self.stored, self.missing, stacked))

    def stored(self, source: str) -> Stored | None:
        """The tensor that is called `source` canonically; None: there is none."""
        name = self._names.find(source)
        if name is None:
            return None
        file = self._file(name)
        return Stored(file, name, file.entries[name].shape)

    def _checked(self, stored: Stored, shape: tuple[int, ...]) -> Stored:
        """A tensor of values, of that shape."""
        file, name = stored.file, stored.name
        if stored.dtype == CODES and self._reader is None:
            raise file.refuse(f"{KEY} in config.json, for codes ({CODES})", "none", _OTHER_CONFIG, name)
        file.check_dtype(name)
        if stored.shape != shape:
            remedy = "use the config.json of this checkpoint"
            raise file.refuse(f"shape {list(shape)}", list(stored.shape), remedy, name)
        return stored

    def _file(self, name: str) -> SafetensorsFile:
        if name in self._files:
            return self._files[name]
        shard = SafetensorsFile(self._promised[name])  # most often it is missing, which this says
        raise shard.refuse("the tensor that the index places here", "none of that name", tensor=name)

    def missing(self, source: str) -> CheckpointError:
        """What is said where there is no tensor that is called `source`."""
        for end in _CODE_ENDS if self._reader is None else ():
            codes = self.stored(source.removesuffix(_WEIGHT) + end)
            if codes is not None:
                return codes.file.refuse(f"{KEY} in config.json, for codes", "none", _OTHER_CONFIG, codes.name)
        nearest = ", ".join(map(shortened, self._names.nearest(source))) or "no tensor at all"
        remedy = _TIE if source == HEAD else _OTHER_CONFIG
        return CheckpointError(f"{self.directory}: expected tensor {source}, found as the nearest {nearest}; {remedy}")


def _fill(quantized: Quantized, parts: CodedParts, dtype: torch.dtype) -> None:
    """Read codes and what goes with them, and check that the largest of all codes has a weight in `dtype`.

    Of types that reach as far as float32, all have.
    """
    quantized.fill(parts)
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(torch.bfloat16).max:
        return
    most = largest / quantized.matrix.code.largest
    found = scales_of(parts).abs().max().item()
    if found > most:
        expected = f"scales of at most {most:.4g}, for weights in {dtype_name(dtype)}"
        stored = quantized.stored
        raise stored.file.refuse(expected, f"{found:.4g}", "serve it with --dtype bfloat16", stored.name)


def _decode(quantized: Quantized, out: torch.Tensor) -> None:
    """Read and decode a weight."""
    matrix = quantized.matrix
    parts = matrix.parts(torch.empty(matrix.num_bytes, dtype=torch.uint8))
    _fill(quantized, parts, out.dtype)
    if out.device.type == "cpu":
        decode(parts, out)
        return
    values = torch.empty(matrix.shape, dtype=out.dtype)
    decode(parts, values)
    out.copy_(values)


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
        repeat(drawn.to(out.dtype), flat)

    def read_codes(self, tensor: TensorSpec, out: Sequence[CodedParts], dtype: torch.dtype) -> None:
        """Fills the parts of each of the tensor's sources, such that weights are about those of `read`."""
        generator, (_, deviation) = self._generator(tensor), _distribution(tensor)
        for parts in out:
            draw_codes(parts, deviation, generator)

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
