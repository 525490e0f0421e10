"""OPT (Zhang et al., arXiv 2205.01068): learned positions, layer norm before or after the block, biased projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from hsrpc.model.activations import Activations, KvProjection, make_activations
from hsrpc.model.bounds import MAX_CONTEXT, MAX_VOCAB_SIZE, MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.family import Family, ModelSpec, Projection, Weights
from hsrpc.model.layers import Affine, layer_norm, linear_tensors, norm_tensors, project, project_relu
from hsrpc.model.rope import Rotation
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import ModelSizes

POSITION_OFFSET = 2
"""Rows at the start of the position table that no token uses."""
EMBED = "embed_weight"
POSITIONS = "position_weight"
ATTENTION_NORM = Affine.named("attention_norm")
FFN_NORM = Affine.named("ffn_norm")
FINAL_NORM = Affine.named("final_norm")
QKV = Affine.named("qkv")
OUT = Affine.named("out")
HEAD = Affine.named("head")
FC1 = Affine.named("fc1")
FC2 = Affine.named("fc2")
PROJECT_IN = Affine.named("project_in")
PROJECT_OUT = Affine.named("project_out")
ACTIVATIONS = ("relu", "gelu")


@dataclass(frozen=True)
class OptSettings:
    """What OPT models differ in, besides sizes."""

    embed_size: int
    """Width of the token embedding; projected to and from the hidden size where they differ."""
    pre_norm: bool
    final_norm: bool
    bias: bool
    affine: bool
    tied: bool
    activation: str

    @classmethod
    def read(cls, config: ConfigFile) -> OptSettings:
        hidden_size = config.integer("hidden_size", maximum=MAX_WIDTH)
        pre_norm = config.flag("do_layer_norm_before", True)
        return cls(
            embed_size=config.integer("word_embed_proj_dim", hidden_size, maximum=MAX_WIDTH),
            pre_norm=pre_norm,
            final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
            bias=config.flag("enable_bias", True),
            affine=config.flag("layer_norm_elementwise_affine", True),
            tied=config.flag("tie_word_embeddings", True),
            activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        )


class Opt(Family):
    """OPT, from 125m to 66b; 350m alone has post-norm and a projected embedding."""

    size_keys = (
        "num_hidden_layers",
        "hidden_size",
        "ffn_dim",
        "vocab_size",
        "max_position_embeddings",
        "word_embed_proj_dim",
    )

    def __init__(self, spec: ModelSpec, served_context: int | None = None) -> None:
        super().__init__(spec, served_context)
        self.settings = OptSettings.read(spec.config)

    @classmethod
    def read_sizes(cls, config: ConfigFile, compute_bytes: int) -> ModelSizes:
        hidden_size = config.integer("hidden_size", maximum=MAX_WIDTH)
        num_heads = config.integer("num_attention_heads", maximum=MAX_WIDTH)
        if hidden_size % num_heads:
            raise config.refuse("hidden_size", f"a multiple of num_attention_heads={num_heads}")
        return ModelSizes(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            ffn_size=config.integer("ffn_dim", maximum=MAX_WIDTH),
            vocab_size=config.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
            context_length=config.integer("max_position_embeddings", maximum=MAX_CONTEXT),
            compute_bytes=compute_bytes,
            layers=(),
            fixed_bytes=0,
        )

    def layer_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        prefix, size, ffn = f"model.decoder.layers.{layer}", self.sizes.hidden_size, self.sizes.ffn_size
        qkv = tuple(f"{prefix}.self_attn.{part}_proj" for part in "qkv")
        return (
            *self._norm(ATTENTION_NORM, f"{prefix}.self_attn_layer_norm"),
            *self._linear(QKV, qkv, (size, size, size), size),
            *self._linear(OUT, (f"{prefix}.self_attn.out_proj",), (size,), size),
            *self._norm(FFN_NORM, f"{prefix}.final_layer_norm"),
            *self._linear(FC1, (f"{prefix}.fc1",), (ffn,), size),
            *self._linear(FC2, (f"{prefix}.fc2",), (size,), ffn),
        )

    def fixed_tensors(self) -> tuple[TensorSpec, ...]:
        sizes, settings, prefix = self.sizes, self.settings, "model.decoder"
        hidden, embed = sizes.hidden_size, settings.embed_size
        positions = sizes.context_length + POSITION_OFFSET
        tensors = [
            TensorSpec(EMBED, (sizes.vocab_size, embed), (f"{prefix}.embed_tokens.weight",)),
            TensorSpec(POSITIONS, (positions, hidden), (f"{prefix}.embed_positions.weight",)),
        ]
        if embed != hidden:
            tensors += linear_tensors(PROJECT_IN, (f"{prefix}.project_in",), (hidden,), embed, bias=False)
            tensors += linear_tensors(PROJECT_OUT, (f"{prefix}.project_out",), (embed,), hidden, bias=False)
        if settings.final_norm:
            tensors += self._norm(FINAL_NORM, f"{prefix}.final_layer_norm")
        if not settings.tied:
            tensors += linear_tensors(HEAD, ("lm_head",), (sizes.vocab_size,), embed, bias=False)
        return tuple(tensors)

    def _linear(self, of: Affine, sources: tuple[str, ...], rows: tuple[int, ...], columns: int) -> list[TensorSpec]:
        return linear_tensors(of, sources, rows, columns, bias=self.settings.bias)

    def _norm(self, of: Affine, source: str) -> list[TensorSpec]:
        affine = self.settings.affine
        return norm_tensors(of, source, self.sizes.hidden_size, weight=affine, bias=affine)

    def embed(self, fixed: Weights, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens = functional.embedding(token_ids, fixed[EMBED])
        if self.settings.embed_size != self.sizes.hidden_size:
            tokens = project(fixed, PROJECT_IN, tokens)
        return tokens + functional.embedding(positions + POSITION_OFFSET, fixed[POSITIONS])

    @cached_property
    def activations(self) -> Activations:
        projection = KvProjection(QKV, self.q_size)
        return make_activations(
            self.activation_rows, projection, self.heads.row_size, codes_weight=self.spec.formats.codes_weight
        )

    def project(self, w: Weights, layer: int, hidden: torch.Tensor, rotation: Rotation) -> Projection:
        x = layer_norm(w, ATTENTION_NORM, hidden) if self.settings.pre_norm else hidden
        activation, fused = self.activations.project(w, x)
        return Projection(activation, fused[:, : self.q_size], fused[:, self.q_size :])

    def keys_values(
        self, w: Weights, layer: int, activation: torch.Tensor, rotation: Rotation, out: torch.Tensor
    ) -> None:
        self.activations.keys_values(w, activation, out)

    def finish_layer(self, w: Weights, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = hidden + project(w, OUT, attended)
        if self.settings.pre_norm:
            return hidden + self._mlp(w, layer_norm(w, FFN_NORM, hidden))
        hidden = layer_norm(w, ATTENTION_NORM, hidden)
        return layer_norm(w, FFN_NORM, hidden + self._mlp(w, hidden))

    def _mlp(self, w: Weights, x: torch.Tensor) -> torch.Tensor:
        is_relu = self.settings.activation == "relu"
        inner = project_relu(w, FC1, x) if is_relu else functional.gelu(project(w, FC1, x))
        return project(w, FC2, inner)

    def logits(self, fixed: Weights, hidden: torch.Tensor) -> torch.Tensor:
        if self.settings.final_norm:
            hidden = layer_norm(fixed, FINAL_NORM, hidden)
        if self.settings.embed_size != self.sizes.hidden_size:
            hidden = project(fixed, PROJECT_OUT, hidden)
        head = fixed[EMBED] if self.settings.tied else fixed[HEAD.weight]
        return functional.linear(hidden, head).float()
