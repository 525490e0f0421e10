"""Which tensors of a GGUF file make each tensor of a model in Hugging Face format, and how their rows are arranged."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from hsrpc.errors import CheckpointError
from hsrpc.model.family import Family
from hsrpc.model.gguf.architectures import Architecture
from hsrpc.model.gguf.file import GgufTensor
from hsrpc.model.gguf.header import Header
from hsrpc.model.tensor import HeadsTogether, PairsApart, RowOrder, TensorSpec

_log = logging.getLogger(__name__)
_LOST = "fetch the model's safetensors: what this file says of it is more than hsrpc converts"
_SUFFIXES = (".weight", ".bias")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")
_STACKED = ("gpt_oss", "granitemoe", "granitemoeshared")
"""Families whose checkpoints have the experts of a layer in one tensor."""
_PUBLISHED = {
    "mixtral": (
        (r"\.mlp\.(experts\.\d+)\.gate_proj\.", r".block_sparse_moe.\1.w1."),
        (r"\.mlp\.(experts\.\d+)\.up_proj\.", r".block_sparse_moe.\1.w3."),
        (r"\.mlp\.(experts\.\d+)\.down_proj\.", r".block_sparse_moe.\1.w2."),
        (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        (
            (r"\.mlp\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
            (r"\.mlp\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
            (r"\.mlp\.router\.", ".block_sparse_moe.router.layer."),
        ),
    ),
}
"""How families spell names in their checkpoints, where that is not the canonical name."""
_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that config.json has the content of."""


class Piece(NamedTuple):
    """Some rows of a tensor of the file."""

    tensor: GgufTensor
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor that is written: rows of the file's tensors, one after the other."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    order: torch.Tensor | None = None
    """The place of each row among those of the pieces: int64 [rows]; None: they stay."""
    transposed: bool = False
    """The last two dimensions are exchanged when it is written; `shape` is that before."""
    offset: float = 0.0
    """What its values have too much."""


@dataclass(frozen=True, kw_only=True)
class LatentTarget:
    """The projection from latents to keys and values: newer files have two of it, and that of the keys transposed."""

    name: str
    shape: tuple[int, ...]
    keys: GgufTensor
    """[heads, latent, key]"""
    values: GgufTensor
    """[heads, value, latent]"""


class Weights:
    """Finds what each tensor of `family` is made of among those of the file.

    Raises:
        CheckpointError: on construction, a tensor is missing, has another shape, or is one that nothing needs.
    """

    def __init__(self, header: Header, architecture: Architecture, family: Family) -> None:
        self._header = header
        self._architecture = architecture
        self._family = family
        self._model_type = family.spec.family
        self._used: set[str] = set()
        self._map = _name_map(header)
        self.targets = list(self._find())
        self._check_unused()

    def _find(self) -> Iterator[Target | LatentTarget]:
        family = self._family
        for tensor in family.fixed_tensors():
            yield from self._by_source(tensor)
        for layer in range(family.num_layers):
            stacks: dict[str, list[TensorSpec]] = {}
            for tensor in family.layer_tensors(layer):
                if tensor.stacked is not None and self._model_type in _STACKED:
                    stacks.setdefault(tensor.stacked.source, []).append(tensor)
                else:
                    yield from self._by_source(tensor)
            for source, experts in stacks.items():
                yield self._stack(source, experts)

    def _by_source(self, tensor: TensorSpec) -> Iterator[Target | LatentTarget]:
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            if (latent := self._latent(source, shape)) is not None:
                yield latent
            elif source.endswith("gate_up_proj_bias"):
                yield self._alternating(source, shape)
            elif ".shared_mlp.input_linear." in source:
                halves = self._halves(source.replace(".shared_mlp.input_linear.", ".mlp.shared_experts.gate_up_proj."))
                rows = (shape[0] // 2, *shape[1:])
                yield self._target(source, shape, tuple(self._piece(half, rows) for half in halves))
            else:
                piece = self._piece(source, shape)
                order = self._order(piece, tensor.order)
                yield self._target(source, shape, (piece,), order)

    def _target(
        self, source: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], order: torch.Tensor | None = None
    ) -> Target:
        is_norm = pieces[0].tensor.name.endswith("norm.weight")
        offset = self._architecture.offset if is_norm else 0.0
        return Target(name=self._published(source), shape=shape, pieces=pieces, order=order, offset=offset)

    def _order(self, piece: Piece, order: RowOrder | None) -> torch.Tensor | None:
        """How rows of the file, in llama.cpp's order, come to that of the checkpoints that `order` is of."""
        if isinstance(order, HeadsTogether):
            return order.index().argsort()
        if self._architecture.neighbours and re.search(r"\.attn_(q|k|qkv)\.", piece.tensor.name):
            return self._halves_of_heads(piece)
        return None

    def _halves_of_heads(self, piece: Piece) -> torch.Tensor | None:
        head_dim, family = self._family.sizes.head_dim, self._family
        is_value = piece.tensor.name.split(".")[2] == "attn_qkv" and piece.start == family.q_size + family.key_size
        return None if is_value else PairsApart((piece.stop - piece.start) // head_dim, head_dim, head_dim).index()

    def _stack(self, source: str, experts: list[TensorSpec]) -> Target:
        """All experts in one tensor."""
        stacked, shape = experts[0].stacked, experts[0].shape
        assert stacked is not None  # who calls has chosen those that are
        pieces = tuple(
            self._piece(each, rows)
            for tensor in experts
            for each, rows in zip(tensor.sources, tensor.source_shapes, strict=True)
        )
        order = None
        if stacked.order is not None:
            one = stacked.order.index().argsort()
            order = (torch.arange(len(experts))[:, None] * len(one) + one).flatten()
        target = self._target(source, (len(experts), *shape), pieces, order)
        return replace(target, transposed=stacked.transposed)

    def _alternating(self, source: str, shape: tuple[int, ...]) -> Target:
        """Biases of gate and up, which alternate element by element."""
        count, width = shape[0], shape[1] // 2
        pieces = tuple(_by_element(self._piece(half, (count, width))) for half in self._halves(source))
        return self._target(source, shape, pieces, torch.arange(2 * count * width).view(2, -1).t().flatten())

    def _halves(self, source: str) -> tuple[str, str]:
        return source.replace("gate_up_proj", "gate_proj"), source.replace("gate_up_proj", "up_proj")

    def _latent(self, source: str, shape: tuple[int, ...]) -> LatentTarget | None:
        """What the projection of latents is made of in files that do not have it as it is."""
        if not source.endswith("kv_b_proj.weight") or (name := self._name(source)) in self._header.tensors:
            return None
        keys, values = (self._take(name.replace("_kv_b.", f"_{part}_b.")) for part in ("k", "v"))
        heads = self._family.sizes.num_heads
        for tensor, rank in ((keys, keys.shape[1:2]), (values, values.shape[2:])):
            if tensor.shape[:1] != (heads,) or rank != shape[1:] or len(tensor.shape) != 3:
                raise tensor.refuse(f"{heads} heads of a latent of {shape[1]}", list(tensor.shape))
        if heads * (keys.shape[2] + values.shape[1]) != shape[0]:
            raise values.refuse(f"{shape[0]} rows with those of {keys.name}", list(values.shape))
        return LatentTarget(name=source, shape=shape, keys=keys, values=values)

    def _piece(self, source: str, shape: tuple[int, ...]) -> Piece:
        """The rows of the file that `source` consists of."""
        name, tensors = self._name(source), self._header.tensors
        if (expert := _EXPERT.fullmatch(source)) is not None:
            return self._expert(name, int(expert[2]), shape)
        fused = re.sub(r"\.attn_[qkv]\.", ".attn_qkv.", name)
        if name not in tensors and fused in tensors:
            starts = {"q": 0, "k": self._family.q_size, "v": self._family.q_size + self._family.key_size}
            start = starts[name.split(".")[2].removeprefix("attn_")]
            return self._part(self._take(fused), start, shape)
        tensor = self._take(name)
        if _without_ones(tensor.shape) != _without_ones(shape):
            raise self._misshapen(tensor, shape)
        return Piece(tensor, 0, len(tensor.rows))

    def _expert(self, name: str, expert: int, shape: tuple[int, ...]) -> Piece:
        """One expert's rows of the tensor of all; or its own tensor, as older files have it; or its half of both."""
        own = name.replace("_exps.", f".{expert}.")
        if own in self._header.tensors:
            return self._part(self._take(own), 0, shape)
        both = re.sub(r"_(gate|up)_exps\.", "_gate_up_exps.", name)
        if name in self._header.tensors or both not in self._header.tensors:
            return self._part(self._take(name), expert * shape[0], shape)
        start = 2 * expert * shape[0] + (shape[0] if "_up_exps." in name else 0)
        return self._part(self._take(both), start, shape)

    def _part(self, tensor: GgufTensor, start: int, shape: tuple[int, ...]) -> Piece:
        stop, columns = start + shape[0], tensor.shape[-1:] if len(tensor.shape) > 1 else ()
        if stop > len(tensor.rows) or columns != shape[1:]:
            raise self._misshapen(tensor, shape)
        return Piece(tensor, start, stop)

    def _misshapen(self, tensor: GgufTensor, shape: tuple[int, ...]) -> CheckpointError:
        return tensor.refuse(f"shape {list(shape)}, as the file's metadata says", list(tensor.shape))

    def _take(self, name: str) -> GgufTensor:
        if name not in self._header.tensors:
            raise self._header.missing(name)
        self._used.add(name)
        return self._header.tensors[name]

    def _name(self, source: str) -> str:
        """How the file calls the tensor `source`, or the one that has it as one of several."""
        key = re.sub(r"\.experts\.\d+\.", ".experts.", source)
        key = f"{key.removesuffix('_bias')}.bias" if key.endswith("_bias") else key
        key = key if key.endswith(_SUFFIXES) else f"{key}.weight"
        name = self._map.get_name(key, try_suffixes=_SUFFIXES)
        assert name is not None, source  # the families of all architectures are known to the map
        return name

    def _published(self, source: str) -> str:
        for canonical, spelling in _PUBLISHED.get(self._model_type, ()):
            source = re.sub(canonical, spelling, source)
        return source

    def _check_unused(self) -> None:
        """Check that the file has nothing that would be lost, but for layers that predict further tokens."""
        further = []
        for name, tensor in self._header.tensors.items():
            layer = re.match(r"blk\.(\d+)\.", name)
            if layer is not None and int(layer[1]) >= self._family.num_layers:
                further.append(name)
            elif name not in self._used and name not in _IN_CONFIG:
                expected = f"a tensor that {self._model_type} has a place for"
                raise tensor.refuse(expected, f"one of shape {list(tensor.shape)}", _LOST)
        if further:
            _log.warning("%s: without its layers that predict further tokens", self._header.path)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A row of a matrix and a vector are the same."""
    return tuple(size for size in shape if size != 1)


def _by_element(piece: Piece) -> Piece:
    """Each element as a row."""
    tensor, start, stop = piece
    if GGML_QUANT_SIZES[tensor.type][0] > 1:
        raise tensor.refuse("biases in a type without blocks, such as F32", tensor.type.name)
    columns = math.prod(tensor.shape) // len(tensor.rows)
    whole = tensor._replace(rows=tensor.rows.reshape(len(tensor.rows) * columns, -1))
    return Piece(whole, start * columns, stop * columns)


def _name_map(header: Header) -> TensorNameMap:
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(numbers[header.architecture], header.num_layers)
