"""The sizes of a model, as plain numbers: all that planning and scheduling need to know of it.

A family makes one `LayerSizes` for each layer; what a tensor or a cached row takes in its format is a number in there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hsrpc.schedule.blocks import BlockKind
from hsrpc.schedule.windows import LayerWindows, most_blocks

Floats: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = float | Floats
"""One candidate's, or an array of many; whole numbers too, which are exact below 2**53."""

_SCORE_BYTES = 16
"""Bytes of an expert for each token: its logit, scores and what it is chosen by, in float32."""
ALIGNMENT = 256
"""Tensors in a buffer begin at multiples of this many bytes."""


def align(size: int) -> int:
    """`size` bytes rounded up to the alignment of tensors in a buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def part_bytes(size: int, num_gpus: int) -> int:
    """Bytes of a layer's `size` packed bytes that each of several GPUs loads, with what pads the last part."""
    return align(-(-size // num_gpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSizes:
    """A packed weight tensor in its format; bytes with the padding behind it."""

    name: str
    num_elements: int
    resident_bytes: int
    """Bytes on the device where it stays there: it is allocated by itself, without padding."""
    device_bytes: int
    """Bytes in a buffer on the device, ready to multiply by."""
    buffer_bytes: int
    """Upper bound of the bytes in a weight buffer on the device, as it came over the bus."""
    bus_bytes: float
    """Bytes expected on the bus."""
    host_bytes: float
    """Upper bound of the bytes in host memory; on the device too, where it stays there packed."""
    decoded_bytes: int = 0
    """Device memory that it is decoded to before it is used; 0: it is used where it lies packed."""
    decode_traffic: float = 0.0
    """Bytes of device memory that are read and written in the time that decoding takes."""

    few_rows: int = 0
    """Most rows that are multiplied by it as it lies, where it stays packed; 0: it is always decoded."""
    spared_traffic: float = 0.0
    """Bytes of device memory that are read and written in the time that this saves."""

    @property
    def is_coded(self) -> bool:
        """Whether it is decoded before it is used; else it lies ready where it lies packed."""
        return self.decoded_bytes > 0


class Stays(NamedTuple):
    """Names of the weight tensors of a layer that stay on the device; the others come to a buffer in every step."""

    ready: frozenset[str] = frozenset()
    """Ready to multiply by."""
    packed: frozenset[str] = frozenset()
    """As their format packs them, to be decoded in every step; none that is not coded."""
    spread: float = 0.0
    """Part of the others that the devices of several GPUs hold together, a piece each, and give each other in every
    step; the rest crosses the bus. In [0, 1]."""

    @property
    def names(self) -> frozenset[str]:
        """All that stay where they are used."""
        return self.ready | self.packed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSizes:
    """What the weight tensors of a layer take, some of which stay on the device."""

    resident_bytes: float
    """Upper bound of what those take that stay."""
    kept_bytes: float
    """Part of these that is for weights that stay packed."""
    ready_bytes: int
    """Bytes that all that stay would take ready to multiply by."""
    streamed_bytes: int
    """Bytes that the others would take so, in a buffer; also of those that cross no bus, but are spread."""
    buffer_bytes: int
    bus_bytes: float
    host_bytes: float
    spread_bytes: int
    """This GPU's piece of what several of them hold together, on its device."""
    num_others: int
    """Other GPUs, of which each gives this one as many bytes in every step: of those that crossed its bus, and of those
    that it holds."""
    decoded_bytes: int
    """Device memory that tensors are decoded to before they are used: of all that stream or stay packed."""
    decode_traffic: float
    """Bytes of device memory that are read and written in the time that decoding them takes, but for experts."""
    expert_traffic: float
    """The same for all experts; a step decodes those that its tokens take."""
    spared_traffic: float
    """The same of what a step of up to `ModelSizes.few_rows` rows saves: it multiplies as it lies what stays packed."""


class WeightBuffers(NamedTuple):
    """Bytes of the device buffers that weights go through: those of the layer that takes most."""

    packed: int
    """Buffer for weights as they came over the bus."""
    decoded: int
    """Buffer for decoded weights: one for all layers, since one is computed after the other."""

    @classmethod
    def of(cls, placed: Iterable[PlacedSizes]) -> WeightBuffers:
        """The buffers for what streams, and what is decoded, of each layer."""
        sizes = [(each.buffer_bytes, each.decoded_bytes) for each in placed]
        return cls(*map(max, zip(*sizes, strict=True)))


@dataclass(frozen=True, slots=True)
class CacheRow:
    """What a block keeps of one token in one layer."""

    width: int
    """Elements of a row of the pool."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedSizes:
    """Attention of single queries to activations as they are stored, without K and V."""

    query_size: int
    """Width of the queries of all heads that attend so."""
    attended_size: int
    """Width of what they gather."""
    num_elements: int
    """Weights that take a query there, and what it gathers back: those that rebuild K and V."""

    def flop(self, context: int) -> int:
        """FLOP of one query that attends to `context` tokens."""
        return 2 * (self.query_size + self.attended_size) * context + 2 * self.num_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSizes:
    """The experts of a layer, of which each token takes some."""

    count: int
    k: int
    """Experts that a token takes."""
    names: frozenset[str]
    """Names of all experts' weight tensors."""
    num_elements: int
    """Elements of one expert's weights."""
    device_bytes: int
    """Bytes of one expert's weights on the device."""

    def touched(self, tokens: Number) -> Number:
        """Experts that `tokens` tokens take together, on average, where all are as likely."""
        return self.count * self.touched_share(tokens)

    def touched_share(self, tokens: Number) -> Number:
        """Part of the experts that `tokens` tokens take together."""
        return 1 - (1 - self.k / self.count) ** tokens


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One decoder layer. Widths are elements of a token; a layer that works differently overrides the methods."""

    tensors: tuple[TensorSizes, ...]
    hidden_size: int
    query_size: int
    """Width of the queries of all heads."""
    key_size: int
    value_size: int
    ffn_size: int
    """Width of a token's row between the products of the MLP; of experts, of all that it takes together."""
    kv: CacheRow
    """Row of a token in a KV block."""
    activation: CacheRow
    """Row of a token in an activation block: what K and V are rebuilt from."""
    compute_bytes: int
    """Bytes of an element of hidden states and whatever else is computed."""
    coded_weight_bytes: int = 0
    """[W_K W_V] as codes of 8 bits, made in each step to be multiplied with coded activations; 0: it is as it is."""
    small_kernels: int = 4
    """Kernels beside GEMMs and attention, each counted as a norm: two norms, and shorter sums and copies."""
    experts: ExpertSizes | None = None
    """The experts among the weights; None: the MLP is dense."""
    absorbed: AbsorbedSizes | None = None
    """None: attention needs K and V."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it; None: all."""
    num_gpus: int = 1
    """GPUs of which each loads a part of what streams, and gets the other parts from the others."""

    @cached_property
    def num_elements(self) -> int:
        """Elements of all weight tensors."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the weight tensors."""
        return frozenset(tensor.name for tensor in self.tensors)

    @cached_property
    def coded(self) -> frozenset[str]:
        """Names of the weight tensors that are decoded before they are used, unless they stay ready."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.is_coded)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return sum(tensor.device_bytes for tensor in self.tensors)

    @cached_property
    def largest_first(self) -> tuple[TensorSizes, ...]:
        """The weight tensors by their bytes on the device."""
        return tuple(sorted(self.tensors, key=lambda tensor: -tensor.device_bytes))

    @cached_property
    def expert_tensors(self) -> tuple[TensorSizes, ...]:
        """The weight tensors of all experts."""
        names = frozenset[str]() if self.experts is None else self.experts.names
        return tuple(tensor for tensor in self.tensors if tensor.name in names)

    @cached_property
    def expert_bus_bytes(self) -> float:
        """Bytes of one expert on the bus, on average; 0: there are none."""
        count = 1 if self.experts is None else self.experts.count
        return sum(tensor.bus_bytes for tensor in self.expert_tensors) / count

    @cached_property
    def without_experts(self) -> LayerSizes:
        """The layer with its other weights alone."""
        others = set(self.tensors) - set(self.expert_tensors)
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor in others))

    def placed(self, stays: Stays) -> PlacedSizes:
        """What the weight tensors take on one GPU, and of the host for that, where these of them stay on the device."""
        ready = [tensor for tensor in self.tensors if tensor.name in stays.ready]
        packed = [tensor for tensor in self.tensors if tensor.name in stays.packed]
        names = stays.names
        streamed = [tensor for tensor in self.tensors if tensor.name not in names]
        kept_bytes = sum(tensor.host_bytes for tensor in packed)
        bound = sum(tensor.host_bytes for tensor in streamed)
        spread = int(self._part(stays.spread * bound)) if stays.spread else 0
        held = self.num_gpus * spread
        experts = frozenset[str]() if self.experts is None else self.experts.names
        return PlacedSizes(
            resident_bytes=kept_bytes + sum(tensor.resident_bytes for tensor in ready),
            kept_bytes=kept_bytes,
            ready_bytes=sum(tensor.resident_bytes for tensor in (*ready, *packed)),
            streamed_bytes=sum(tensor.device_bytes for tensor in streamed),
            buffer_bytes=held + self.num_gpus * int(self._part(sum(tensor.buffer_bytes for tensor in streamed) - held)),
            bus_bytes=max(0.0, sum(tensor.bus_bytes for tensor in streamed) - held) / self.num_gpus,
            host_bytes=self._part(bound - held),
            spread_bytes=spread,
            num_others=self.num_gpus - 1,
            decoded_bytes=sum(tensor.decoded_bytes for tensor in (*packed, *streamed)),
            decode_traffic=sum(each.decode_traffic for each in (*packed, *streamed) if each.name not in experts),
            expert_traffic=sum(each.decode_traffic for each in (*packed, *streamed) if each.name in experts),
            spared_traffic=sum(each.spared_traffic for each in packed if each.few_rows),
        )

    def _part(self, size: float) -> float:
        """Bytes of a GPU's part of `size` bytes that stream, at most."""
        return size if self.num_gpus == 1 else part_bytes(math.ceil(round(max(0.0, size), 3)), self.num_gpus)

    def holding(self, kinds: Collection[BlockKind]) -> LayerSizes:
        """The layer where blocks are of these kinds alone."""
        kv = self.kv if BlockKind.KV in kinds else self._computed(self.kv)
        if BlockKind.ACTIVATION in kinds:
            return replace(self, kv=kv)
        return replace(self, kv=kv, activation=self._computed(self.activation), coded_weight_bytes=0)

    def _computed(self, row: CacheRow) -> CacheRow:
        return CacheRow(row.width, row.width * self.compute_bytes)

    def row(self, kind: BlockKind) -> CacheRow:
        """What a block of that kind keeps of a token."""
        return self.kv if kind is BlockKind.KV else self.activation

    def flop(self, tokens: Number) -> Number:
        """FLOP of the projections and the MLP of `tokens` tokens: two for each weight that a token takes."""
        idle = 0 if self.experts is None else (self.experts.count - self.experts.k) * self.experts.num_elements
        return tokens * (2 * (self.num_elements - idle))

    def read_bytes(self, tokens: Number, touched: Number | None = None) -> Number:
        """Bytes of weights that the products of `tokens` tokens read from device memory.

        `touched`: experts that they take together; None: as many as on average, where all are as likely.
        """
        if self.experts is None:
            return self.weight_bytes
        idle = self.experts.count - (self.experts.touched(tokens) if touched is None else touched)
        return self.weight_bytes - idle * self.experts.device_bytes

    def workspace_bytes(self, tokens: Number) -> Number:
        """Upper bound of what computing `tokens` tokens allocates on the device, beside buffers."""
        width = 4 * self.hidden_size + 3 * self.query_size + self.key_size + self.value_size + 3 * self.ffn_size
        if self.experts is None:
            return tokens * (width * self.compute_bytes + 8 * self.hidden_size)
        width += self.experts.k * self.hidden_size  # each expert's output, before they are summed
        return tokens * (width * self.compute_bytes + 8 * self.hidden_size + _SCORE_BYTES * self.experts.count)

    @property
    def pending_bytes(self) -> int:
        """Bytes that one token keeps allocated from its launch until its row is stored.

        K and V of a fused projection are views of a tensor that has the queries too, so all of it stays allocated.
        """
        width = self.hidden_size + self.query_size + self.key_size + self.value_size
        return width * self.compute_bytes

    @property
    def attended_size(self) -> int:
        """Width of what attention gives: each head's values."""
        return self.query_size * self.value_size // self.key_size

    @property
    def rebuilt_bytes(self) -> int:
        """Bytes of one token's K and V as attention reads them."""
        return (self.key_size + self.value_size) * self.compute_bytes

    @property
    def padded_bytes(self) -> int:
        """Bytes of one token's values beside the buffer, padded to the width of the keys; 0: they are as wide."""
        return self.key_size * self.compute_bytes if self.value_size < self.key_size else 0

    @property
    def regenerate_flop(self) -> int:
        """FLOP to rebuild one token's K and V from its activation: one GEMM with [W_K W_V]."""
        if self.absorbed is not None:
            return 2 * self.absorbed.num_elements
        return 2 * self.activation.width * (self.key_size + self.value_size)

    @property
    def recoded_bytes(self) -> int:
        """Bytes read and written for one rebuilt token beside the GEMM: its activation decoded, its K and V coded."""
        x, kv = self._computed(self.activation).num_bytes, self.rebuilt_bytes
        decodes = self.activation.num_bytes < x and not self.coded_weight_bytes
        decoded = self.activation.num_bytes + x if decodes else 0
        return decoded + (kv + self.kv.num_bytes if self.kv.num_bytes < kv else 0)

    @property
    def coding_traffic(self) -> int:
        """Bytes of device memory that coding [W_K W_V] reads and writes in every step."""
        if not self.coded_weight_bytes:
            return 0
        return self.activation.width * self.rebuilt_bytes + self.coded_weight_bytes

    @property
    def scattered_bytes(self) -> int:
        """Bytes of one token's rebuilt keys that are copied to where they lie apart."""
        return 0 if self.absorbed is None else self.key_size * self.compute_bytes

    def attention_flop(self, context: int) -> int:
        """FLOP of one query's attention to `context` tokens: its products with K, and with V."""
        return 2 * (self.query_size + self.attended_size) * context

    def attended(self, context: int) -> int:
        """Tokens that a query sees of `context`."""
        return min(context, self.sliding_window or context)

    def seen_part(self, context: int) -> float:
        """Part of `context` cached tokens that a query sees, which is what the layer loads of them; 1 of none."""
        return self.attended(context) / context if context else 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model: what all its layers share, and each layer. Sizes in elements unless the name says bytes."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    """Most tokens that the model's positions allow."""
    compute_bytes: int
    """Bytes of an element of hidden states and whatever else is computed."""
    layers: tuple[LayerSizes, ...]
    fixed_bytes: int
    """Bytes of embeddings, final norm and head: always on the device."""

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.compute_bytes

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def distinct(self) -> tuple[tuple[LayerSizes, int], ...]:
        """Layers that differ, and how many there are of each: what is alike is computed once."""
        return tuple(Counter(self.layers).items())

    @cached_property
    def without_experts(self) -> ModelSizes:
        """The model with the other weights alone."""
        others = {layer: layer.without_experts for layer, _ in self.distinct}
        return replace(self, layers=tuple(others[layer] for layer in self.layers))

    @property
    def commonest(self) -> LayerSizes:
        """The layer of which there are most alike."""
        return max(self.distinct, key=lambda each: each[1])[0]

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Number of each layer among the distinct ones."""
        numbers = {layer: number for number, (layer, _) in enumerate(self.distinct)}
        return tuple(numbers[layer] for layer in self.layers)

    @cached_property
    def windows(self) -> LayerWindows:
        """The layers' sliding windows."""
        return LayerWindows(tuple(layer.sliding_window for layer in self.layers))

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a layer sees, at most; None: all, in some layers at least."""
        return self.windows.widest

    def held_blocks(self, num_tokens: int, block_size: int, chunk: Number = 1) -> Number:
        """Blocks that a request holds at most at once until it has `num_tokens`, computed in chunks of up to `chunk`.

        Those that every layer's window has left are freed.
        """
        whole, window = -(-num_tokens // block_size), self.sliding_window
        return whole if window is None else np.minimum(whole, most_blocks(window, chunk, block_size))

    @cached_property
    def few_rows(self) -> int:
        """Most rows that are multiplied by some weights as they lie, where these stay packed."""
        tensors = (tensor for layer, _ in self.distinct for tensor in layer.tensors)
        return min((tensor.few_rows for tensor in tensors if tensor.few_rows), default=0)

    @cached_property
    def layers_bytes(self) -> int:
        """Bytes of all layers' weights on the device."""
        return sum(count * layer.weight_bytes for layer, count in self.distinct)

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return self.layers_bytes + self.fixed_bytes

    def on_gpus(self, num_gpus: int) -> ModelSizes:
        """The model on so many GPUs, which load what streams for each other."""
        shared = {layer: replace(layer, num_gpus=num_gpus) for layer, _ in self.distinct}
        return replace(self, layers=tuple(shared[layer] for layer in self.layers))

    @property
    def num_gpus(self) -> int:
        """GPUs that load what streams for each other."""
        return self.layers[0].num_gpus

    def holding(self, kinds: Collection[BlockKind]) -> ModelSizes:
        """The model where blocks are of these kinds alone: rows that no block holds are as they are computed."""
        held = {layer: layer.holding(kinds) for layer, _ in self.distinct}
        return replace(self, layers=tuple(held[layer] for layer in self.layers))

    @property
    def rounds(self) -> bool:
        """Whether rows of blocks take fewer bytes than what is computed: it is rounded then."""
        return any(layer.holding(()) != layer for layer, _ in self.distinct)

    @property
    def max_coded_bytes(self) -> int:
        """Bytes of the buffer for [W_K W_V] as codes: one for all layers."""
        return max(layer.coded_weight_bytes for layer, _ in self.distinct)

    def token_bytes(self, kind: BlockKind) -> int:
        """Bytes that blocks of that kind keep of one token, in all layers together."""
        return sum(count * layer.row(kind).num_bytes for layer, count in self.distinct)

    def mean_row_bytes(self, kind: BlockKind) -> float:
        """Bytes that a block of that kind keeps of one token in one layer, on average."""
        return self.token_bytes(kind) / self.num_layers

    def max_row_bytes(self, kind: BlockKind) -> int:
        """Bytes that a block of that kind keeps of one token in the layer where they are most."""
        return max(layer.row(kind).num_bytes for layer, _ in self.distinct)

    @property
    def can_absorb(self) -> bool:
        """Whether single queries may attend to activations as they are stored, in all layers."""
        return all(layer.absorbed is not None for layer, _ in self.distinct)

    @property
    def activation_ratio(self) -> float:
        """Bytes of KV over bytes of activation; activations pay only above 1."""
        return self.token_bytes(BlockKind.KV) / self.token_bytes(BlockKind.ACTIVATION)

    def mean(self, of_layer: Callable[[LayerSizes], Number]) -> Number:
        """Mean over all layers; equal ones are asked once."""
        (first, count), *others = self.distinct
        found = of_layer(first) * (count / self.num_layers)
        for layer, count in others:
            found = found + of_layer(layer) * (count / self.num_layers)
        return found

    def largest(self, of_layer: Callable[[LayerSizes], Number]) -> Number:
        """Maximum over all layers; equal ones are asked once."""
        (first, _), *others = self.distinct
        found = of_layer(first)
        for layer, _ in others:
            found = np.maximum(found, of_layer(layer))
        return found
