"""From config.json to the settings of a decoder: one reader for each `model_type`. A new family is a reader and a line
of the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from hsrpc.model.bounds import MAX_CONTEXT, MAX_LAYERS, MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.experts import Routing
from hsrpc.model.families.expert_readers import (
    deepseek_experts,
    gpt_oss_experts,
    granite_experts,
    in_all_layers,
    latent_experts,
    qwen_experts,
    renormalised_if_said,
)
from hsrpc.model.families.settings import (
    Biases,
    Caps,
    DecoderSettings,
    Heads,
    Latent,
    Multipliers,
    Names,
    NormNames,
    QkNorm,
)
from hsrpc.model.layers import ACTIVATIONS, Activation, Norm, NormKind
from hsrpc.model.rope import RopeKeys, RopeSettings, softmax_factor

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _llama(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("attention_bias", False)
    biases = Biases(qkv=bias, out=bias, mlp=config.flag("mlp_bias", False))
    return replace(_common(config, _rms(config)), biases=biases)


def _mistral(config: ConfigFile) -> DecoderSettings:
    """The window is that of all layers, whatever kinds the file names: Ministral reads those."""
    return replace(_common(config, _rms(config)), windows=_same_windows(config))


def _ministral(config: ConfigFile) -> DecoderSettings:
    kinds = _layer_kinds(config, [_SLIDING] * _num_layers(config))
    return replace(_common(config, _rms(config)), windows=_windows(config, kinds))


def _ministral_3(config: ConfigFile) -> DecoderSettings:
    return _common(config, _rms(config, 1e-5))


def _qwen2(config: ConfigFile) -> DecoderSettings:
    return replace(_common(config, _rms(config)), biases=Biases(qkv=True), windows=_upper_windows(config))


def _qwen3(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("attention_bias", False)
    return replace(
        _common(config, _rms(config), head_dim=128),
        biases=Biases(qkv=bias, out=bias),
        qk_norm=QkNorm.HEAD,
        windows=_upper_windows(config),
    )


def _qwen2_moe(config: ConfigFile) -> DecoderSettings:
    common, windows = _common(config, _rms(config)), config.flag("use_sliding_window", False)
    first = config.count("max_window_layers", 28, maximum=MAX_LAYERS)
    usual = [_SLIDING if layer < first and layer % 2 == 0 else _FULL for layer in range(_num_layers(config))]
    return replace(
        common,
        biases=Biases(qkv=config.flag("qkv_bias", True)),
        windows=_windows(config, _layer_kinds(config, usual)) if windows else common.windows,
        experts=qwen_experts(config, common.activation),
    )


def _qwen3_moe(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("attention_bias", False)
    common = _common(config, _rms(config))
    return replace(
        common,
        biases=Biases(qkv=bias, out=bias),
        qk_norm=QkNorm.HEAD,
        windows=_same_windows(config) if config.flag("use_sliding_window", False) else common.windows,
        experts=qwen_experts(config, common.activation),
    )


def _mixtral(config: ConfigFile) -> DecoderSettings:
    common = _common(config, _rms(config, 1e-5))
    experts = in_all_layers(config, common.activation, Routing(renormalised=True))
    return replace(common, windows=_same_windows(config), experts=experts)


def _olmoe(config: ConfigFile) -> DecoderSettings:
    common, bias = _common(config, _rms(config, 1e-5)), config.flag("attention_bias", False)
    if config.has("clip_qkv"):
        raise config.refuse("clip_qkv", "nothing: queries, keys and values that are clipped are not supported")
    return replace(
        common,
        biases=Biases(qkv=bias, out=bias),
        qk_norm=QkNorm.ROW,
        experts=in_all_layers(config, common.activation, renormalised_if_said(config)),
    )


def _olmo2(config: ConfigFile) -> DecoderSettings:
    norms = NormNames(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
    )
    bias = config.flag("attention_bias", False)
    return replace(
        _common(config, _rms(config, 1e-5)),
        biases=Biases(qkv=bias, out=bias),
        qk_norm=QkNorm.ROW,
        names=Names(norms=norms),
    )


def _olmo3(config: ConfigFile) -> DecoderSettings:
    """Only layers that see all tokens have a scaled rotation."""
    kinds = _layer_kinds(config, _pattern(config, 4))
    keys = {kind: RopeKeys(kind=kind, default_theta=500_000.0) for kind in (_SLIDING, _FULL)}
    keys[_SLIDING] = replace(keys[_SLIDING], scaling=None)
    olmo2 = _olmo2(config)
    return replace(olmo2, windows=_windows(config, kinds, 4096), ropes=_ropes(config, olmo2.heads, kinds, keys))


def _smollm3(config: ConfigFile) -> DecoderSettings:
    """Layers without a rotation are those that slide, where a window is switched on."""
    llama = _common(config, _rms(config), rope=RopeKeys(default_theta=2_000_000.0), tied=True)
    bias, turned = config.flag("attention_bias", False), _turned_layers(config)
    kinds = _layer_kinds(config, [_FULL if turns else _SLIDING for turns in turned])
    return replace(
        llama,
        biases=Biases(qkv=bias, out=bias, mlp=config.flag("mlp_bias", False)),
        windows=_windows(config, kinds if config.flag("use_sliding_window", False) else [_FULL] * len(kinds)),
        ropes=tuple(rope if turns else None for rope, turns in zip(llama.ropes, turned, strict=True)),
    )


def _turned_layers(config: ConfigFile) -> list[bool]:
    """Which layers rotate: as the list of the file says, or all but every nth."""
    layers = range(_num_layers(config))
    if not config.has("no_rope_layers"):
        interval = config.integer("no_rope_layer_interval", 4, maximum=MAX_LAYERS)
        return [(layer + 1) % interval != 0 for layer in layers]
    listed = config.values["no_rope_layers"]
    if not isinstance(listed, list) or len(listed) < len(layers) or not all(each in (0, 1) for each in listed):
        raise config.refuse("no_rope_layers", f"1 or 0 for each of num_hidden_layers={len(layers)}")
    return [bool(listed[layer]) for layer in layers]


def _exaone4(config: ConfigFile) -> DecoderSettings:
    """Where some layers slide, only those rotate."""
    kinds = _layer_kinds(config, _pattern(config, 4))
    windows = _windows(config, kinds, 4096)
    olmo2 = _olmo2(config)
    ropes = olmo2.ropes if config.says_null("sliding_window") else _where_it_slides(olmo2.ropes, windows)
    return replace(olmo2, biases=Biases(), qk_norm=QkNorm.HEAD, windows=windows, ropes=ropes)


def _phi3(config: ConfigFile) -> DecoderSettings:
    keys = RopeKeys(kinds={"yarn": "longrope"})
    names = Names(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",))
    return replace(_common(config, _rms(config, 1e-5), rope=keys), windows=_same_windows(config), names=names)


def _gemma(config: ConfigFile) -> DecoderSettings:
    """Its first files say `gelu` and mean the approximation by tanh, as `hidden_activation` of later ones says."""
    activation = _activation(config, "hidden_activation", "gelu_pytorch_tanh")
    bias = config.flag("attention_bias", False)
    size = config.integer("hidden_size", maximum=MAX_WIDTH)
    if config.flag("use_bidirectional_attention", False):
        raise config.refuse("use_bidirectional_attention", "false: tokens see those before them alone")
    return replace(
        _common(config, _rms(config, kind=NormKind.RMS_FROM_ONE), head_dim=256, tied=True),
        biases=Biases(qkv=bias, out=bias),
        activation=Activation.GELU_TANH if activation is Activation.GELU else activation,
        multipliers=Multipliers(embedding=size**0.5),
    )


def _gemma2(config: ConfigFile) -> DecoderSettings:
    """Every other layer slides; norms before and behind attention and MLP."""
    gemma, kinds = _gemma(config), _layer_kinds(config, _pattern(config, 2))
    return replace(
        gemma,
        activation=_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        multipliers=replace(gemma.multipliers, attention=config.number("query_pre_attn_scalar", 256) ** -0.5),
        caps=Caps(
            scores=_cap(config, "attn_logit_softcapping", 50.0), logits=_cap(config, "final_logit_softcapping", 30.0)
        ),
        windows=_windows(config, kinds, 4096),
        names=Names(
            norms=NormNames(
                attention_out="post_attention_layernorm",
                mlp_in="pre_feedforward_layernorm",
                mlp_out="post_feedforward_layernorm",
            )
        ),
    )


def _gemma3(config: ConfigFile) -> DecoderSettings:
    """Five layers in six slide, and rotate by a base of their own; scores are not capped."""
    kinds = _layer_kinds(config, _pattern(config, 6))
    keys = {
        _FULL: RopeKeys(kind=_FULL, default_theta=1e6),
        _SLIDING: RopeKeys(kind=_SLIDING, scaling=None, theta="rope_local_base_freq"),
    }
    gemma2 = _gemma2(config)
    return replace(
        gemma2,
        qk_norm=QkNorm.HEAD,
        caps=Caps(logits=_cap(config, "final_logit_softcapping", None)),
        windows=_windows(config, kinds, 4096),
        ropes=_ropes(config, gemma2.heads, kinds, keys),
    )


def _cap(config: ConfigFile, key: str, usual: float | None) -> float | None:
    """The cap of that name; null, or a key left out where none is usual: there is none."""
    if config.says_null(key) or (usual is None and not config.has(key)):
        return None
    return config.number(key, usual)


def _granite(config: ConfigFile) -> DecoderSettings:
    multipliers = Multipliers(
        embedding=config.number("embedding_multiplier", 1.0),
        attention=config.number("attention_multiplier", 1.0),
        residual=config.number("residual_multiplier", 1.0),
        logits=1 / config.number("logits_scaling", 1.0),
    )
    return replace(_llama(config), multipliers=multipliers)


def _granite_moe(config: ConfigFile) -> DecoderSettings:
    settings = _granite(config)
    return replace(settings, experts=granite_experts(config, settings.activation))


def _cohere(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("attention_bias", False)
    norm = Norm(NormKind.LAYER, config.number("layer_norm_eps", 1e-5))
    return replace(
        _common(config, norm, rope=RopeKeys(interleaved=True), tied=True),
        biases=Biases(qkv=bias, out=bias),
        parallel=True,
        qk_norm=QkNorm.EACH_HEAD if config.flag("use_qk_norm", False) else QkNorm.NONE,
        multipliers=Multipliers(logits=config.number("logit_scale", 0.0625)),
        names=Names(norms=NormNames(mlp_in=None)),
    )


def _cohere2(config: ConfigFile) -> DecoderSettings:
    """Only layers that slide rotate."""
    windows = _windows(config, _layer_kinds(config, _pattern(config, 4)), 4096)
    cohere = _cohere(config)
    return replace(cohere, qk_norm=QkNorm.NONE, windows=windows, ropes=_where_it_slides(cohere.ropes, windows))


def _starcoder2(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("use_bias", True)
    norm = Norm(NormKind.LAYER, config.number("norm_epsilon", 1e-5), bias=True)
    return replace(
        _common(config, norm, tied=True, activation="gelu_pytorch_tanh"),
        biases=Biases(qkv=bias, out=bias, mlp=bias),
        gated=False,
        windows=_same_windows(config),
        names=Names(mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
    )


def _stablelm(config: ConfigFile) -> DecoderSettings:
    if config.flag("qk_layernorm", False):
        raise config.refuse("qk_layernorm", "false: norms of queries and keys are not supported in this family")
    parallel = config.flag("use_parallel_residual", False)
    norm = Norm(NormKind.LAYER, config.number("layer_norm_eps", 1e-5), bias=True)
    return replace(
        _common(config, norm, rope=RopeKeys(default_fraction=0.25)),
        biases=Biases(qkv=config.flag("use_qkv_bias", False)),
        parallel=parallel,
        names=Names(norms=NormNames(mlp_in=None if parallel else "post_attention_layernorm")),
    )


_NEOX_NAMES = Names(
    layers="gpt_neox.layers",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


def _gpt_neox(config: ConfigFile) -> DecoderSettings:
    bias = config.flag("attention_bias", True)
    norm = Norm(NormKind.LAYER, config.number("layer_norm_eps", 1e-5), bias=True)
    keys = RopeKeys(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25)
    common = _common(config, norm, rope=keys, activation="gelu")
    return replace(
        common,
        heads=replace(common.heads, num_kv_heads=common.heads.num_heads),
        biases=Biases(qkv=bias, out=bias, mlp=True),
        gated=False,
        parallel=config.flag("use_parallel_residual", True),
        names=_NEOX_NAMES,
        qkv_by_head=True,
    )


def _gpt_oss(config: ConfigFile) -> DecoderSettings:
    """Every other layer slides; each head has a sink."""
    kinds, bias = _layer_kinds(config, _pattern(config, 2)), config.flag("attention_bias", True)
    return replace(
        _common(config, _rms(config, 1e-5), rope=RopeKeys(default_theta=150_000.0), head_dim=64),
        biases=Biases(qkv=bias, out=bias),
        windows=_windows(config, kinds, 128),
        sinks=True,
        experts=gpt_oss_experts(config),
    )


def _glm4_moe(config: ConfigFile) -> DecoderSettings:
    common = _common(config, _rms(config, 1e-5), rope=RopeKeys(default_fraction=0.5))
    return replace(
        common,
        biases=Biases(qkv=config.flag("attention_bias", False)),
        qk_norm=QkNorm.HEAD if config.flag("use_qk_norm", False) else QkNorm.NONE,
        experts=deepseek_experts(config, common.activation),
    )


def _deepseek_v2(config: ConfigFile) -> DecoderSettings:
    return _latent(config, interleaved=True)


def _deepseek_v3(config: ConfigFile) -> DecoderSettings:
    return _latent(config, interleaved=config.flag("rope_interleave", True))


def _glm4_moe_lite(config: ConfigFile) -> DecoderSettings:
    return replace(_deepseek_v3(config), norm=_rms(config, 1e-5))


def _latent(config: ConfigFile, *, interleaved: bool) -> DecoderSettings:
    """Keys that all models with latents share. Rotated heads' `head_dim`, where a file has it, is that of the rotation
    alone."""
    num_heads, bias = config.integer("num_attention_heads", maximum=MAX_WIDTH), config.flag("attention_bias", False)
    latent = Latent(
        query_rank=config.integer("q_lora_rank", maximum=MAX_WIDTH) if config.has("q_lora_rank") else None,
        rank=config.integer("kv_lora_rank", maximum=MAX_WIDTH),
        nope_dim=config.integer("qk_nope_head_dim", maximum=MAX_WIDTH),
        rope_dim=config.integer("qk_rope_head_dim", maximum=MAX_WIDTH),
        value_dim=config.integer("v_head_dim", maximum=MAX_WIDTH),
        bias=bias,
    )
    head_dim = latent.nope_dim + latent.rope_dim
    if latent.rope_dim % 2:
        raise config.refuse("qk_rope_head_dim", "an even number of dimensions")
    if latent.value_dim > head_dim:
        raise config.refuse("v_head_dim", f"at most {head_dim}, as many as qk_nope_head_dim and qk_rope_head_dim")
    if num_heads * head_dim > MAX_WIDTH:
        raise config.refuse("qk_nope_head_dim", f"at most {MAX_WIDTH} for num_attention_heads={num_heads} together")
    activation, num_layers = _activation(config, "hidden_act", "silu"), _num_layers(config)
    return DecoderSettings(
        heads=Heads(num_heads, num_heads, head_dim),
        norm=_rms(config),
        windows=(None,) * num_layers,
        ropes=(RopeSettings.read(config, latent.rope_dim, RopeKeys(interleaved=interleaved)),) * num_layers,
        experts=latent_experts(config, activation),
        tied=config.flag("tie_word_embeddings", False),
        activation=activation,
        biases=Biases(out=bias, mlp=config.flag("mlp_bias", False)),
        multipliers=Multipliers(attention=head_dim**-0.5 * softmax_factor(config) ** 2),
        latent=latent,
    )


def _seed_oss(config: ConfigFile) -> DecoderSettings:
    biases = Biases(
        qkv=config.flag("attention_bias", True),
        out=config.flag("attention_out_bias", False),
        mlp=config.flag("mlp_bias", False),
    )
    return replace(_common(config, _rms(config), head_dim=128), biases=biases)


def _common(
    config: ConfigFile,
    norm: Norm,
    *,
    rope: RopeKeys | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    activation: str = "silu",
) -> DecoderSettings:
    """What keys that all families share say; `head_dim`, `tied` and `activation` hold where the file is silent."""
    heads, num_layers = _heads(config, head_dim), _num_layers(config)
    return DecoderSettings(
        heads=heads,
        norm=norm,
        windows=(None,) * num_layers,
        ropes=(RopeSettings.read(config, heads.head_dim, rope or RopeKeys()),) * num_layers,
        experts=(None,) * num_layers,
        tied=config.flag("tie_word_embeddings", tied),
        activation=_activation(config, "hidden_act", activation),
    )


def _rms(config: ConfigFile, epsilon: float = 1e-6, kind: NormKind = NormKind.RMS) -> Norm:
    return Norm(kind, config.number("rms_norm_eps", epsilon))


def _activation(config: ConfigFile, key: str, default: str) -> Activation:
    key = key if config.has(key) else "hidden_act"
    return ACTIVATIONS[config.choice(key, tuple(ACTIVATIONS), default)]


def _num_layers(config: ConfigFile) -> int:
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)


def _heads(config: ConfigFile, default_head_dim: int | None) -> Heads:
    num_heads = config.integer("num_attention_heads", maximum=MAX_WIDTH)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, maximum=MAX_WIDTH)
    if num_heads % num_kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    return Heads(num_heads, num_kv_heads, _head_dim(config, num_heads, default_head_dim))


def _head_dim(config: ConfigFile, num_heads: int, default: int | None) -> int:
    hidden_size = config.integer("hidden_size", maximum=MAX_WIDTH)
    if not config.has("head_dim") and default is None and hidden_size % num_heads:
        raise config.refuse("hidden_size", f"a multiple of num_attention_heads={num_heads}, or a head_dim")
    head_dim = config.integer("head_dim", default or hidden_size // num_heads, maximum=MAX_WIDTH)
    if num_heads * head_dim > MAX_WIDTH:
        raise config.refuse("head_dim", f"at most {MAX_WIDTH} for num_attention_heads={num_heads} together")
    if head_dim % 2:
        key = "head_dim" if config.has("head_dim") else "hidden_size"
        raise config.refuse(key, f"an even size for each head, where {head_dim} results")
    return head_dim


def _same_windows(config: ConfigFile) -> tuple[int | None, ...]:
    """One window for all layers, where there is one."""
    return _windows(config, [_SLIDING] * _num_layers(config))


def _upper_windows(config: ConfigFile) -> tuple[int | None, ...]:
    """Windows from layer `max_window_layers` on, where they are switched on; or as `layer_types` says."""
    if not config.flag("use_sliding_window", False):
        return (None,) * _num_layers(config)
    first = config.count("max_window_layers", 28, maximum=MAX_LAYERS)
    usual = [_SLIDING if layer >= first else _FULL for layer in range(_num_layers(config))]
    return _windows(config, _layer_kinds(config, usual))


def _layer_kinds(config: ConfigFile, usual: list[str]) -> list[str]:
    """The kind of each layer's attention."""
    if not config.has("layer_types"):
        return usual
    kinds = config.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != len(usual) or not set(map(str, kinds)) <= {_SLIDING, _FULL}:
        raise config.refuse("layer_types", f"{_SLIDING} or {_FULL} for each of num_hidden_layers={len(usual)}")
    return kinds


def _pattern(config: ConfigFile, default: int) -> list[str]:
    """Layers that slide but for every nth, as older files say by a number (0: none slides), or by letters: LLLG."""
    key, num_layers = "sliding_window_pattern", _num_layers(config)
    letters = config.values.get(key)
    if isinstance(letters, str) and letters and letters == "L" * (len(letters) - 1) + "G":
        period = len(letters)
    else:
        period = config.count(key, default, maximum=MAX_LAYERS)
    return [_FULL if not period or (layer + 1) % period == 0 else _SLIDING for layer in range(num_layers)]


def _ropes(
    config: ConfigFile, heads: Heads, kinds: list[str], keys: dict[str, RopeKeys]
) -> tuple[RopeSettings | None, ...]:
    """The rotation of each layer, by its kind."""
    read = {kind: RopeSettings.read(config, heads.head_dim, keys[kind]) for kind in dict.fromkeys(kinds)}
    return tuple(read[kind] for kind in kinds)


def _where_it_slides(
    ropes: tuple[RopeSettings | None, ...], windows: tuple[int | None, ...]
) -> tuple[RopeSettings | None, ...]:
    """Those of the layers with a window; the others have none."""
    return tuple(None if window is None else rope for rope, window in zip(ropes, windows, strict=True))


def _windows(config: ConfigFile, kinds: list[str], usual: int | None = None) -> tuple[int | None, ...]:
    """The window of the layers that slide; `usual` where the file is silent, none where it says null."""
    if config.says_null("sliding_window") or (usual is None and not config.has("sliding_window")):
        return (None,) * len(kinds)
    window = config.integer("sliding_window", usual, maximum=MAX_CONTEXT)
    return tuple(window if kind == _SLIDING else None for kind in kinds)


class DecoderType(NamedTuple):
    """A `model_type` of decoders."""

    architecture: str
    """Value of `architectures`."""
    read: Callable[[ConfigFile], DecoderSettings]
    also: tuple[str, ...] = ()
    """Other values of `model_type` for the same."""


DECODERS: dict[str, DecoderType] = {
    "llama": DecoderType("LlamaForCausalLM", _llama),
    "mistral": DecoderType("MistralForCausalLM", _mistral),
    "ministral": DecoderType("MinistralForCausalLM", _ministral),
    "ministral3": DecoderType("Ministral3ForCausalLM", _ministral_3),
    "qwen2": DecoderType("Qwen2ForCausalLM", _qwen2),
    "qwen3": DecoderType("Qwen3ForCausalLM", _qwen3),
    "qwen2_moe": DecoderType("Qwen2MoeForCausalLM", _qwen2_moe),
    "qwen3_moe": DecoderType("Qwen3MoeForCausalLM", _qwen3_moe),
    "mixtral": DecoderType("MixtralForCausalLM", _mixtral),
    "olmoe": DecoderType("OlmoeForCausalLM", _olmoe),
    "olmo2": DecoderType("Olmo2ForCausalLM", _olmo2),
    "olmo3": DecoderType("Olmo3ForCausalLM", _olmo3),
    "smollm3": DecoderType("SmolLM3ForCausalLM", _smollm3),
    "exaone4": DecoderType("Exaone4ForCausalLM", _exaone4),
    "phi3": DecoderType("Phi3ForCausalLM", _phi3),
    "gemma": DecoderType("GemmaForCausalLM", _gemma),
    "gemma2": DecoderType("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": DecoderType("Gemma3ForCausalLM", _gemma3),
    "granite": DecoderType("GraniteForCausalLM", _granite),
    "granitemoe": DecoderType("GraniteMoeForCausalLM", _granite_moe),
    "granitemoeshared": DecoderType("GraniteMoeSharedForCausalLM", _granite_moe),
    "cohere": DecoderType("CohereForCausalLM", _cohere),
    "cohere2": DecoderType("Cohere2ForCausalLM", _cohere2),
    "starcoder2": DecoderType("Starcoder2ForCausalLM", _starcoder2),
    "stablelm": DecoderType("StableLmForCausalLM", _stablelm),
    "gpt_neox": DecoderType("GPTNeoXForCausalLM", _gpt_neox),
    "gpt_oss": DecoderType("GptOssForCausalLM", _gpt_oss),
    "glm4_moe": DecoderType("Glm4MoeForCausalLM", _glm4_moe),
    "seed_oss": DecoderType("SeedOssForCausalLM", _seed_oss),
    "deepseek_v2": DecoderType("DeepseekV2ForCausalLM", _deepseek_v2),
    "deepseek_v3": DecoderType("DeepseekV3ForCausalLM", _deepseek_v3, also=("kimi_k2",)),
    "glm4_moe_lite": DecoderType("Glm4MoeLiteForCausalLM", _glm4_moe_lite),
}
"""The families that `Decoder` computes, by `model_type`."""
LATENTS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite"})
"""Those of them whose settings have a `latent`."""
