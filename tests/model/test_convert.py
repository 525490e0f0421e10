"""Converting PyTorch checkpoints: the same tensors, nothing overwritten, no code run."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from hsrpc.errors import CheckpointError, ConfigError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import load_spec


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny OPT model as one pytorch_model.bin, with tokenizer files."""
    directory = tmp_path / "source"
    directory.mkdir()
    config = OPTConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, max_position_embeddings=8
    )
    config.word_embed_proj_dim = 8
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(directory)
    torch.save(OPTForCausalLM(config).state_dict(), directory / "pytorch_model.bin")
    (directory / "merges.txt").write_text("a b")
    (directory / "run.py").write_text("raise SystemExit")
    return directory


def split(source: Path) -> dict[str, torch.Tensor]:
    """Turns the checkpoint into two files with an index."""
    file = source / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    file.unlink()
    parts = {"pytorch_model-00001.bin": list(state)[:7], "pytorch_model-00002.bin": list(state)[7:]}
    for part, names in parts.items():
        torch.save({name: state[name] for name in names}, source / part)
    weight_map = {name: part for part, names in parts.items() for name in names}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


def assert_same_weights(directory: Path, state: dict[str, torch.Tensor]) -> None:
    family = create_family(load_spec(directory, torch.float32))
    checkpoint = Checkpoint(directory)
    for tensor in family.all_tensors():
        out = torch.empty(tensor.shape)
        checkpoint.read(tensor, out)
        assert torch.equal(out, torch.cat([state[name] for name in tensor.sources]))


def test_converted_model_has_the_same_weights_and_files(source, tmp_path):
    """Weights, configuration and tokenizer arrive; code and pickles stay behind."""
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_weights(tmp_path / "out", state)
    (tmp_path / "new").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "merges.txt"}


def test_tied_tensors_are_written_each(source, tmp_path):
    """A head that shares the embedding's memory is stored in its own right."""
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    convert_checkpoint(source, tmp_path / "out", progress=False)
    file = Checkpoint(tmp_path / "out")
    out = torch.empty(32, 8)
    family = create_family(load_spec(tmp_path / "out", torch.float32))
    file.read(family.fixed_tensors()[0], out)
    assert torch.equal(out, state["lm_head.weight"])


def test_sharded_source_and_small_shards(source, tmp_path):
    """Several files in, several files out, tied by an index."""
    state = split(source)
    convert_checkpoint(source, tmp_path / "out", progress=False, max_shard_bytes=2000)
    assert_same_weights(tmp_path / "out", state)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)
    assert len(set(index["weight_map"].values())) > 2
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()


def test_shards_without_an_index_are_converted(source, tmp_path):
    """Numbered files say how many there are; one that is missing is named."""
    state = split(source)
    (source / "pytorch_model.bin.index.json").unlink()
    for number in (1, 2):
        (source / f"pytorch_model-0000{number}.bin").rename(source / f"pytorch_model-0000{number}-of-00002.bin")
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_weights(tmp_path / "out", state)
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"expected pytorch_model-00001-of-00002\.bin beside pytorch_model-00002"):
        convert_checkpoint(source, tmp_path / "again", progress=False)


def test_files_of_the_old_format_are_read(source, tmp_path):
    """Files older than PyTorch's zip format, which cannot be mapped, convert too."""
    file = source / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_weights(tmp_path / "out", state)


def test_strided_tensors_are_written_contiguous(source, tmp_path):
    """A transposed view comes out with its own values in order."""
    file = source / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    name = "model.decoder.layers.0.fc1.weight"
    state[name] = state[name].T.contiguous().T
    torch.save(state, file)
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_weights(tmp_path / "out", state)


def test_training_state_beside_the_weights_is_ignored(source, tmp_path):
    """Optimizer and arguments of a training run are not taken for weights."""
    (source / "pytorch_model.bin").rename(source / "weights.pt")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (source / name).write_bytes(b"not weights")
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_destination_with_files_is_never_touched(source, tmp_path):
    """A directory that is not empty is refused and left as it was; an empty one is used."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty directory"):
        convert_checkpoint(source, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    convert_checkpoint(source, out, progress=False)
    assert (out / "model.safetensors").exists()


class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(source, tmp_path, zipped):
    """A pickle that would call a function is refused, and nothing is left behind."""
    payload = {"model.a": Payload(f"touch {tmp_path / 'ran'}")}
    torch.save(payload, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected tensors alone, found code or damage"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps([1, 2], protocol=2), "expected"),
        (b"", "expected a PyTorch file"),
        (b"PK\x03\x04 and no more", "expected"),
    ],
)
def test_broken_files_are_refused(source, tmp_path, content, words):
    """Empty, cut and foreign files are refused by name."""
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: {words}"):
        convert_checkpoint(source, tmp_path / "out", progress=False)


def test_truncated_file_is_refused(source, tmp_path):
    """A file cut in the middle is refused, wherever the cut is."""
    file = source / "pytorch_model.bin"
    content = file.read_bytes()
    for part in (0.1, 0.5, 0.99):
        file.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected"):
            convert_checkpoint(source, tmp_path / "out", progress=False)


def test_damage_inside_a_file_is_refused(source, tmp_path):
    """A storage that the pickle names and the file lacks is damage like any other."""
    file = source / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    storage_key = re.search(rb"\d{6,}", content)
    assert storage_key is not None
    file.write_bytes(content[: storage_key.start()] + b"!" + content[storage_key.start() + 1 :])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a PyTorch file, found"):
        convert_checkpoint(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([torch.ones(1)], "expected a dictionary, found list"),
        ({"step": 3}, "step: expected a dense tensor, found int"),
        ({"model": {"a": torch.ones(1)}}, "model: expected a dense tensor, found dict"),
        ({"a": torch.ones(2).to_sparse()}, "a: expected a dense tensor, found torch.sparse_coo"),
    ],
)
def test_other_contents_are_refused(source, tmp_path, state, words):
    """A training checkpoint is not a state dict."""
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(source, tmp_path / "out", progress=False)


def test_incomplete_model_is_refused_before_it_appears(source, tmp_path):
    """A model that lacks a tensor never arrives; what is wrong is said of the source, not of what was being made."""
    file = source / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    bias = state.pop("model.decoder.layers.1.fc2.bias")
    torch.save(state, file)
    expected = rf"^{re.escape(str(source))}: expected tensor model\.decoder\.layers\.1\.fc2\.bias"
    with pytest.raises(CheckpointError, match=expected):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    torch.save(state | {"model.decoder.layers.1.fc2.bias": bias[:3]}, file)
    expected = rf"^{re.escape(str(source))}: model\.decoder\.layers\.1\.fc2\.bias: expected shape"
    with pytest.raises(CheckpointError, match=expected):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_source_without_or_with_too_many_weights_is_refused(source, tmp_path):
    """None, or several without an index: the refusal lists them."""
    (source / "pytorch_model.bin").rename(source / "a.pt")
    (source / "b.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found a\.pt, b\.pth; leave one"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    (source / "a.pt").unlink()
    (source / "b.pth").unlink()
    with pytest.raises(CheckpointError, match="found none"):
        convert_checkpoint(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["../other.bin", "absent.bin", 5])
def test_index_with_wrong_files_is_refused(source, tmp_path, name):
    """An index of pickles can neither reach elsewhere nor name what is not there."""
    (tmp_path / "other.bin").write_bytes(b"")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.a": name}}))
    with pytest.raises(CheckpointError, match=r"weight_map: model\.a: expected a file of the same directory"):
        convert_checkpoint(source, tmp_path / "out", progress=False)


def test_index_without_a_map_is_refused(source, tmp_path):
    """An index must say where tensors are."""
    (source / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        convert_checkpoint(source, tmp_path / "out", progress=False)


def test_progress_is_shown_on_demand(source, tmp_path, capsys):
    """The bar counts to the end, and stays silent when told to."""
    convert_checkpoint(source, tmp_path / "loud")
    assert "convert: 100%" in capsys.readouterr().err
    convert_checkpoint(source, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
