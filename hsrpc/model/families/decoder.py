"""One decoder for the families that `readers` describes: rotary positions, norms, grouped queries, MLPs or experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch.nn import functional

from hsrpc.model.activations import Activations, KvProjection, make_activations
from hsrpc.model.attention import Extras
from hsrpc.model.bounds import MAX_CONTEXT, MAX_VOCAB_SIZE, MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.experts import IN_TABLE, OUT_TABLE, SHARED_IN, SHARED_OUT, Experts
from hsrpc.model.families.expert_readers import NUM_EXPERTS
from hsrpc.model.families.readers import DECODERS
from hsrpc.model.families.settings import DecoderSettings, Names, QkNorm
from hsrpc.model.family import Family, ModelSpec, Projection, Routed, Weights
from hsrpc.model.layers import Affine, linear_tensors, project
from hsrpc.model.rope import HeadNorms, RopeSettings, Rotary, Rotation
from hsrpc.model.tensor import HeadsTogether, PairsApart, RowOrder, TensorSpec
from hsrpc.plan.sizes import ExpertSizes, LayerSizes, ModelSizes

EMBED = "embed_weight"
ATTENTION_NORM = Affine.named("attention_norm")
ATTENTION_OUT_NORM = Affine.named("attention_out_norm")
FFN_NORM = Affine.named("ffn_norm")
FFN_OUT_NORM = Affine.named("ffn_out_norm")
FINAL_NORM = Affine.named("final_norm")
QKV = Affine.named("qkv")
Q_NORM = Affine.named("q_norm")
K_NORM = Affine.named("k_norm")
SINKS = "sinks"
OUT = Affine.named("out")
GATE_UP = Affine.named("gate_up")
DOWN = Affine.named("down")
HEAD = Affine.named("head")
_SMALL_KERNELS = 6
"""Profiled with Qwen3-8B and Llama-3-8B at a batch of 32, in times of a norm: norms, rotation, gate, sums and copies
take 4.6, attention 2.3 more than its bytes do, and a layer's GEMMs 1.5 less than they are counted."""

_EXPERT_KERNELS = 4
"""More of a layer with experts: the router's product, the choice, sorting and the sum; not profiled."""


class Decoder(Family):
    """A decoder as its settings say."""

    size_keys: ClassVar[tuple[str, ...]] = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        *NUM_EXPERTS,
        "vocab_size",
    )

    expert_tables = (IN_TABLE, OUT_TABLE)

    def __init__(self, spec: ModelSpec, served_context: int | None = None) -> None:
        super().__init__(spec, served_context)
        self.settings = self.read_settings(spec.config)
        scale = self.settings.multipliers.attention
        self.attention_scale = self.attention_scale if scale is None else scale
        self.attention_extras = Extras(self.settings.caps.scores, self.settings.sinks)
        self._rotaries = self._make_rotaries()
        # Rounded as the embeddings are: models were trained so.
        self._embedding_scale = torch.tensor(self.settings.multipliers.embedding, dtype=spec.dtype).item()

    @staticmethod
    def read_settings(config: ConfigFile) -> DecoderSettings:
        """The settings that `config` describes; one that describes them otherwise overrides it."""
        return DECODERS[config.choice("model_type", tuple(DECODERS))].read(config)

    @classmethod
    def read_sizes(cls, config: ConfigFile, compute_bytes: int) -> ModelSizes:
        settings = cls.read_settings(config)
        return ModelSizes(
            hidden_size=config.integer("hidden_size", maximum=MAX_WIDTH),
            num_heads=settings.heads.num_heads,
            num_kv_heads=settings.heads.num_kv_heads,
            head_dim=settings.heads.head_dim,
            ffn_size=config.integer("intermediate_size", maximum=MAX_WIDTH),
            vocab_size=config.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
            context_length=settings.context(config.integer("max_position_embeddings", maximum=MAX_CONTEXT)),
            compute_bytes=compute_bytes,
            layers=(),
            fixed_bytes=0,
        )

    def _make_rotaries(self) -> tuple[Rotary | None, ...]:
        """The rotation of each layer; layers that rotate alike share one."""
        made = dict[RopeSettings, Rotary]()
        for rope in self.settings.ropes:
            if rope is not None and rope not in made:
                made[rope] = Rotary(rope, self.served_context, self.spec.dtype)
        return tuple(None if rope is None else made[rope] for rope in self.settings.ropes)

    def layer_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        prefix, size = f"{self._names.layers}.{layer}", self.sizes.hidden_size
        norms, biases = self._names.norms, self.settings.biases
        return (
            *self._norm_tensors(ATTENTION_NORM, prefix, norms.attention_in),
            *self._attention_tensors(layer, prefix),
            *linear_tensors(OUT, (f"{prefix}.{self._names.out}",), (size,), self.heads.out_size, bias=biases.out),
            *self._norm_tensors(ATTENTION_OUT_NORM, prefix, norms.attention_out),
            *self._norm_tensors(FFN_NORM, prefix, norms.mlp_in),
            *self._mlp_tensors(layer, prefix),
            *self._norm_tensors(FFN_OUT_NORM, prefix, norms.mlp_out),
        )

    def _attention_tensors(self, layer: int, prefix: str) -> tuple[TensorSpec, ...]:
        """What makes queries, keys and values of the layer's input, and what they attend to beside."""
        sources = tuple(f"{prefix}.{name}" for name in self._names.qkv)
        rows, bias = (self.q_size, self.key_size, self.value_size), self.settings.biases.qkv
        return (
            *linear_tensors(QKV, sources, rows, self.sizes.hidden_size, bias=bias, order=self._qkv_order(layer)),
            *self._qk_norm_tensors(layer, prefix),
            *self._sink_tensors(prefix),
        )

    def _mlp_tensors(self, layer: int, prefix: str) -> Iterable[TensorSpec]:
        size, ffn, bias = self.sizes.hidden_size, self.sizes.ffn_size, self.settings.biases.mlp
        if (experts := self.settings.experts[layer]) is not None:
            return experts.tensors(prefix, size)
        sources = tuple(f"{prefix}.{name}" for name in self._names.mlp_in)
        rows = (ffn, ffn) if self.settings.gated else (ffn,)
        return (
            *linear_tensors(GATE_UP, sources, rows, size, bias=bias),
            *linear_tensors(DOWN, (f"{prefix}.{self._names.mlp_out}",), (size,), ffn, bias=bias),
        )

    @property
    def _names(self) -> Names:
        return self.settings.names

    def _norm_tensors(self, of: Affine, prefix: str, name: str | None) -> list[TensorSpec]:
        return [] if name is None else self.settings.norm.tensors(of, f"{prefix}.{name}", self.sizes.hidden_size)

    def _sink_tensors(self, prefix: str) -> list[TensorSpec]:
        source = f"{prefix}.{self._names.sinks}"
        return [TensorSpec(SINKS, (self.sizes.num_heads,), (source,))] if self.settings.sinks else []

    def _qk_norm_tensors(self, layer: int, prefix: str) -> list[TensorSpec]:
        head_dim = self.sizes.head_dim
        match self.settings.qk_norm:
            case QkNorm.NONE:
                return []
            case QkNorm.HEAD:
                shapes: list[tuple[int, ...]] = [(head_dim,), (head_dim,)]
            case QkNorm.EACH_HEAD:
                shapes = [(self.sizes.num_heads, head_dim), (self.sizes.num_kv_heads, head_dim)]
            case QkNorm.ROW:
                shapes = [(self.q_size,), (self.key_size,)]
        sources = (f"{prefix}.{name}" for name in self._names.qk_norms)
        of = zip((Q_NORM, K_NORM), sources, shapes, strict=True)
        return [self.settings.norm.tensor(*each, order=self._order(layer, math.prod(each[-1]))) for each in of]

    def _qkv_order(self, layer: int) -> RowOrder | None:
        if self.settings.qkv_by_head:
            return HeadsTogether(self.sizes.num_heads, self.sizes.head_dim)
        return self._order(layer, self.q_size + self.key_size, self.value_size)

    def _order(self, layer: int, rotated: int, others: int = 0) -> RowOrder | None:
        """Order of the rows of heads that are rotated, and others after them."""
        rope, head_dim = self.settings.ropes[layer], self.sizes.head_dim
        if rope is None or not rope.interleaved:
            return None
        return PairsApart(rotated // head_dim, head_dim, rope.width, others)

    def expert_names(self, layer: int) -> tuple[tuple[str, ...], ...]:
        experts = self.settings.experts[layer]
        return () if experts is None else experts.expert_names

    def layer_sizes(self, layer: int) -> LayerSizes:
        window = self.settings.windows[layer]
        hides = window is not None and window < self.sizes.context_length
        sizes = replace(super().layer_sizes(layer), small_kernels=_SMALL_KERNELS)
        if (experts := self.settings.experts[layer]) is not None:
            kernels = _SMALL_KERNELS + _EXPERT_KERNELS
            of_experts = _expert_sizes(experts, sizes)
            sizes = replace(sizes, ffn_size=experts.inner_size, experts=of_experts, small_kernels=kernels)
        return replace(sizes, sliding_window=window if hides else None)

    def fixed_tensors(self) -> tuple[TensorSpec, ...]:
        vocab, size, names = self.sizes.vocab_size, self.sizes.hidden_size, self._names
        head = () if self.settings.tied else linear_tensors(HEAD, (names.head,), (vocab,), size, bias=False)
        return (
            TensorSpec(EMBED, (vocab, size), (f"{names.embed}.weight",)),
            *self.settings.norm.tensors(FINAL_NORM, names.final_norm, size),
            *head,
        )

    def embed(self, fixed: Weights, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return _scaled(functional.embedding(token_ids, fixed[EMBED]), self._embedding_scale)

    @cached_property
    def activations(self) -> Activations:
        projection = KvProjection(QKV, self.q_size)
        return make_activations(
            self.activation_rows, projection, self.heads.row_size, codes_weight=self.spec.formats.codes_weight
        )

    @cached_property
    def multiplied(self) -> frozenset[str]:
        whole = (QKV,) if self.activations.projects_whole else ()
        return frozenset(each.weight for each in (*whole, OUT, GATE_UP, DOWN, SHARED_IN, SHARED_OUT))

    def opened(self, layer: int, w: Weights) -> Weights:
        experts = self.settings.experts[layer]
        return w if experts is None else experts.opened(w)

    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        x = self._normed(w, ATTENTION_NORM, hidden)
        activation, fused = self.activations.project(w, x)
        queries, kv = fused[:, : self.q_size], fused[:, self.q_size :]
        self._norm_(w, Q_NORM, queries)
        self._norm_(w, K_NORM, kv[:, : self.key_size])
        self._turn_(w, layer, fused[:, : self.q_size + self.key_size], self.sizes.num_heads, rotation)
        if (rotary := self._rotaries[layer]) is not None:
            rotary.scale_(queries, rotation)
        return Projection(activation, queries, kv)

    def keys_values(
        self, w: Weights, layer: int, activation: torch.Tensor, rotation: Rotation, out: torch.Tensor
    ) -> None:
        self.activations.keys_values(w, activation, out)
        keys = out[:, : self.key_size]
        self._norm_(w, K_NORM, keys)
        self._turn_(w, layer, keys, 0, rotation)

    def _turn_(self, w: Weights, layer: int, rows: torch.Tensor, num_queries: int, rotation: Rotation) -> None:
        """Norms and rotates the heads [n, m * head_dim] of queries, `num_queries` of them, and keys, where they are."""
        heads, rotary = rows.unflatten(1, (-1, self.sizes.head_dim)), self._rotaries[layer]
        norms = self._head_norms(w, num_queries)
        if rotary is not None:
            rotary.turn_(heads, rotation, norms)
        elif norms is not None:
            norms.apply_(heads)

    def _norm_(self, w: Weights, of: Affine, rows: torch.Tensor) -> None:
        """Norms queries or keys [n, heads * head_dim] in place, where that is not done as they are rotated."""
        match self.settings.qk_norm:
            case QkNorm.ROW:
                rows.copy_(self.settings.norm.of(w, of, rows))
            case QkNorm.EACH_HEAD:
                heads = rows.unflatten(1, (-1, self.sizes.head_dim))
                heads.copy_(self.settings.norm.of(w, of, heads))

    def _head_norms(self, w: Weights, num_queries: int) -> HeadNorms | None:
        if self.settings.qk_norm is not QkNorm.HEAD:
            return None
        norm = self.settings.norm
        return HeadNorms(w[Q_NORM.weight], w[K_NORM.weight], num_queries, norm.epsilon, norm.offset)

    def sinks(self, w: Weights, layer: int) -> torch.Tensor | None:
        return w.get(SINKS)

    def finish_layer(self, w: Weights, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        if self.settings.experts[layer] is not None:
            return self.finish_routed(w, layer, self.route(w, layer, hidden, attended))
        after, x = self._to_mlp(w, hidden, attended)
        inner, activation = project(w, GATE_UP, x), self.settings.activation
        out = project(w, DOWN, activation.gated(inner) if self.settings.gated else activation.of(inner))
        return self._from_mlp(w, after, out)

    def route(self, w: Weights, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> Routed:
        after, x = self._to_mlp(w, hidden, attended)
        return Routed(after, x, self._experts(layer).routes(w, x))

    def finish_routed(self, w: Weights, layer: int, routed: Routed) -> torch.Tensor:
        return self._from_mlp(w, routed.after, self._experts(layer).of(w, routed.x, routed.routes))

    def _experts(self, layer: int) -> Experts:
        experts = self.settings.experts[layer]
        assert experts is not None  # who calls knows that the layer has some
        return experts

    def _to_mlp(self, w: Weights, hidden: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the MLP's output is added to, and its input: [n, h] each."""
        added = self._normed(w, ATTENTION_OUT_NORM, project(w, OUT, attended))
        after = hidden + _scaled(added, self.settings.multipliers.residual)
        if self.settings.parallel:
            return after, self._normed(w, FFN_NORM if FFN_NORM.weight in w else ATTENTION_NORM, hidden)
        return after, self._normed(w, FFN_NORM, after)

    def _from_mlp(self, w: Weights, after: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Output of the layer [n, h], from that of its MLP."""
        return after + _scaled(self._normed(w, FFN_OUT_NORM, out), self.settings.multipliers.residual)

    def _normed(self, w: Weights, of: Affine, x: torch.Tensor) -> torch.Tensor:
        """`x`, normed where the layer has that norm."""
        return self.settings.norm.of(w, of, x) if of.weight in w else x

    def logits(self, fixed: Weights, hidden: torch.Tensor) -> torch.Tensor:
        head = fixed[EMBED] if self.settings.tied else fixed[HEAD.weight]
        logits = functional.linear(self._normed(fixed, FINAL_NORM, hidden), head).float()
        logits, cap = _scaled(logits, self.settings.multipliers.logits), self.settings.caps.logits
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _expert_sizes(experts: Experts, layer: LayerSizes) -> ExpertSizes:
    first, *_ = experts.expert_names
    one = [tensor for tensor in layer.tensors if tensor.name in first]
    return ExpertSizes(
        count=experts.count,
        k=experts.k,
        names=frozenset(name for names in experts.expert_names for name in names),
        num_elements=sum(tensor.num_elements for tensor in one),
        device_bytes=sum(tensor.device_bytes for tensor in one),
    )


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1.0 else x * factor
