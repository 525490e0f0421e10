"""Weights in each type of GGUF: values as the package `gguf` decodes and transformers reads them; and codes kept."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hsrpc.config import DType
from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.spec import load_spec
from tests.model.gguf.test_architectures import CASES, EXPERT_KEYS, WINDOW, WINDOW_KEYS, logits, make_model
from tests.model.gguf.writer import Choose, add_key, common_keys, finish, random_blocks, tensors, write_gguf

NOT_DECODED = (Type.F64, Type.I8, Type.I16, Type.I32, Type.I64, Type.Q8_1, Type.Q8_K)
DECODED = [kind for kind in Type if kind not in NOT_DECODED and kind.name != "Q1_0"]
"""Types that `gguf` decodes."""
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 256, "num_key_value_heads": 1}
"""Blocks have up to 256 columns, which only the MLP's output has."""


def write_types(path: Path, kinds: list[Type]) -> dict[str, np.ndarray]:
    """A Llama whose layers have the MLP's output in one of the types each, of random blocks; returns what they mean."""
    model = make_model("llama", NARROW | {"num_hidden_layers": len(kinds)})
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in common_keys(model).items():
        add_key(writer, key, value, "llama")
    expected = {}
    for name, tensor in tensors(model, "llama"):
        layer = name.split(".")[1]
        if not name.endswith("ffn_down.weight"):
            writer.add_tensor(name, tensor.numpy())
            continue
        kind = kinds[int(layer)]
        blocks = random_blocks(*tensor.shape, kind)
        if kind in DECODED:
            expected[f"model.layers.{layer}.mlp.down_proj.weight"] = gguf.dequantize(blocks, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    finish(writer)
    return expected


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_every_type_is_decoded(tmp_path, dtype):
    """As the package does it, and rounded once."""
    expected = write_types(tmp_path / "a.gguf", DECODED)
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=dtype, progress=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(expected) == len(DECODED) > 25
    for name, values in expected.items():
        rounded = torch.from_numpy(values).to(found[name].dtype)
        np.testing.assert_array_equal(found[name].float().numpy(), rounded.float().numpy(), err_msg=name)


def test_a_type_that_cannot_be_decoded_is_told(tmp_path):
    """By tensor and type, with another to fetch."""
    write_types(tmp_path / "a.gguf", [Type.F16, Type.Q8_K])
    told = r"a\.gguf: blk\.1\.ffn_down\.weight: expected a type that the package gguf [\d.]+ decodes, found Q8_K; fetch"
    with pytest.raises(CheckpointError, match=told):
        convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", progress=False)


def matrices(kind: Type) -> Choose:
    """All matrices in that type, but the embedding and the head."""

    def choose(name: str, tensor: torch.Tensor) -> Type:
        return kind if tensor.dim() > 1 and name.startswith("blk.") and name.endswith(".weight") else Type.F32

    return choose


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Type.F32, torch.float32),
        (Type.F16, torch.float16),
        (Type.BF16, torch.bfloat16),
        (Type.Q8_0, torch.bfloat16),
    ],
)
def test_the_type_is_what_most_weights_suit(tmp_path, kind, dtype):
    """All tensors are written in it, and config.json says so."""
    write_gguf(tmp_path / "a.gguf", make_model("llama", {}), "llama", {}, choose=matrices(kind))
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", progress=False)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_value_that_is_too_large_is_told(tmp_path):
    """Where float16 cannot have it, with the type that can; nothing is left behind."""
    model = make_model("llama", {})
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    write_gguf(tmp_path / "a.gguf", model, "llama", {})
    told = r"blk\.1\.ffn_up\.weight: expected at most 6\.55e\+04, the largest float16, found 1e\+06; .*--dtype bfloat16"
    with pytest.raises(CheckpointError, match=told):
        convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=DType.FLOAT16, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=DType.BFLOAT16, progress=False)


QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
READ_BY_TRANSFORMERS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 128}, {}),
    "qwen3moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True},
        EXPERT_KEYS,
    ),
    "phi3": ("phi3", {"sliding_window": None}, {"tokenizer.ggml.padding_token_id": 1}),
    "gemma2": (
        "gemma2",
        WINDOW | {"head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 1},
        WINDOW_KEYS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "stablelm": (
        "stablelm",
        {"hidden_size": 64, "use_qkv_bias": True, "rope_parameters": QUARTER},
        {"rope.dimension_count": 4},
    ),
}
"""Models that it reads from a file, by architecture; keys that it does not read have its usual values."""


@pytest.mark.parametrize("architecture", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_from_the_file(tmp_path, architecture):
    """Logits to the bit, of quantised weights."""
    kind, settings, keys = READ_BY_TRANSFORMERS[architecture]
    write_gguf(tmp_path / "a.gguf", make_model(kind, settings), architecture, keys, choose=matrices(Type.Q5_0))
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=DType.FLOAT32, progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_0, 4), (Type.Q5_0, 8), (Type.Q8_0, 8), (Type.IQ4_NL, 8)])
def test_codes_are_kept(tmp_path, kind, bits):
    """What compressed-tensors makes of them is what the package decodes, to the bit; other types become values."""
    expected = write_types(tmp_path / "a.gguf", [kind, Type.Q4_1])
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", keep_quantized=True, dtype=DType.FLOAT32, progress=False)
    found, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.0.mlp.down_proj"
    state = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(name)}
    assert {key: (list(value.shape), value.dtype) for key, value in state.items()} == {
        "weight_packed": ([16, 8 * bits], torch.int32),
        "weight_scale": ([16, 8], torch.float16),
        "weight_shape": ([2], torch.int64),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    assert group["targets"] == [name]
    assert "model.layers.1.mlp.down_proj" in config["ignore"]
    scheme = QuantizationScheme(targets=group["targets"], weights=QuantizationArgs(**group["weights"]))
    state["weight_scale"] = state["weight_scale"].float()  # as hsrpc multiplies
    decoded = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(decoded, torch.from_numpy(expected[f"{name}.weight"]))
    other = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[other], torch.from_numpy(expected[other]))


def test_kept_codes_follow_the_rows(tmp_path):
    """Those of queries and keys get their order, experts are parted, and layers that differ are told apart."""
    architecture, kind, settings, keys = CASES["mixtral"]
    model = make_model(kind, settings)

    def choose(name: str, tensor: torch.Tensor) -> Type:
        kinds = {"attn_q": Type.Q8_0, "attn_k": Type.Q4_0, "ffn_up_exps": Type.Q8_0}
        kinds |= {"ffn_down_exps": Type.Q4_0} if name.startswith("blk.1.") else {}
        return kinds.get(name.split(".")[-2], Type.F32) if name.endswith(".weight") else Type.F32

    write_gguf(tmp_path / "a.gguf", model, architecture, keys, choose=choose)
    for name, keep in (("kept", True), ("values", False)):
        convert_checkpoint(
            tmp_path / "a.gguf", tmp_path / name, keep_quantized=keep, dtype=DType.FLOAT32, progress=False
        )
    values = load_file(tmp_path / "values" / "model.safetensors")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    config = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    for module in {name.removesuffix("_packed") for name in kept if name.endswith("_packed")}:
        packed, scales = kept.pop(f"{module}_packed"), kept.pop(f"{module}_scale")
        shape = kept.pop(f"{module}_shape")
        bits = 32 * packed.shape[1] // shape[1]
        codes = unpack_from_int32(packed, int(bits), shape).float().view(shape[0], -1, 32)
        assert torch.equal((codes * scales.float()[:, :, None]).view(*shape), values.pop(module)), module
    assert all(torch.equal(kept[name], tensor) for name, tensor in values.items())
    assert {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()} == {
        4: [
            r"re:model\.layers\.\d+\.self_attn\.k_proj$",
            *(f"model.layers.1.block_sparse_moe.experts.{expert}.w2" for expert in range(4)),
        ],
        8: [
            r"re:model\.layers\.\d+\.self_attn\.q_proj$",
            r"re:model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w3$",
        ],
    }
    assert r"re:model\.layers\.\d+\.self_attn\.v_proj$" in config["ignore"]
    assert "lm_head" in config["ignore"]


def test_mxfp4_experts_are_kept_as_published(tmp_path):
    """transformers reads the same from blocks as from values."""
    architecture, kind, settings, keys = CASES["gpt-oss"]
    model = make_model(kind, settings)

    def choose(name: str, tensor: torch.Tensor) -> Type:
        return Type.MXFP4 if name.endswith("exps.weight") else Type.F32

    write_gguf(tmp_path / "a.gguf", model, architecture, keys, choose=choose)
    models = []
    for keep in (True, False):
        out = tmp_path / f"out-{keep}"
        convert_checkpoint(tmp_path / "a.gguf", out, keep_quantized=keep, dtype=DType.FLOAT32, progress=False)
        models.append(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    assert torch.equal(*map(logits, models))
    blocks = load_file(tmp_path / "out-True" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert (list(blocks.shape), blocks.dtype) == ([4, 64, 1, 16], torch.uint8)


def read_by_hsrpc(directory: Path) -> dict[str, torch.Tensor]:
    """All weights as hsrpc computes with them."""
    family = create_family(load_spec(directory, torch.float32))
    checkpoint, found = Checkpoint(directory, read_quantization(family.spec.config)), {}
    for tensor in family.all_tensors():
        found[":".join(tensor.sources)] = torch.empty(tensor.shape)
        checkpoint.read(tensor, found[":".join(tensor.sources)])
    return found


def by_part(**kinds: Type) -> Choose:
    """Matrices of layers in the type of the part of the name that they have."""

    def choose(name: str, tensor: torch.Tensor) -> Type:
        is_matrix = tensor.dim() > 1 and name.endswith(".weight")
        return next((kind for part, kind in kinds.items() if is_matrix and f".{part}" in name), Type.F32)

    return choose


@pytest.mark.parametrize(
    ("name", "choose", "layout"),
    [
        ("llama", by_part(ffn=Type.Q4_0, attn=Type.Q8_0), "pack-quantized"),
        ("qwen3-moe", by_part(ffn_gate_inp=Type.F32, ffn=Type.MXFP4, attn=Type.Q8_0), "mixed-precision"),
        ("qwen3", by_part(ffn=Type.MXFP4, attn=Type.MXFP4), "mxfp4-pack-quantized"),
        ("gpt-oss", by_part(ffn_gate_inp=Type.F32, ffn=Type.MXFP4, attn=Type.Q8_0), None),
    ],
)
def test_hsrpc_reads_the_same_from_codes(tmp_path, name, choose, layout):
    """As from values, of dense layers and of experts, each or stacked; these alone in a checkpoint of MXFP4."""
    architecture, model_type, settings, keys = CASES[name]
    model = make_model(model_type, settings | {"moe_intermediate_size": 32})
    write_gguf(tmp_path / "a.gguf", model, architecture, keys, choose=choose)
    for keep in (True, False):
        out = tmp_path / f"out-{keep}"
        convert_checkpoint(tmp_path / "a.gguf", out, keep_quantized=keep, dtype=DType.FLOAT32, progress=False)
    sizes = [(tmp_path / f"out-{keep}" / "model.safetensors").stat().st_size for keep in (True, False)]
    assert 2 * sizes[0] < sizes[1]
    kept, values = (read_by_hsrpc(tmp_path / f"out-{keep}") for keep in (True, False))
    assert all(torch.equal(kept[tensor], values[tensor]) for tensor in kept | values)
    config = json.loads((tmp_path / "out-True" / "config.json").read_text())["quantization_config"]
    assert config.get("format") == layout
    assert config["quant_method"] == ("mxfp4" if layout is None else "compressed-tensors")


def test_where_nothing_can_be_kept_it_is_said(tmp_path, caplog):
    """The conversion goes on, to values."""
    write_gguf(tmp_path / "a.gguf", make_model("llama", {}), "llama", {}, choose=matrices(Type.Q4_1))
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", keep_quantized=True, progress=False)
    assert "nothing to keep of F32, Q4_1: all weights become values" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
