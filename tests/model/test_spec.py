"""Reading config.json: what is understood, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hsrpc.errors import CheckpointError, ModelNotFoundError
from hsrpc.model.families.registry import create_family
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import load_spec, named_spec

PARAMETERS = {
    "opt-125m": 125e6,
    "opt-350m": 331e6,
    "opt-1.3b": 1.316e9,
    "opt-2.7b": 2.652e9,
    "opt-6.7b": 6.658e9,
    "opt-13b": 12.85e9,
    "opt-30b": 29.97e9,
    "opt-66b": 65.72e9,
    "llama-2-7b": 6.738e9,
    "llama-2-13b": 13.016e9,
    "llama-3-8b": 8.030e9,
    "llama-3.1-8b": 8.030e9,
    "llama-3.3-70b": 70.55e9,
    "mistral-7b": 7.242e9,
    "mistral-small-24b": 23.57e9,
    "qwen2.5-7b": 7.616e9,
    "qwen2.5-72b": 72.71e9,
    "qwen3-0.6b": 0.596e9,
    "qwen3-8b": 8.191e9,
    "qwen3-14b": 14.77e9,
    "qwen3-32b": 32.76e9,
    "qwen3-30b-a3b": 30.53e9,
    "qwen3-235b-a22b": 235.09e9,
    "mixtral-8x7b": 46.70e9,
    "mixtral-8x22b": 140.63e9,
    "olmoe": 6.919e9,
    "olmo-2-7b": 7.299e9,
    "olmo-2-13b": 13.72e9,
    "olmo-3-7b": 7.298e9,
    "smollm3-3b": 3.075e9,
    "phi-3-mini": 3.821e9,
    "phi-4": 14.66e9,
    "gemma-2b": 2.506e9,
    "gemma-7b": 8.538e9,
    "gemma-2-9b": 9.242e9,
    "gemma-3-12b": 11.77e9,
    "gemma-3-27b": 27.01e9,
    "gpt-oss-20b": 20.91e9,
    "gpt-oss-120b": 116.83e9,
    "glm-4.5-air": 106.85e9,
    "granite-3.3-8b": 8.171e9,
    "command-r": 34.98e9,
    "command-r7b": 8.028e9,
    "starcoder2-15b": 15.96e9,
    "stablelm-3b": 2.795e9,
    "pythia-12b": 11.85e9,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "glm-4.7-flash": 29_943_390_976,
}


def write_config(directory: Path, shape: str, changes: dict[str, object] | None = None) -> Path:
    """Writes the shape's config.json with changes; a change to None removes the key."""
    config = SHAPES[shape] | (changes or {})
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_published_parameter_counts(name):
    """A shape's packed tensors add up to the model's parameter count."""
    sizes = named_spec(name, torch.float16).sizes
    assert sizes.model_bytes / 2 == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_unknown_shape_lists_the_known_ones():
    """An unknown name says which names there are."""
    with pytest.raises(ModelNotFoundError, match=r"'opt-1t' is not a known shape.*opt-30b.*config\.json"):
        named_spec("opt-1t", None)


@pytest.mark.parametrize("shape", ["opt-350m", "llama-3-8b", "mistral-7b"])
def test_a_shape_may_be_a_configuration_file(tmp_path, shape):
    """The file or its directory, of any supported family: sizes as the file says, called after the directory."""
    directory = tmp_path / "my-model"
    directory.mkdir()
    write_config(directory, shape)
    known = named_spec(shape, torch.float16)
    for path in (directory, directory / "config.json"):
        found = named_spec(str(path), torch.float16)
        assert (found.name, found.family, found.sizes) == ("my-model", known.family, known.sizes)


def test_a_configuration_file_of_another_name_names_the_model(tmp_path):
    """wide.json is the model `wide`."""
    write_config(tmp_path, "opt-125m").joinpath("config.json").rename(tmp_path / "wide.json")
    assert named_spec(str(tmp_path / "wide.json"), None).name == "wide"


def test_a_wrong_configuration_file_is_refused_by_name(tmp_path):
    """A path that is not there, and a model that is not supported."""
    with pytest.raises(CheckpointError, match=r"none\.json: expected a readable file, found No such file"):
        named_spec(str(tmp_path / "none.json"), None)
    write_config(tmp_path, "opt-125m", {"architectures": ["BertModel"]})
    with pytest.raises(CheckpointError, match=r"config\.json: architectures: expected.*OPTForCausalLM"):
        named_spec(str(tmp_path / "config.json"), None)


def test_spec_states_sizes_and_tokens(tmp_path):
    """Sizes, special tokens and the directory's own name come out of config.json."""
    (tmp_path / "small").mkdir()
    spec = load_spec(write_config(tmp_path / "small", "llama-3-8b"), torch.float32)
    assert (spec.name, spec.family, spec.vocab_size) == ("small", "llama", 128256)
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((128001,), 128000, None)
    sizes = spec.sizes
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.ffn_size) == (32, 8, 128, 14336)
    assert (sizes.context_length, sizes.sliding_window, sizes.activation_ratio) == (8192, None, 0.5)


def test_layer_sizes_are_those_of_the_declared_tensors():
    """Each layer's tensors, and the bytes of the fixed ones, are what the family declares."""
    spec = named_spec("opt-350m", None)
    family = create_family(spec)
    found = {tensor.name: tensor.num_elements for tensor in spec.sizes.layers[5].tensors}
    assert found == {tensor.name: tensor.numel for tensor in family.layer_tensors(5)}
    assert found["qkv_weight"] == 3 * 1024 * 1024
    assert spec.sizes.fixed_bytes == 2 * sum(tensor.numel for tensor in family.fixed_tensors())
    assert spec.sizes.distinct == ((spec.sizes.layers[0], 24),)


@pytest.mark.parametrize(("served", "compute_bytes"), [(torch.float32, 4), (torch.bfloat16, 2), (None, 2)])
def test_bytes_follow_the_served_type(tmp_path, served, compute_bytes):
    """Sizes count bytes of the type asked for; None serves the checkpoint's own."""
    spec = load_spec(write_config(tmp_path, "opt-125m"), served)
    assert spec.sizes.compute_bytes == compute_bytes
    assert spec.sizes.layers[0].activation.num_bytes == 768 * compute_bytes
    assert spec.dtype == (served or torch.float16)
    assert spec.checkpoint_dtype == torch.float16


def test_checkpoint_type_is_read_under_both_names(tmp_path):
    """`dtype` of newer files counts like `torch_dtype` of older ones."""
    spec = load_spec(write_config(tmp_path, "opt-125m", {"torch_dtype": None, "dtype": "bfloat16"}), None)
    assert spec.dtype == torch.bfloat16


def test_undeclared_checkpoint_type_is_float32(tmp_path):
    """A file that declares no type means float32, as in transformers."""
    assert load_spec(write_config(tmp_path, "opt-125m", {"torch_dtype": None}), None).dtype == torch.float32


def test_end_tokens_of_both_files_count(tmp_path):
    """End tokens of generation_config.json join those of config.json, each once."""
    write_config(tmp_path, "llama-3-8b", {"eos_token_id": [128001, 128008]})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    assert load_spec(tmp_path, None).eos_token_ids == (128001, 128008, 128009)


def test_pad_token_outside_the_vocabulary_is_none(tmp_path):
    """The -1 that some files carry is no token."""
    assert load_spec(write_config(tmp_path, "llama-2-7b", {"pad_token_id": -1}), None).pad_token_id is None


def test_model_type_stands_in_for_a_missing_architecture(tmp_path):
    """A file that names no architecture is told by its model_type."""
    assert load_spec(write_config(tmp_path, "mistral-7b", {"architectures": None}), None).family == "mistral"


@pytest.mark.parametrize(("window", "expected"), [(4096, 4096), (32768, None), (None, None)])
def test_window_counts_only_where_it_hides_something(tmp_path, window, expected):
    """A window as long as the context is none."""
    spec = load_spec(write_config(tmp_path, "mistral-7b", {"sliding_window": window}), None)
    assert spec.sizes.sliding_window == expected


def test_llama_ignores_a_window(tmp_path):
    """Only Mistral slides its window, as in transformers."""
    assert load_spec(write_config(tmp_path, "llama-2-7b", {"sliding_window": 16}), None).sizes.sliding_window is None


def test_name_of_a_hub_snapshot_is_the_models(tmp_path):
    """A directory of the hub's cache is called after the model, not after the commit."""
    directory = tmp_path / "models--org--tiny-llama" / "snapshots" / "0123abcd"
    directory.mkdir(parents=True)
    assert load_spec(write_config(directory, "opt-125m"), None).name == "tiny-llama"


REFUSALS = [
    ("opt-125m", {"architectures": ["BertModel"]}, "architectures", "OPTForCausalLM, LlamaForCausalLM"),
    ("opt-125m", {"architectures": ["OPTForCausalLM", "Other"]}, "architectures", "OPTForCausalLM"),
    ("opt-125m", {"architectures": None, "model_type": "bert"}, "model_type", "opt, llama, mistral"),
    ("opt-125m", {"architectures": None, "model_type": None}, "model_type", "found nothing"),
    ("opt-125m", {"hidden_size": None}, "hidden_size", "found nothing"),
    ("opt-125m", {"hidden_size": "768"}, "hidden_size", "'768'"),
    ("opt-125m", {"num_hidden_layers": 0}, "num_hidden_layers", "from 1 to 4096, found 0"),
    ("opt-125m", {"num_hidden_layers": True}, "num_hidden_layers", "True"),
    ("opt-125m", {"num_attention_heads": 7}, "hidden_size", "a multiple of num_attention_heads=7, found 768"),
    ("opt-125m", {"activation_function": "swish"}, "activation_function", "relu, gelu, found 'swish'"),
    ("opt-125m", {"enable_bias": "yes"}, "enable_bias", "true or false, found 'yes'"),
    ("opt-125m", {"torch_dtype": "int8"}, "torch_dtype", "float32, float16, bfloat16, float64, found 'int8'"),
    ("opt-125m", {"eos_token_id": 50272}, "eos_token_id", "below vocab_size=50272, found 50272"),
    ("opt-125m", {"quantization_config": {"bits": 4}}, "quantization_config: quant_method", "unquantized"),
    *(
        ("opt-125m", {"quantization_config": {"quant_method": name}}, "quantization_config: quant_method", repr(name))
        for name in ("bitsandbytes", "exl3", "hqq", "quark")
    ),
    (
        "llama-2-7b",
        {"hidden_act": "xielu"},
        "hidden_act",
        "one of silu, swish, gelu",
    ),
    ("llama-2-7b", {"num_attention_heads": 31}, "hidden_size", "a multiple of num_attention_heads=31"),
    ("llama-2-7b", {"num_key_value_heads": 5}, "num_key_value_heads", "a divisor of num_attention_heads=32"),
    ("llama-2-7b", {"head_dim": 127}, "head_dim", "an even size"),
    ("llama-2-7b", {"rms_norm_eps": -1}, "rms_norm_eps", "a positive number, found -1"),
    ("llama-2-7b", {"rope_scaling": {"type": "mrope"}}, "rope_scaling: type", "longrope, su, found 'mrope'"),
    ("llama-2-7b", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor", "a positive number, found nothing"),
    ("llama-2-7b", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: factor", "found nothing"),
    ("llama-2-7b", {"rope_parameters": [1]}, "rope_parameters", "an object"),
    ("opt-125m", {"architectures": ["JambaForCausalLM"], "model_type": "jamba"}, "architectures", "are recurrent"),
    (
        "llama-2-7b",
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "high_freq_factor",
        "more than low_freq_factor",
    ),
]


@pytest.mark.parametrize(("shape", "changes", "key", "words"), REFUSALS)
def test_refusal_names_file_key_and_values(tmp_path, shape, changes, key, words):
    """What cannot be served is refused with the file, the key, and what was expected and found."""
    with pytest.raises(CheckpointError) as caught:
        load_spec(write_config(tmp_path, shape, changes), None)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert f"{key}: expected" in message
    assert words in message


def test_unserved_types_of_end_tokens_are_refused_in_either_file(tmp_path):
    """A wrong end token in generation_config.json is refused there."""
    write_config(tmp_path, "opt-125m")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: expected a token id"):
        load_spec(tmp_path, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "found No such file"), (b"{", "expected JSON"), (b"\xff", "expected JSON"), (b"[]", "found list")],
)
def test_unreadable_configuration_is_refused(tmp_path, content, words):
    """A missing file, broken JSON, broken text and a JSON list are each refused by name."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{words}"):
        load_spec(tmp_path, None)


def test_empty_quantization_is_none(tmp_path):
    """Some exports leave the key behind, without a value or empty."""
    for index, empty in enumerate(({}, None)):
        directory = tmp_path / str(index)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(SHAPES["opt-125m"] | {"quantization_config": empty}))
        assert load_spec(directory, None).family == "opt"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read_over(tmp_path, encoding):
    """Files that went through another system's editor, in any encoding of JSON."""
    for name, values in (("config.json", SHAPES["opt-125m"]), ("generation_config.json", {"eos_token_id": [2, 7]})):
        (tmp_path / name).write_text(json.dumps(values), encoding=encoding)
    assert load_spec(tmp_path, None).eos_token_ids == (2, 7)


def test_a_list_of_begin_tokens_is_read(tmp_path):
    """The first of them is the one."""
    assert load_spec(write_config(tmp_path, "opt-125m", {"bos_token_id": [5, 6]}), None).bos_token_id == 5


def test_float64_is_served_as_float32(tmp_path):
    """Weights are converted while they are loaded."""
    assert load_spec(write_config(tmp_path, "opt-125m", {"torch_dtype": "float64"}), None).dtype == torch.float32
