"""From config.json to the mixtures of experts of a decoder's layers."""

from __future__ import annotations

from dataclasses import replace

from hsrpc.model.bounds import MAX_ALL_EXPERTS, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.experts import ExpertNames, Experts, Groups, Routing, Scoring, Shared
from hsrpc.model.layers import ClampedGate, Gate

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys that a file may have for the number of a layer's experts: one of a family's own, or the one that all share."""
_OWN_WIDTH = "moe_intermediate_size"
_DENSE, _SPARSE = "dense", "sparse"

ByLayer = tuple[Experts | None, ...]
"""The experts of each layer; None: its MLP is dense."""


def experts_of(config: ConfigFile, gate: Gate, routing: Routing, *, width: str = "intermediate_size") -> Experts:
    """A layer's experts; `width` is the key of theirs."""
    key = next(filter(config.has, NUM_EXPERTS), NUM_EXPERTS[0])
    count, layers = config.integer(key, maximum=MAX_EXPERTS), _num_layers(config)
    if count * layers > MAX_ALL_EXPERTS:
        keys, expected = ("num_hidden_layers", key), f"at most {MAX_ALL_EXPERTS} experts in all layers"
        raise config.refuse_all(keys, expected, str(count * layers))
    k = config.integer("num_experts_per_tok", maximum=MAX_EXPERTS)
    if k > count:
        raise config.refuse("num_experts_per_tok", f"at most {key}={count}")
    size = config.integer(width, maximum=MAX_WIDTH)
    if k * size > MAX_WIDTH:
        raise config.refuse(width, f"at most {MAX_WIDTH // k}, since num_experts_per_tok={k} work together")
    return Experts(count=count, k=k, width=size, gate=gate, routing=routing)


def qwen_experts(config: ConfigFile, gate: Gate) -> ByLayer:
    """Qwen: experts in every so many layers, except those that the file names."""
    experts = experts_of(config, gate, renormalised_if_said(config), width=_OWN_WIDTH)
    if config.has("shared_expert_intermediate_size"):
        shared = Shared.gated_mlp("mlp.shared_expert", _shared_width(config, "shared_expert_intermediate_size"))
        experts = replace(experts, shared=replace(shared, gate="mlp.shared_expert_gate"))
    layers, step = _num_layers(config), config.integer("decoder_sparse_step", 1, maximum=MAX_LAYERS)
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise config.refuse("mlp_only_layers", "a list of layers")
    return tuple(None if layer in dense or (layer + 1) % step else experts for layer in range(layers))


def in_all_layers(config: ConfigFile, gate: Gate, routing: Routing) -> ByLayer:
    """Mixtral, OLMoE: the same in each layer."""
    return (experts_of(config, gate, routing),) * _num_layers(config)


def granite_experts(config: ConfigFile, gate: Gate) -> ByLayer:
    """Granite: in each layer, with a shared expert whose gate and up are one tensor where the file has a width."""
    experts = experts_of(config, gate, Routing(scoring=Scoring.CHOSEN_SOFTMAX))
    shared = None
    if config.count("shared_intermediate_size", 0, maximum=MAX_WIDTH):
        width = _shared_width(config, "shared_intermediate_size")
        shared = Shared(width, ("shared_mlp.input_linear",), "shared_mlp.output_linear")
    return (replace(experts, names=ExpertNames(router="mlp.router"), shared=shared),) * _num_layers(config)


def deepseek_experts(config: ConfigFile, gate: Gate) -> ByLayer:
    """DeepSeek, Kimi, GLM: behind some dense layers, chosen from groups, with shared experts as one."""
    experts = experts_of(config, gate, Routing(), width=_OWN_WIDTH)
    experts = replace(experts, routing=_deepseek_routing(config, experts))
    if num_shared := config.count("n_shared_experts", 0, maximum=MAX_WIDTH // experts.width):
        experts = replace(experts, shared=Shared.gated_mlp("mlp.shared_experts", num_shared * experts.width))
    first, layers = config.count("first_k_dense_replace", 0, maximum=MAX_LAYERS), _num_layers(config)
    return tuple(None if layer < first else experts for layer in range(layers))


def latent_experts(config: ConfigFile, gate: Gate) -> ByLayer:
    """As `deepseek_experts`, or in the layers that `mlp_layer_types` says; none where all layers are dense."""
    layers = _num_layers(config)
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        first = config.count("first_k_dense_replace", 0, maximum=MAX_LAYERS)
        return (None,) * layers if first >= layers else deepseek_experts(config, gate)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {_DENSE, _SPARSE}:
        raise config.refuse("mlp_layer_types", f"{_DENSE} or {_SPARSE} for each of num_hidden_layers={layers}")
    if _SPARSE not in kinds:
        return (None,) * layers
    experts = deepseek_experts(replace(config, values={**config.values, "first_k_dense_replace": 0}), gate)
    return tuple(each if kind == _SPARSE else None for each, kind in zip(experts, kinds, strict=True))


def _deepseek_routing(config: ConfigFile, experts: Experts) -> Routing:
    """Version 2 takes a softmax, and the best expert of a group; the others sigmoids, and the best two."""
    scale = config.number("routed_scaling_factor", 1.0)
    if config.values.get("model_type") == "deepseek_v2":
        limited = config.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
        return Routing(groups=_groups(config, experts, 1) if limited else None, scale=scale, in_float32=True)
    return Routing(
        scoring=Scoring.SIGMOID,
        groups=_groups(config, experts, 2),
        renormalised=config.flag("norm_topk_prob", True),
        scale=scale,
        corrected=True,
        in_float32=True,
    )


def _groups(config: ConfigFile, experts: Experts, summed: int) -> Groups | None:
    """Groups whose scores are of the best `summed` experts; None where all are chosen from."""
    count = config.integer("n_group", 1, maximum=experts.count)
    chosen = config.integer("topk_group", 1, maximum=count)
    size = experts.count // count
    if count == chosen:
        return None
    if experts.count % count or size < summed or chosen * size < experts.k:
        least = max(summed, -(-experts.k // chosen))
        raise config.refuse("n_group", f"a divisor of {experts.count} experts, with {least} of them or more in a group")
    return Groups(count, chosen, summed)


def gpt_oss_experts(config: ConfigFile) -> ByLayer:
    """gpt-oss: biases everywhere, weights stacked and transposed."""
    gate = ClampedGate(config.number("swiglu_limit", 7.0), config.number("swiglu_alpha", 1.702))
    experts = experts_of(config, gate, Routing(scoring=Scoring.CHOSEN_SOFTMAX, bias=True))
    names = ExpertNames(router="mlp.router", transposed=True)
    return (replace(experts, bias=True, names=names),) * _num_layers(config)


def renormalised_if_said(config: ConfigFile) -> Routing:
    """A softmax over all experts, where `norm_topk_prob` may ask for weights that sum to one."""
    return Routing(renormalised=config.flag("norm_topk_prob", False))


def _shared_width(config: ConfigFile, key: str) -> int:
    return config.integer(key, maximum=MAX_WIDTH)


def _num_layers(config: ConfigFile) -> int:
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)
