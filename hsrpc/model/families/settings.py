"""What decoders differ in, besides sizes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hsrpc.model.experts import Experts
from hsrpc.model.layers import Activation, Norm
from hsrpc.model.rope import RopeSettings


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Where in a layer there is a norm, by its name in the checkpoint; None: there is none."""

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of tensors in the checkpoint; those of a layer follow after its number."""

    layers: str = "model.layers"
    norms: NormNames = NormNames()
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """One name: all are one tensor."""
    qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    sinks: str = "self_attn.sinks"
    out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up of a gated MLP; one name: both are one tensor, or the MLP has no gate."""
    mlp_out: str = "mlp.down_proj"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases:
    """Which projections have a bias."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


class QkNorm(Enum):
    """What of the queries, and of the keys, is normed together."""

    NONE = "none"
    HEAD = "head"
    """Each head by itself, all with one weight [head_dim]."""
    EACH_HEAD = "each head"
    """Each head by itself, with a weight of its own: [heads, head_dim]."""
    ROW = "row"
    """All heads together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Constant factors."""

    embedding: float = 1.0
    attention: float | None = None
    """Factor of the products of queries and keys; None: head_dim**-0.5."""
    residual: float = 1.0
    """Factor of what attention and MLP add to the hidden state."""
    logits: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Bounds that values come near to: x becomes cap * tanh(x / cap); None: they have none."""

    scores: float | None = None
    """Cap of the products of queries and keys."""
    logits: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Attention whose keys and values are made of a latent that all heads share, beside a rotated key that they share.

    A query's head and a key's have `nope_dim` dimensions that are not rotated, then `rope_dim` that are.
    """

    query_rank: int | None
    """Width of the queries' own latent; None: they are made of the layer's input."""
    rank: int
    """Width of the latent of keys and values."""
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool
    """The projections to latents have a bias."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """One decoder; a field left out is as in Llama."""

    heads: Heads
    norm: Norm
    """All norms of a row; those of queries and keys have no bias."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None: it sees all tokens."""
    ropes: tuple[RopeSettings | None, ...]
    """Rotation of each layer; None: positions change nothing in it but what it sees."""
    experts: tuple[Experts | None, ...]
    """The mixture of experts that each layer has for an MLP; None: its MLP is dense."""
    tied: bool
    """The head is the embedding."""
    activation: Activation = Activation.SILU
    gated: bool = True
    parallel: bool = False
    """Attention and MLP both begin at the layer's input; without a norm of its own the MLP takes the attention's."""
    qk_norm: QkNorm = QkNorm.NONE
    biases: Biases = Biases()
    multipliers: Multipliers = Multipliers()
    caps: Caps = Caps()
    sinks: bool = False
    """Each layer has a score for each head, of a key without a value that every query sees."""
    latent: Latent | None = None
    """Attention is of this kind; None: of grouped queries."""
    names: Names = Names()
    qkv_by_head: bool = False
    """The rows of Q, K and V come head by head in the checkpoint."""

    def context(self, positions: int) -> int:
        """Tokens of the model's context, where `max_position_embeddings` says `positions`."""
        return max((rope.scaling.context(positions) for rope in self.ropes if rope is not None), default=positions)
