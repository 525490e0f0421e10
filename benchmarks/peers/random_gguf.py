"""A GGUF file of a gpt-oss shape with random weights: experts in mxfp4, other matrices in Q8_0, as it is published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from hsrpc.model.shapes import SHAPES

_Array = npt.NDArray[Any]
_GROUP = 32
"""Values that share a scale, in both formats."""
_MXFP4_SCALE = 120
"""Exponent 2**-7: products with it keep about the size of their inputs, as those with trained weights do."""
_Q8_SCALE = 2.5e-4
_DEVIATION = 0.02
_F32, _Q8_0, _MXFP4 = (
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.MXFP4,
)


class _Tensor(NamedTuple):
    """One tensor of the file: its dimensions, the slowest first, and its format."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType


def write_random_gguf(model: str, file: Path) -> None:
    """Write a model without a tokenizer. All tensors of one shape and format have the same values.

    Raises:
        ValueError: the shape is not one of gpt-oss.
    """
    shape = SHAPES[model]
    if shape["model_type"] != "gpt_oss":
        raise ValueError(f"{model}: only shapes of gpt-oss can be written as GGUF; give gpt-oss-20b or gpt-oss-120b")
    write_gguf(shape, file)


def write_gguf(shape: dict[str, Any], file: Path) -> None:
    """Write a model of the shape that a config.json of gpt-oss describes."""
    tensors = list(_tensors(shape))
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    _add_settings(writer, shape)
    for tensor in tensors:
        row = tensor.shape[-1]
        size, num_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        count = int(np.prod(tensor.shape)) // size * num_bytes
        stored = (*tensor.shape[:-1], row // size * num_bytes)
        is_plain = tensor.kind is _F32
        writer.add_tensor_info(
            tensor.name,
            tensor.shape if is_plain else stored,
            np.dtype(np.float32 if is_plain else np.uint8),
            count,
            raw_dtype=None if is_plain else tensor.kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng, known = np.random.default_rng(0), dict[tuple[tuple[int, ...], int], _Array]()
    for tensor in tensors:
        key = tensor.shape, int(tensor.kind)
        if key not in known:
            known[key] = _values(tensor, rng)
        writer.write_tensor_data(known[key])
    writer.close()


def _add_settings(writer: gguf.GGUFWriter, shape: dict[str, Any]) -> None:
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_expert_feed_forward_length(shape["intermediate_size"])
    writer.add_expert_count(shape["num_local_experts"])
    writer.add_expert_used_count(shape["num_experts_per_tok"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_sliding_window(shape["sliding_window"])
    writer.add_rope_freq_base(shape["rope_theta"])
    scaling = shape["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(shape: dict[str, Any]) -> Iterator[_Tensor]:
    hidden, ffn, experts = shape["hidden_size"], shape["intermediate_size"], shape["num_local_experts"]
    query, kv = (shape["head_dim"] * shape[name] for name in ("num_attention_heads", "num_key_value_heads"))
    yield _Tensor("token_embd.weight", (shape["vocab_size"], hidden), _Q8_0)
    for layer in range(shape["num_hidden_layers"]):
        start = f"blk.{layer}."
        yield _Tensor(start + "attn_norm.weight", (hidden,), _F32)
        yield _Tensor(start + "post_attention_norm.weight", (hidden,), _F32)
        yield _Tensor(start + "attn_sinks.weight", (shape["num_attention_heads"],), _F32)
        for name, rows, columns in (
            ("attn_q", query, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, query),
        ):
            yield _Tensor(f"{start}{name}.weight", (rows, columns), _Q8_0)
            yield _Tensor(f"{start}{name}.bias", (rows,), _F32)
        yield _Tensor(start + "ffn_gate_inp.weight", (experts, hidden), _F32)
        yield _Tensor(start + "ffn_gate_inp.bias", (experts,), _F32)
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            yield _Tensor(f"{start}ffn_{name}_exps.weight", (experts, rows, columns), _MXFP4)
            yield _Tensor(f"{start}ffn_{name}_exps.bias", (experts, rows), _F32)
    yield _Tensor("output_norm.weight", (hidden,), _F32)
    yield _Tensor("output.weight", (shape["vocab_size"], hidden), _Q8_0)


def _values(tensor: _Tensor, rng: np.random.Generator) -> _Array:
    """Random codes with one scale for all, or a normal distribution; norms about 1."""
    if tensor.kind is _F32:
        return rng.normal(float("norm" in tensor.name), _DEVIATION, tensor.shape).astype(np.float32)
    size, num_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    num_groups = int(np.prod(tensor.shape)) // size
    codes = np.frombuffer(rng.bytes(num_groups * num_bytes), np.uint8).reshape(num_groups, num_bytes).copy()
    if tensor.kind is _MXFP4:
        codes[:, 0] = _MXFP4_SCALE
    else:
        codes[:, :2] = np.frombuffer(np.float16(_Q8_SCALE).tobytes(), np.uint8)
    return codes.reshape(*tensor.shape[:-1], -1)
