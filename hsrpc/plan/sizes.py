"""The sizes of a model, as plain numbers: all that planning and scheduling need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 256
"""Tensors in a buffer begin at multiples of this many bytes."""


def align(size: int) -> int:
    """`size` bytes rounded up to the alignment of tensors in a buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes in elements unless the name says bytes. `layer_tensors` are those of one decoder layer, by packed name."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    """Most tokens that the model's positions allow."""
    element_bytes: int
    layer_tensors: dict[str, int]
    fixed_elements: int
    """Embeddings, final norm and head: always on the device."""
    coded_share: float = 1.0
    """Bytes that weights take on the bus over their own: less than 1 where they are coded."""
    max_coded_share: float = 1.0
    """At most: what host memory is planned for."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it; None: all."""

    @property
    def codes_weights(self) -> bool:
        """Streamed weights are coded, and decoded on the device."""
        return self.coded_share < 1

    @property
    def kv_size(self) -> int:
        """Width of K, and of V: `kv` of the formulas."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_size * self.element_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of one token's activation (the input of the K and V projections) in one layer."""
        return self.hidden_size * self.element_bytes

    @property
    def activation_ratio(self) -> float:
        """Bytes of KV over bytes of activation; activations pay only above 1."""
        return self.kv_bytes / self.activation_bytes

    @property
    def layer_elements(self) -> int:
        return sum(self.layer_tensors.values())

    def tensor_bytes(self, name: str) -> int:
        """Bytes of one packed tensor of a layer, with the padding behind it."""
        return align(self.layer_tensors[name] * self.element_bytes)

    @property
    def layer_bytes(self) -> int:
        return sum(map(self.tensor_bytes, self.layer_tensors))

    @property
    def fixed_bytes(self) -> int:
        return self.fixed_elements * self.element_bytes

    @property
    def model_bytes(self) -> int:
        return self.num_layers * self.layer_bytes + self.fixed_bytes

    @property
    def regenerate_flop(self) -> int:
        """FLOP to rebuild one token's K and V in one layer from its activation: one GEMM with [W_K W_V]."""
        return 4 * self.hidden_size * self.kv_size

    @property
    def layer_flop(self) -> int:
        """FLOP of one token's projections and MLP in one layer (two for each weight)."""
        return 2 * self.layer_elements

    def attention_flop(self, context: int) -> int:
        """FLOP of one query's attention to `context` tokens in one layer."""
        return 4 * self.num_heads * self.head_dim * context
