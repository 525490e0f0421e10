"""Numbers that no model has, wherever hsrpc reads one: refused by name, before anything is made of them."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hsrpc.errors import CheckpointError
from hsrpc.model import config_file
from hsrpc.model.bounds import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, MAX_MODEL_BYTES
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family, ModelSpec
from hsrpc.model.safetensors_file import SafetensorsFile
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import load_spec, named_spec
from hsrpc.model.tensor import TensorSpec

T = TypeVar("T")
MAX_PEAK = 64 * 1024**2
"""Bytes that describing a model may take, whatever its files say."""
LLAMA = SHAPES["llama-3-8b"] | {
    "head_dim": 128,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    },
}
CONFIGS: dict[str, dict[str, object]] = {
    "opt": SHAPES["opt-350m"],
    "llama": LLAMA,
    "mistral": SHAPES["mistral-7b"],
    "gemma3": SHAPES["gemma-3-12b"],
    "qwen3_moe": SHAPES["qwen3-30b-a3b"] | {"num_experts": 8},
}
PLACES = [
    (name, path)
    for name, config in CONFIGS.items()
    for key, value in config.items()
    for path in ([(key, inner) for inner in value] if isinstance(value, dict) else [(key,)])
    if isinstance(value, dict | int)
]
"""Each integer of each file, by the keys on the way to it."""
SPECIAL: list[object] = [0, -1, 10**9, 2**31 - 1, 2**31, 2**63, 10**4000, -(10**4000), True, 0.5, "7", None, [], {}]
VALUES = st.sampled_from(SPECIAL) | st.integers() | st.integers(1, 2**40) | st.floats(allow_nan=True)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def changed(config: dict[str, object], path: tuple[str, ...], value: object) -> dict[str, object]:
    key, *rest = path
    inner = config[key]
    return config | {key: changed(inner, tuple(rest), value) if rest and isinstance(inner, dict) else value}


def write(directory: Path, config: dict[str, object]) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(config))
    return file


def measured(call: Callable[[], T]) -> tuple[int, T | CheckpointError]:
    """Bytes of Python's that `call` had allocated at once, and what it gave, or its refusal."""
    tracemalloc.start()
    try:
        found: T | CheckpointError = call()
    except CheckpointError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, found


def as_checkpoint(file: Path) -> ModelSpec:
    return load_spec(file.parent, None)


def as_random(file: Path) -> ModelSpec:
    return named_spec(str(file), None)


@quick
@given(place=st.sampled_from(PLACES), value=VALUES)
@example(place=("llama", ("num_hidden_layers",)), value=10**9)
@example(place=("opt", ("num_hidden_layers",)), value=MAX_LAYERS)
@example(place=("llama", ("rms_norm_eps",)), value=10**4000)
@example(place=("llama", ("rope_scaling", "original_max_position_embeddings")), value=2**70)
@example(place=("llama", ("head_dim",)), value=2**40)
@example(place=("qwen3_moe", ("num_experts",)), value=400)
@example(place=("qwen3_moe", ("num_experts",)), value=MAX_EXPERTS)
@example(place=("qwen3_moe", ("num_experts_per_tok",)), value=2**40)
@pytest.mark.parametrize("load", [as_checkpoint, as_random])
def test_any_number_of_a_configuration_is_served_or_refused_by_its_key(tmp_path, load, place, value):
    """Whatever stands in a number's place: a model within the bounds, or an error that names file and key."""
    name, path = place
    file = write(tmp_path, changed(CONFIGS[name], path, value))

    peak, found = measured(lambda: load(file).sizes)
    assert peak < MAX_PEAK
    if isinstance(found, CheckpointError):
        assert str(file) in str(found)
        assert path[-1] in str(found)
        assert len(str(found)) < 1000 + len(str(file))
    else:
        assert 1 <= found.num_layers <= MAX_LAYERS
        assert found.context_length <= MAX_CONTEXT
        assert found.model_bytes <= MAX_MODEL_BYTES


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_beyond_any_model_are_refused_with_the_bound(tmp_path, name, key):
    """The key, what was found, and how much there may be."""
    write(tmp_path, CONFIGS[name] | {key: 10**12})
    words = rf"config\.json: {key}: expected a whole number from 1 to \d+, found 10+; correct"
    with pytest.raises(CheckpointError, match=words):
        load_spec(tmp_path, None)


def test_sizes_that_are_absurd_together_are_refused_with_all_keys(tmp_path):
    """Each below its bound, and a thousand times what any machine holds."""
    write(tmp_path, SHAPES["opt-125m"] | {"hidden_size": 12 * 2**16, "ffn_dim": 2**20, "num_hidden_layers": 4096})
    words = r"num_hidden_layers=4096, hidden_size=786432, ffn_dim=1048576, .*at most \d+ bytes, found \d+ bytes;"
    with pytest.raises(CheckpointError, match=words):
        load_spec(tmp_path, None)


def test_heads_that_are_absurd_together_are_refused(tmp_path):
    """The queries of all heads are one row."""
    write(tmp_path, LLAMA | {"head_dim": 2**18})
    with pytest.raises(CheckpointError, match="head_dim: expected at most 1048576 for num_attention_heads=32"):
        load_spec(tmp_path, None)


def test_a_number_with_too_many_digits_is_refused(tmp_path):
    """Python reads no integer of more than 4300 digits."""
    (tmp_path / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON, found Exceeds the limit"):
        load_spec(tmp_path, None)


def test_a_long_value_is_shown_in_part(tmp_path):
    """An error is a line that people can read, whatever the file holds."""
    write(tmp_path, SHAPES["opt-125m"] | {"hidden_size": [0] * 100_000})
    with pytest.raises(CheckpointError, match=r"hidden_size: .*found \[0, 0, .*\.\.\.; correct") as caught:
        load_spec(tmp_path, None)
    assert len(str(caught.value)) < 1000


def test_a_file_far_too_large_is_not_read_whole(tmp_path, monkeypatch):
    """Its size is enough to refuse it."""
    monkeypatch.setattr(config_file, "MAX_JSON_BYTES", 1000)
    file = write(tmp_path, SHAPES["opt-125m"])
    file.write_text(file.read_text() + " " * 1_000_000)

    peak, refusal = measured(lambda: load_spec(tmp_path, None))
    assert "config.json: expected at most 1000 bytes of JSON, found 1000" in str(refusal)
    assert peak < 500_000


HEADER: dict[str, object] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
}
HEADER_PLACES = [
    (name, field, position)
    for name, sizes in (("a", 2), ("b", 1))
    for field, count in (("shape", sizes), ("data_offsets", 2))
    for position in range(count)
]
"""Each integer of the header: tensor, field, and place in its list."""


def write_weights(directory: Path, header: dict[str, object], length: int | None = None) -> Path:
    """A safetensors file with 32 bytes of data; `length` is the one it claims of its header."""
    text = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 32)
    return file


@quick
@given(place=st.sampled_from(HEADER_PLACES), value=VALUES)
@example(place=("a", "shape", 0), value=10**4000)
@example(place=("b", "data_offsets", 1), value=int("9" * 4300))
def test_any_number_of_a_header_is_read_or_refused_by_its_tensor(tmp_path, place, value):
    """Whatever stands in a number's place: tensors that fill the file, or an error that names file and tensor.

    What is left over behind all tensors is no tensor's: then the file's own size is named.
    """
    name, field, position = place
    header = json.loads(json.dumps(HEADER))
    header[name][field][position] = value
    file = write_weights(tmp_path, header)
    peak, found = measured(lambda: SafetensorsFile(file).entries)
    assert peak < 100_000
    if isinstance(found, CheckpointError):
        assert str(file) in str(found)
        assert any(words in str(found) for words in ("a: expected", "b: expected", "expected a file of"))
        assert len(str(found)) < 1000 + len(str(file))
    else:
        assert all(8 < entry.start <= entry.end <= file.stat().st_size for entry in found.values())


@quick
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 300))
def test_any_length_of_a_header_is_read_or_refused(tmp_path, length):
    """The length that a file claims of its header is held against its size before anything is read."""
    file = write_weights(tmp_path, HEADER, length)
    peak, found = measured(lambda: SafetensorsFile(file).entries)
    assert peak < 100_000
    assert isinstance(found, CheckpointError) or length == len(json.dumps(HEADER))


def test_a_shape_of_very_many_sizes_is_refused(tmp_path):
    """Their product alone would take minutes."""
    sizes = [2**62] * 200_000
    file = write_weights(tmp_path, HEADER | {"c": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 0]}})
    with pytest.raises(CheckpointError, match="c: expected a shape of at most 64 sizes, found 200000 sizes"):
        SafetensorsFile(file)


@pytest.mark.parametrize("value", [10**12, -1, 0, "7", None])
def test_the_total_of_an_index_is_not_relied_on(tmp_path, value):
    """Its integer decides nothing: what is read comes from the shards' headers."""
    write_weights(tmp_path, HEADER).rename(tmp_path / "one.safetensors")
    index = {"metadata": {"total_size": value}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    Checkpoint(tmp_path).check([TensorSpec("a", (2, 3), ("a",))])


SMALL_OPT = SHAPES["opt-125m"] | {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_attention_heads": 2}


def write_model(directory: Path, layers: set[int], claimed: int) -> Family:
    """A checkpoint with those layers, under a configuration that claims so many."""
    write(directory, SMALL_OPT | {"num_hidden_layers": claimed, "vocab_size": 8})
    family = create_family(load_spec(directory, None))
    tensors = [*family.fixed_tensors(), *(each for layer in layers for each in family.layer_tensors(layer))]
    shapes = {name: shape for each in tensors for name, shape in zip(each.sources, each.source_shapes, strict=True)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return family


def test_fewer_layers_than_the_configuration_says_are_refused_with_both_numbers(tmp_path):
    """A configuration of another model, or weights that ended early."""
    family = write_model(tmp_path, {0, 1, 2}, 12)
    words = r"config\.json: num_hidden_layers: expected 3, since .* the first 3 layers alone, found 12; use the config"
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path).check_model(family)


def test_a_layer_that_is_missing_is_named(tmp_path):
    """One hole in the middle, or several."""
    family = write_model(tmp_path, {0, 1, 2, 3, 4, 6}, 7)
    with pytest.raises(CheckpointError, match=r"expected weights of 7 layers, .*found 6 layers, without layer 5; use"):
        Checkpoint(tmp_path).check_model(family)
    family = write_model(tmp_path, {0, 3}, 5)
    with pytest.raises(CheckpointError, match="found 2 layers, without layer 1 and 2 others; use"):
        Checkpoint(tmp_path).check_model(family)


def test_layers_that_are_all_there_are_taken(tmp_path):
    """No more than that is asked of them here."""
    family = write_model(tmp_path, {0, 1}, 2)
    Checkpoint(tmp_path).check_model(family)
