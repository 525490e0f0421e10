"""Llama (Touvron et al., arXiv 2307.09288) and Mistral: RMS norm, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from hsrpc.model.bounds import MAX_CONTEXT, MAX_VOCAB_SIZE, MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.family import Family, ModelSpec, Weights
from hsrpc.model.layers import Affine, gate, linear_tensors, norm_tensors, project, project_rows, rms_norm
from hsrpc.model.rope import RopeSettings, make_rotation, rope_frequencies, rotate_
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import LayerSizes, ModelSizes

EMBED = "embed_weight"
ATTENTION_NORM = Affine.named("attention_norm")
FFN_NORM = Affine.named("ffn_norm")
FINAL_NORM = Affine.named("final_norm")
QKV = Affine.named("qkv")
OUT = Affine.named("out")
GATE_UP = Affine.named("gate_up")
DOWN = Affine.named("down")
HEAD = Affine.named("head")


@dataclass(frozen=True)
class LlamaSettings:
    """What Llama models differ in, besides sizes."""

    epsilon: float
    rope: RopeSettings
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    sliding_window: int | None

    @classmethod
    def read(cls, config: ConfigFile) -> LlamaSettings:
        config.choice("hidden_act", ("silu",), "silu")
        return cls(
            epsilon=config.number("rms_norm_eps", 1e-6),
            rope=RopeSettings.read(config),
            attention_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
            tied=config.flag("tie_word_embeddings", False),
            sliding_window=_read_window(config),
        )


class Llama(Family):
    """Llama 1 to 3, Mistral 7B, and models of the same architecture."""

    size_keys = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.settings = LlamaSettings.read(spec.config)
        self._frequencies = rope_frequencies(self.settings.rope, self.sizes.head_dim)

    @staticmethod
    def read_sizes(config: ConfigFile, compute_bytes: int) -> ModelSizes:
        num_heads = config.integer("num_attention_heads", maximum=MAX_WIDTH)
        return ModelSizes(
            hidden_size=config.integer("hidden_size", maximum=MAX_WIDTH),
            num_heads=num_heads,
            num_kv_heads=_read_kv_heads(config, num_heads),
            head_dim=_read_head_dim(config, num_heads),
            ffn_size=config.integer("intermediate_size", maximum=MAX_WIDTH),
            vocab_size=config.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
            context_length=config.integer("max_position_embeddings", maximum=MAX_CONTEXT),
            compute_bytes=compute_bytes,
            layers=(),
            fixed_bytes=0,
        )

    def layer_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        prefix, size, ffn = f"model.layers.{layer}", self.sizes.hidden_size, self.sizes.ffn_size
        qkv = tuple(f"{prefix}.self_attn.{part}_proj" for part in "qkv")
        gate_up = (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")
        attention_bias, mlp_bias = self.settings.attention_bias, self.settings.mlp_bias
        return (
            *norm_tensors(ATTENTION_NORM, f"{prefix}.input_layernorm", size),
            *linear_tensors(QKV, qkv, (self.q_size, self.kv_size, self.kv_size), size, bias=attention_bias),
            *linear_tensors(OUT, (f"{prefix}.self_attn.o_proj",), (size,), self.q_size, bias=attention_bias),
            *norm_tensors(FFN_NORM, f"{prefix}.post_attention_layernorm", size),
            *linear_tensors(GATE_UP, gate_up, (ffn, ffn), size, bias=mlp_bias),
            *linear_tensors(DOWN, (f"{prefix}.mlp.down_proj",), (size,), ffn, bias=mlp_bias),
        )

    def layer_sizes(self, layer: int) -> LayerSizes:
        return replace(super().layer_sizes(layer), sliding_window=self.settings.sliding_window)

    def fixed_tensors(self) -> tuple[TensorSpec, ...]:
        vocab, size = self.sizes.vocab_size, self.sizes.hidden_size
        head = () if self.settings.tied else linear_tensors(HEAD, ("lm_head",), (vocab,), size, bias=False)
        return (
            TensorSpec(EMBED, (vocab, size), ("model.embed_tokens.weight",)),
            *norm_tensors(FINAL_NORM, "model.norm", size),
            *head,
        )

    def embed(self, fixed: Weights, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, fixed[EMBED])

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        if positions.is_cuda:
            return positions  # the kernel computes the angles
        return make_rotation(positions, self._frequencies, self.spec.dtype)

    def attention_input(self, w: Weights, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(w, ATTENTION_NORM, hidden, self.settings.epsilon)

    def queries_keys_values(
        self, w: Weights, x: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fused = project(w, QKV, x)
        self._rotate(fused[:, : self.q_size + self.kv_size], rotation)
        return fused[:, : self.q_size], fused[:, self.q_size :]

    def keys_values(self, w: Weights, x: torch.Tensor, rotation: torch.Tensor, out: torch.Tensor) -> None:
        project_rows(w, QKV, x, self.q_size, out)
        self._rotate(out[:, : self.kv_size], rotation)

    def _rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        count = heads.shape[1] // self.sizes.head_dim
        heads = heads.view(len(heads), count, self.sizes.head_dim)
        if heads.is_cuda:
            from hsrpc.model.kernels.fused import rotate_heads_  # loads Triton

            rotate_heads_(heads, rotation, self._frequencies)
        else:
            rotate_(heads, rotation)

    def finish_layer(self, w: Weights, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = hidden + project(w, OUT, attended)
        return hidden + self._mlp(w, rms_norm(w, FFN_NORM, hidden, self.settings.epsilon))

    def _mlp(self, w: Weights, x: torch.Tensor) -> torch.Tensor:
        return project(w, DOWN, gate(project(w, GATE_UP, x)))

    def logits(self, fixed: Weights, hidden: torch.Tensor) -> torch.Tensor:
        head = fixed[EMBED] if self.settings.tied else fixed[HEAD.weight]
        return functional.linear(rms_norm(fixed, FINAL_NORM, hidden, self.settings.epsilon), head).float()


def _read_kv_heads(config: ConfigFile, num_heads: int) -> int:
    num_kv_heads = config.integer("num_key_value_heads", num_heads, maximum=MAX_WIDTH)
    if num_heads % num_kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    return num_kv_heads


def _read_head_dim(config: ConfigFile, num_heads: int) -> int:
    hidden_size = config.integer("hidden_size", maximum=MAX_WIDTH)
    if not config.has("head_dim") and hidden_size % num_heads:
        raise config.refuse("hidden_size", f"a multiple of num_attention_heads={num_heads}, or a head_dim")
    head_dim = config.integer("head_dim", hidden_size // num_heads, maximum=MAX_WIDTH)
    if num_heads * head_dim > MAX_WIDTH:
        raise config.refuse("head_dim", f"at most {MAX_WIDTH} for num_attention_heads={num_heads} together")
    if head_dim % 2:
        key = "head_dim" if config.has("head_dim") else "hidden_size"
        raise config.refuse(key, f"an even size for each head, where {head_dim} results")
    return head_dim


def _read_window(config: ConfigFile) -> int | None:
    """Only Mistral slides its window; a window no smaller than the context hides nothing."""
    if config.values.get("model_type") != "mistral" or not config.has("sliding_window"):
        return None
    window = config.integer("sliding_window", maximum=MAX_CONTEXT)
    return window if window < config.integer("max_position_embeddings", maximum=MAX_CONTEXT) else None
