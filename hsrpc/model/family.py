"""The contract of a model family: which tensors it needs, and how one layer computes over packed rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple, TypeAlias

import torch

from hsrpc.config import WeightCoding
from hsrpc.model.activations import Activations
from hsrpc.model.attention import PLAIN, HeadShape
from hsrpc.model.bounds import MAX_LAYERS
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.choice import format_choices
from hsrpc.model.formats.format import Formats
from hsrpc.model.formats.rows import Rows, RowShape
from hsrpc.model.rope import Rotation
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import LayerSizes, ModelSizes, TensorSizes
from hsrpc.schedule.blocks import BlockKind

Weights: TypeAlias = Mapping[str, torch.Tensor]
"""Packed tensor names to tensors, of one layer or of the fixed part."""


class Projection(NamedTuple):
    """What a layer makes of its input before attention."""

    activation: torch.Tensor
    """[n, columns] rows of an activation block: keys and values are rebuilt from them."""
    queries: torch.Tensor
    """[n, q], unscaled."""
    kv: torch.Tensor
    """[n, k+v] as [K|V]. Queries and these may be views of one tensor: rows are strided."""


class Routes(NamedTuple):
    """The experts of each token."""

    weights: torch.Tensor
    """float32 [n, k]"""
    chosen: torch.Tensor
    """int64 [n, k]"""


class Routed(NamedTuple):
    """What a layer with experts makes of attention's output, before it computes with them."""

    after: torch.Tensor
    """[n, h] what the MLP's output is added to."""
    x: torch.Tensor
    """[n, h] input of the MLP."""
    routes: Routes


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is, without its weights."""

    name: str
    """Last component of its directory or hub id."""
    family: str
    dtype: torch.dtype
    """Element type of what is computed: hidden states, and weights as they are multiplied."""
    checkpoint_dtype: torch.dtype
    """Element type of the weights as the configuration declares them."""
    formats: Formats
    sizes: ModelSizes
    """Sizes with weights and caches in `formats`."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    config: ConfigFile
    """What the family reads its own settings from."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names of the architecture in config.json; none where it has none."""
        named = self.config.values.get("architectures")
        return tuple(map(str, named)) if isinstance(named, list) else ()


class Absorption(ABC):
    """How single queries attend to activations as they are stored, without their K and V."""

    heads: HeadShape
    """Shape of the heads that attend so; a row is an activation."""

    @abstractmethod
    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        """As the family's, where nothing needs K and V: these are not filled."""

    @abstractmethod
    def queries(self, w: Weights, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Queries for `heads` of the layer's queries [n, q]."""

    @abstractmethod
    def values(self, w: Weights, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """What attention gives [n, o], of what `heads` gather of activations."""


class Family(ABC):
    """One architecture. Rows are tokens of any number of requests, concatenated; positions are int64 [n].

    With n rows, hidden size h, q = num_heads * key_dim, k = num_kv_heads * key_dim, v = num_kv_heads * value_dim and
    o = num_heads * value_dim. An activation is `a` wide. A family of other widths sets `heads` and `activation_size`.
    """

    size_keys: ClassVar[tuple[str, ...]]
    """Keys of config.json that the shapes of the weights follow from."""
    expert_tables: ClassVar[tuple[str, ...]] = ()
    """Names of the tables int64 [E] of addresses that `opened` may find in place of the experts' tensors, in order."""

    def __init__(self, spec: ModelSpec, served_context: int | None = None) -> None:
        """Computes `spec` for requests of up to `served_context` tokens; None: of the model's context."""
        self.spec = spec
        self.sizes = spec.sizes
        self.served_context = served_context or spec.sizes.context_length
        self.num_layers = spec.config.integer("num_hidden_layers", maximum=MAX_LAYERS)
        sizes = spec.sizes
        self.heads = HeadShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
        self.activation_size = sizes.hidden_size
        self.absorption: Absorption | None = None
        """None: attention needs K and V."""
        self.attention_scale: float = spec.sizes.head_dim**-0.5
        """Factor on q K^T; queries come unscaled."""
        self.attention_extras = PLAIN
        """What attention does beside."""

    @property
    def q_size(self) -> int:
        return self.heads.query_size

    @property
    def key_size(self) -> int:
        return self.heads.key_size

    @property
    def value_size(self) -> int:
        return self.heads.row_size - self.heads.key_size

    @cached_property
    def kv_rows(self) -> Rows:
        """Rows of K and V in blocks."""
        return self.spec.formats.kv.rows(self.heads.row_shape)

    @cached_property
    def activation_rows(self) -> Rows:
        """Rows of activations in blocks and buffers: a scale for each."""
        return self.spec.formats.activation.rows(RowShape(1, (self.activation_size,)))

    @property
    def rows(self) -> Mapping[BlockKind, Rows]:
        """Rows of each kind of block."""
        return {BlockKind.KV: self.kv_rows, BlockKind.ACTIVATION: self.activation_rows}

    @cached_property
    @abstractmethod
    def activations(self) -> Activations:
        """How activations are kept, and K and V made of them."""

    @classmethod
    @abstractmethod
    def read_sizes(cls, config: ConfigFile, compute_bytes: int) -> ModelSizes:
        """The sizes in `config`, without layers (see `layer_sizes`).

        Raises:
            CheckpointError: a key is missing, or its value is not supported.
        """

    @abstractmethod
    def layer_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        """Tensors of one decoder layer."""

    def expert_names(self, layer: int) -> Sequence[tuple[str, ...]]:
        """Names of the tensors of each of the layer's experts: of as many bytes in each. Here it has none."""
        return ()

    def layer_sizes(self, layer: int) -> LayerSizes:
        """Sizes of one decoder layer, in the model's formats; here of one whose attention sees all tokens."""
        sizes = self.sizes
        return LayerSizes(
            tensors=tuple(map(self._tensor_sizes, self.layer_tensors(layer))),
            hidden_size=sizes.hidden_size,
            query_size=self.q_size,
            key_size=self.key_size,
            value_size=self.value_size,
            ffn_size=sizes.ffn_size,
            kv=self.kv_rows.size,
            activation=self.activation_rows.size,
            compute_bytes=sizes.compute_bytes,
            coded_weight_bytes=self.activations.coded_weight_bytes,
        )

    def _tensor_sizes(self, tensor: TensorSpec) -> TensorSizes:
        sizes = self.spec.formats.weight(tensor).sizes(tensor)
        return sizes if tensor.name in self.multiplied else replace(sizes, few_rows=0)

    def format_choices(self, coding: WeightCoding, device: torch.device) -> Sequence[Formats]:
        """Formats that the planner may choose from on `device`; quantised tensors of a checkpoint keep theirs.

        Raises:
            ConfigError: the weights cannot be coded as the configuration asks.
        """
        return format_choices(coding, self.spec.dtype, device)

    @abstractmethod
    def fixed_tensors(self) -> tuple[TensorSpec, ...]:
        """Embeddings, final norm and head."""

    def all_tensors(self) -> Iterator[TensorSpec]:
        """Fixed tensors, then those of each layer in turn."""
        yield from self.fixed_tensors()
        for layer in range(self.num_layers):
            yield from self.layer_tensors(layer)

    @abstractmethod
    def embed(self, fixed: Weights, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Input of the first layer [n, h] for int64 `token_ids` [n]."""

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """What the projections of all layers take of `positions` [n]."""
        return Rotation(positions)

    @property
    def multiplied(self) -> frozenset[str]:
        """Names of weights of the layers that `layers.project` alone takes, but where K and V are rebuilt.

        A few rows may be multiplied by them as they lie. Here none.
        """
        return frozenset()

    def opened(self, layer: int, w: Weights) -> Weights:
        """What the layer is computed with, of its tensors: made once for each place where they lie. Here themselves."""
        return w

    @abstractmethod
    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        """What attention takes of the layer's input `hidden` [n, h]."""

    @abstractmethod
    def keys_values(
        self, w: Weights, layer: int, activation: torch.Tensor, rotation: Rotation, out: torch.Tensor
    ) -> None:
        """[K|V] rebuilt from stored activations [n, columns] by one GEMM, into `out` [n, k+v], contiguous."""

    def sinks(self, w: Weights, layer: int) -> torch.Tensor | None:
        """The layer's sinks [num_heads], in models whose attention has them."""
        return None

    @abstractmethod
    def finish_layer(self, w: Weights, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output of the layer [n, h], from its input `hidden` [n, h] and the attention's output [n, o].

        In a layer with experts this is `route`, then `finish_routed`.
        """

    def route(self, w: Weights, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> Routed:
        """The first part of `finish_layer`, which needs no expert's weights, in a layer that has experts."""
        raise NotImplementedError(f"layer {layer} has no experts")

    def finish_routed(self, w: Weights, layer: int, routed: Routed) -> torch.Tensor:
        """The second part: output of the layer [n, h]. Of the experts, `w` has those that were chosen."""
        raise NotImplementedError(f"layer {layer} has no experts")

    @abstractmethod
    def logits(self, fixed: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [r, vocab] in float32 for the chosen rows [r, h] of the last layer's output."""
