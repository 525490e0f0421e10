"""Writes transformers' models as llama.cpp's conversion does: its names, orders of rows, and stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

NEIGHBOURS = ("llama", "mistral3", "granite", "granitemoe", "smollm3")
"""Architectures whose rotation pairs neighbours in llama.cpp."""
_NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}

Choose = Callable[[str, torch.Tensor], Type]
"""The type in which a tensor of that GGUF name is written."""


def plain(name: str, tensor: torch.Tensor) -> Type:
    return Type.F32


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    keys: Mapping[str, object],
    *,
    choose: Choose = plain,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes `model` to `path`, with those `keys` beside the common ones, and `extra` tensors by GGUF names."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (common_keys(model) | dict(keys)).items():
        add_key(writer, key, value, architecture)
    for name, tensor in (*tensors(model, architecture), *(extra or {}).items()):
        add_tensor(writer, name, tensor, choose(name, tensor))
    finish(writer)


_PLAIN = ("general.", "tokenizer.", "split.")
"""Beginnings of keys that do not begin with the architecture."""


def add_key(writer: gguf.GGUFWriter, key: str, value: object, architecture: str) -> None:
    key = key if key.startswith(_PLAIN) else f"{architecture}.{key}"
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        kinds[type(value)](key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: Type) -> None:
    data = gguf.quantize(tensor.float().contiguous().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def common_keys(model: PreTrainedModel) -> dict[str, object]:
    config = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_eps", getattr(config, "norm_epsilon", None)),
        "attention.key_length": getattr(config, "head_dim", None),
        "rope.freq_base": float(rope["rope_theta"]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key: value for key, value in keys.items() if value is not None}


def tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(_NUMBERS[architecture], model.config.num_hidden_layers)
    tied = bool(model.config.tie_word_embeddings)
    for source, tensor in model.state_dict().items():
        if tied and source == "lm_head.weight":
            continue
        for part, values in _parts(source, tensor, model, architecture):
            key = part.replace("_correction_bias", "_correction.bias").replace("sinks", "sinks.weight")
            key = key.replace("block_sparse_moe.router", "mlp.router")
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            yield name, values


def _parts(
    name: str, tensor: torch.Tensor, model: PreTrainedModel, architecture: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a tensor becomes."""
    config = model.config
    if ("gate_up_proj" in name and "experts" in name) or "input_linear" in name:
        base, kind = _experts(name)
        alternates, bias = architecture == "gpt-oss", name.endswith("_bias")
        if alternates and not bias:
            tensor = tensor.transpose(-1, -2)
        dim = tensor.dim() - (1 if bias else 2)
        width = tensor.shape[dim] // 2
        indices = torch.arange(2 * width)
        halves = (indices[::2], indices[1::2]) if alternates else (indices[:width], indices[width:])
        for half, index in zip(("gate_proj", "up_proj"), halves, strict=True):
            yield f"{base}.{half}.{kind}", tensor.index_select(dim, index)
    elif ("experts.down_proj" in name and "shared" not in name) or "output_linear" in name:
        base, kind = _experts(name)
        turned = architecture == "gpt-oss" and kind == "weight"
        yield f"{base}.down_proj.{kind}", tensor.transpose(-1, -2) if turned else tensor
    elif "kv_b_proj" in name:
        heads = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        yield name.replace("kv_b", "k_b"), keys.transpose(1, 2)
        yield name.replace("kv_b", "v_b"), values
    elif name.endswith("norm.weight") and architecture.startswith("gemma"):
        yield name, tensor + 1
    elif "query_key_value" in name:
        yield name, tensor.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    elif architecture in NEIGHBOURS and any(part in name for part in ("q_proj", "k_proj")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        yield name, tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    else:
        yield name, tensor


def _experts(name: str) -> tuple[str, str]:
    """The beginning of what the experts' tensors are called, and whether this is a weight or a bias."""
    layer = ".".join(name.split(".")[:3])
    base = f"{layer}.mlp.shared_experts" if "shared" in name else f"{layer}.mlp.experts"
    return base, "bias" if name.endswith("_bias") else "weight"


def random_blocks(rows: int, columns: int, kind: Type, seed: int = 0) -> np.ndarray:
    """Rows of blocks with random bits, whose values are finite, since scales are small."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * columns // size, num_bytes), dtype=np.uint8)
    for start in SCALES.get(kind, ()):
        scales = np.random.default_rng(seed + 1).uniform(0.01, 0.1, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == Type.MXFP4:
        blocks[:, 0] = 120 + blocks[:, 0] % 8
    return blocks.reshape(rows, -1)


SCALES = {
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.IQ4_NL, Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS), (0,)),
    **dict.fromkeys((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_S), (0,)),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
    Type.TQ1_0: (52,),
    Type.TQ2_0: (64,),
}
"""Where in a block of a type its float16 scales begin."""
