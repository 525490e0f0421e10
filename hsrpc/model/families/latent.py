"""Decoders whose attention keeps latents (DeepSeek-V2, arXiv 2405.04434): K and V are made of them by one GEMM.

An activation is [latent | key]: the normed latent, and the rotated key that all heads share. It is rotated before it is
stored, so that rebuilding needs no positions, and single queries can attend to the rows as they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch

from hsrpc.model.activations import Activations, KvProjection
from hsrpc.model.attention import HeadShape
from hsrpc.model.families.decoder import ATTENTION_NORM, Decoder
from hsrpc.model.families.settings import Latent
from hsrpc.model.family import Absorption, ModelSpec, Projection, Weights
from hsrpc.model.layers import Affine, Norm, NormKind, linear_tensors, project
from hsrpc.model.rope import Rotation
from hsrpc.model.tensor import PairsApart, PartsTogether, RowOrder, TensorSpec
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.sizes import AbsorbedSizes, LayerSizes

QUERIES = Affine.named("queries")
QUERY_LATENT = Affine.named("query_latent")
QUERY_NORM = Affine.named("query_norm")
KV_LATENT = Affine.named("kv_latent")
KV_NORM = Affine.named("kv_norm")
KV = Affine.named("kv")
_NORM = Norm(NormKind.RMS, 1e-6)
"""The norm of latents; no key of config.json says it."""


class LatentDecoder(Decoder):
    """A decoder with latents, as its settings say."""

    size_keys: ClassVar[tuple[str, ...]] = (
        *Decoder.size_keys,
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )

    def __init__(self, spec: ModelSpec, served_context: int | None = None) -> None:
        super().__init__(spec, served_context)
        latent = self.settings.latent
        assert latent is not None  # the readers of these families give one
        self._latent: Latent = latent
        count = self.sizes.num_heads
        self.heads = HeadShape(count, count, self.sizes.head_dim, latent.value_dim)
        self.activation_size = latent.rank + latent.rope_dim
        self.absorption: LatentAbsorption = LatentAbsorption(self, latent)

    def layer_sizes(self, layer: int) -> LayerSizes:
        absorbed = AbsorbedSizes(
            query_size=self.absorption.heads.query_size,
            attended_size=self.absorption.heads.out_size,
            num_elements=self._kv_rows * self._latent.rank,
        )
        return replace(super().layer_sizes(layer), absorbed=absorbed)

    @cached_property
    def activations(self) -> Activations:
        """None of its products is one of K and V together."""
        return Activations(self.activation_rows, KvProjection(KV, 0))

    @property
    def _kv_rows(self) -> int:
        """Rows of the weight that makes K and V, without the key that all heads share."""
        return self.sizes.num_heads * (self._latent.nope_dim + self._latent.value_dim)

    def _attention_tensors(self, layer: int, prefix: str) -> tuple[TensorSpec, ...]:
        latent, size, count = self._latent, self.sizes.hidden_size, self.sizes.num_heads
        attention = f"{prefix}.self_attn"
        queries = self._rotated_last(layer, count, self.sizes.head_dim)
        kv_rows, kv_order = (self.activation_size,), self._rotated_last(layer, 1, self.activation_size)
        parts = PartsTogether(count, latent.nope_dim, latent.value_dim)
        return (
            *self._query_tensors(attention, queries),
            *linear_tensors(
                KV_LATENT, (f"{attention}.kv_a_proj_with_mqa",), kv_rows, size, bias=latent.bias, order=kv_order
            ),
            *_NORM.tensors(KV_NORM, f"{attention}.kv_a_layernorm", latent.rank),
            *linear_tensors(KV, (f"{attention}.kv_b_proj",), (self._kv_rows,), latent.rank, bias=False, order=parts),
        )

    def _query_tensors(self, attention: str, order: RowOrder | None) -> list[TensorSpec]:
        rank, size, rows = self._latent.query_rank, self.sizes.hidden_size, (self.q_size,)
        if rank is None:
            return linear_tensors(QUERIES, (f"{attention}.q_proj",), rows, size, bias=False, order=order)
        return [
            *linear_tensors(QUERY_LATENT, (f"{attention}.q_a_proj",), (rank,), size, bias=self._latent.bias),
            *_NORM.tensors(QUERY_NORM, f"{attention}.q_a_layernorm", rank),
            *linear_tensors(QUERIES, (f"{attention}.q_b_proj",), rows, rank, bias=False, order=order),
        ]

    def _rotated_last(self, layer: int, heads: int, head_dim: int) -> RowOrder | None:
        """Order of the rows of heads whose last dimensions are rotated."""
        rope, width = self.settings.ropes[layer], self._latent.rope_dim
        if rope is None or not rope.interleaved:
            return None
        return PairsApart(heads, head_dim, width, offset=head_dim - width)

    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        found = self.project_latents(w, layer, hidden, rotation)
        self.keys_values(w, layer, found.activation, rotation, found.kv)
        return found

    def project_latents(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        """As `project`, but K and V are not filled."""
        x, latent = self._normed(w, ATTENTION_NORM, hidden), self._latent
        narrow = x if latent.query_rank is None else _NORM.of(w, QUERY_NORM, project(w, QUERY_LATENT, x))
        queries = project(w, QUERIES, narrow)
        rotary, heads = self._rotaries[layer], queries.unflatten(1, (-1, self.sizes.head_dim))
        activation = project(w, KV_LATENT, x)
        kept = activation[:, : latent.rank]
        kept.copy_(_NORM.of(w, KV_NORM, kept))
        if rotary is not None:
            rotary.turn_(heads[..., latent.nope_dim :], rotation)
            rotary.turn_(activation[:, None, latent.rank :], rotation)
        rows = self.activation_rows.encode(activation)
        return Projection(rows, queries, hidden.new_empty((len(hidden), self.heads.row_size)))

    def keys_values(
        self, w: Weights, layer: int, activation: torch.Tensor, rotation: Rotation, out: torch.Tensor
    ) -> None:
        """In pieces, which bounds the memory of keys on their way to where they lie apart."""
        for x, rows in zip(activation.split(REGENERATE_ROWS), out.split(REGENERATE_ROWS), strict=True):
            self._keys_values(w, self.activation_rows.decode(x), rows)

    def _keys_values(self, w: Weights, activation: torch.Tensor, out: torch.Tensor) -> None:
        latent = self._latent
        kept, key = activation.split((latent.rank, latent.rope_dim), dim=1)
        to_keys, to_values = w[KV.weight].split((self.sizes.num_heads * latent.nope_dim, self.value_size))
        keys = out[:, : self.key_size].unflatten(1, (-1, self.sizes.head_dim))
        keys[..., : latent.nope_dim] = (kept @ to_keys.t()).unflatten(1, (-1, latent.nope_dim))
        keys[..., latent.nope_dim :] = key[:, None]
        torch.mm(kept, to_values.t(), out=out[:, self.key_size :])


class LatentAbsorption(Absorption):
    """Queries and values go through the two halves of the GEMM that makes K and V, instead of all latents."""

    def __init__(self, family: LatentDecoder, latent: Latent) -> None:
        self._family = family
        self._latent = latent
        self.heads = HeadShape(family.sizes.num_heads, 1, latent.rank + latent.rope_dim, latent.rank, shares=True)

    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        return self._family.project_latents(w, layer, hidden, rotation)

    def queries(self, w: Weights, layer: int, queries: torch.Tensor) -> torch.Tensor:
        latent, count = self._latent, self.heads.num_heads
        plain, rotated = queries.unflatten(1, (count, -1)).split((latent.nope_dim, latent.rope_dim), dim=2)
        to_keys = w[KV.weight][: count * latent.nope_dim].view(count, latent.nope_dim, latent.rank)
        out = queries.new_empty((len(queries), count, self.heads.key_dim))
        out[..., : latent.rank] = torch.bmm(plain.transpose(0, 1), to_keys).transpose(0, 1)
        out[..., latent.rank :] = rotated
        return out.flatten(1)

    def values(self, w: Weights, layer: int, attended: torch.Tensor) -> torch.Tensor:
        latent, count = self._latent, self.heads.num_heads
        to_values = w[KV.weight][count * latent.nope_dim :].view(count, latent.value_dim, latent.rank)
        gathered = attended.view(-1, count, latent.rank).transpose(0, 1)
        return torch.bmm(gathered, to_values.transpose(1, 2)).transpose(0, 1).flatten(1)
