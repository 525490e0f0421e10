"""GGUF files as they come: in shards, cut, damaged, of other models; each refused by name, with what helps."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hsrpc.config import DType
from hsrpc.errors import CheckpointError, ConfigError
from hsrpc.model.convert import convert_checkpoint
from tests.model.gguf.test_architectures import CASES, make_model
from tests.model.gguf.writer import add_key, common_keys, finish, tensors, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, make_model("llama", {}), "llama", {})
    return path


def write_changed(path: Path, change: Callable[[dict[str, object], dict[str, torch.Tensor]], None]) -> None:
    """The same Llama with other keys or tensors."""
    model = make_model("llama", {})
    keys, content = common_keys(model), dict(tensors(model, "llama"))
    change(keys, content)
    write_tensors(path, "llama", keys, content)


def write_tensors(
    path: Path, architecture: str, keys: Mapping[str, object], content: Mapping[str, torch.Tensor]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_key(writer, key, value, architecture)
    for name, tensor in content.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)


def split(file: Path, directory: Path, count: int = 3) -> list[Path]:
    """The file as shards, as llama.cpp's tool makes them: the metadata in the first."""
    reader = gguf.GGUFReader(file)
    paths = [directory / f"tiny-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in {
            "split.no": number,
            "split.count": count,
            "split.tensors.count": len(reader.tensors),
        }.items():
            (writer.add_int32 if "tensors" in key else writer.add_uint16)(key, value)
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                add_key(writer, key.removeprefix("llama."), field.contents(), "llama")
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data)
        finish(writer)
    return paths


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_are_one_file(tmp_path, file):
    """Whichever of them is given, or the directory that they are in; small shards of safetensors have an index."""
    convert_checkpoint(file, tmp_path / "whole", progress=False)
    shards = split(file, tmp_path)
    for name, given_path in (("first", shards[0]), ("last", shards[2]), ("all", tmp_path)):
        convert_checkpoint(given_path, tmp_path / name, progress=False, max_shard_bytes=8000)
        assert_same(weights(tmp_path / name), weights(tmp_path / "whole"))
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 2
        shutil.rmtree(tmp_path / name)
    shards[1].unlink()
    told = r"expected tiny-00002-of-00003\.gguf beside tiny-00001-of-00003\.gguf, found none; fetch the missing file"
    with pytest.raises(CheckpointError, match=told):
        convert_checkpoint(shards[0], tmp_path / "out", progress=False)


def test_a_tensor_in_two_shards_is_told(tmp_path, file):
    """And so are shards of which one was made anew with fewer tensors."""
    shards = split(file, tmp_path)
    shutil.copy(shards[1], shards[2])
    with pytest.raises(
        CheckpointError, match=r"00003\.gguf: .*: expected each tensor in one shard, found it in .*-00002"
    ):
        convert_checkpoint(shards[0], tmp_path / "out", progress=False)
    writer = gguf.GGUFWriter(shards[2], "llama")
    finish(writer)
    with pytest.raises(CheckpointError, match=r"00001-of-00003\.gguf: expected 21 tensors, found 14; fetch all shards"):
        convert_checkpoint(shards[0], tmp_path / "out", progress=False)


@given(share=st.floats(0.001, 0.999))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_file_is_told(tmp_path, file, share):
    """Wherever it is cut; nothing is left behind."""
    content = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: expected a whole GGUF file, found .*; fetch the file again"):
        convert_checkpoint(tmp_path / "cut.gguf", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_told_or_read(tmp_path, file, data):
    """A byte of metadata that changed ends in no error but one that is meant for users."""
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(8, 2000))
    content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.gguf").write_bytes(content)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with contextlib.suppress(CheckpointError):
        convert_checkpoint(tmp_path / "bad.gguf", tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda keys, content: keys.update({"general.architecture": "rwkv7"}),
            r"general\.architecture: expected one of llama, .*deepseek2, found 'rwkv7'; convert a model of",
        ),
        (
            lambda keys, content: keys.pop("embedding_length"),
            r"tiny\.gguf: hidden_size: expected a whole number from 1 to \d+, found nothing",
        ),
        (
            lambda keys, content: keys.update({"block_count": 0}),
            r"tiny\.gguf: llama\.block_count: expected a whole number from 1 to \d+, found 0",
        ),
        (
            lambda keys, content: keys.update({"nextn_predict_layers": 2}),
            r"llama\.block_count: expected more than nextn_predict_layers=2, found 2",
        ),
        (
            lambda keys, content: keys.update({"attention.head_count_kv": [2, 4]}),
            r"num_key_value_heads: expected a whole number .*, found \[2, 4\]",
        ),
        (
            lambda keys, content: content.pop("blk.1.ffn_up.weight"),
            r"tiny\.gguf: expected tensor blk\.1\.ffn_up\.weight, found none; fetch the file again",
        ),
        (
            lambda keys, content: content.pop("token_embd.weight"),
            r"tiny\.gguf: expected tensor token_embd\.weight, found none",
        ),
        (
            lambda keys, content: content.update({"blk.0.attn_k.weight": torch.ones(32, 16)}),
            r"blk\.0\.attn_k\.weight: expected shape \[16, 32\], as the file's metadata says, found \[32, 16\]",
        ),
        (
            lambda keys, content: content.update({"blk.0.attn_gate.weight": torch.ones(8, 32)}),
            r"blk\.0\.attn_gate\.weight: expected a tensor that llama has a place for, found one of shape",
        ),
        (
            lambda keys, content: content.update({"blk.0.attn_q.bias": torch.ones(32)}),
            r"tiny\.gguf: expected tensor blk\.0\.attn_k\.bias, found none",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, change, told):
    """Keys and tensors, each by its name."""
    write_changed(tmp_path / "tiny.gguf", change)
    with pytest.raises(CheckpointError, match=told):
        convert_checkpoint(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_directory_has_one_model(tmp_path, file):
    """Its only file, whatever else is there; of two, each is named; pickled weights go first."""
    (tmp_path / "in").mkdir()
    shutil.copy(file, tmp_path / "in" / "a.gguf")
    (tmp_path / "in" / "README.md").touch()
    convert_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").exists()
    shutil.copy(file, tmp_path / "in" / "b.gguf")
    told = r"in: expected one GGUF file, or the shards of one, found a\.gguf, b\.gguf; give the file itself"
    with pytest.raises(CheckpointError, match=told):
        convert_checkpoint(tmp_path / "in", tmp_path / "again", progress=False)
    (tmp_path / "in" / "b.gguf").unlink()
    (tmp_path / "in" / "pytorch_model.bin").touch()
    (tmp_path / "in" / "config.json").write_text((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a PyTorch file"):
        convert_checkpoint(tmp_path / "in", tmp_path / "again", progress=False)
    for option in ({"dtype": DType.FLOAT16}, {"keep_quantized": True}):
        with pytest.raises(ConfigError, match=rf"{next(iter(option))}=.*: pickled weights"):
            convert_checkpoint(tmp_path / "in", tmp_path / "again", **option)


def joined(content: dict[str, torch.Tensor], parts: tuple[str, ...], whole: str, dim: int = 0) -> None:
    """Makes one tensor of several, in each layer that has them."""
    for name in [name for name in content if parts[0] in name]:
        pieces = [content.pop(name.replace(parts[0], part)) for part in parts]
        content[name.replace(parts[0], whole)] = torch.cat(pieces, dim)


def parted_experts(content: dict[str, torch.Tensor]) -> None:
    for name in [name for name in content if "_exps." in name]:
        for expert, tensor in enumerate(content.pop(name)):
            content[name.replace("_exps.", f".{expert}.")] = tensor


def joined_latents(content: dict[str, torch.Tensor]) -> None:
    for name in [name for name in content if "attn_k_b" in name]:
        keys, values = content.pop(name), content.pop(name.replace("k_b", "v_b"))
        content[name.replace("k_b", "kv_b")] = torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None]]] = {
    "queries, keys and values in one": ("llama", lambda c: joined(c, ("attn_q.", "attn_k.", "attn_v."), "attn_qkv.")),
    "biases too": ("qwen2", lambda c: joined(c, ("attn_q.", "attn_k.", "attn_v."), "attn_qkv.")),
    "gate and up of experts in one": ("qwen3-moe", lambda c: joined(c, ("gate_exps", "up_exps"), "gate_up_exps", 1)),
    "a tensor for each expert": ("mixtral", parted_experts),
    "keys and values of latents in one": ("deepseek-v3", joined_latents),
    "a flat gate": (
        "qwen2-moe",
        lambda c: c.update({name: tensor[0] for name, tensor in c.items() if "gate_inp_shexp" in name}),
    ),
    "layers that predict further tokens": (
        "glm4-moe",
        lambda c: c.update({"blk.2.nextn.eh_proj.weight": torch.ones(2, 2)}),
    ),
}
"""Other layouts of the same models: of newer files and of older ones."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_the_same_model(tmp_path, layout, caplog):
    """As what llama.cpp writes today."""
    name, change = LAYOUTS[layout]
    architecture, kind, sizes, keys = CASES[name]
    model = make_model(kind, sizes)
    for file, changed in (("a", False), ("b", True)):
        content = dict(tensors(model, architecture))
        more = {"nextn_predict_layers": 1, "block_count": 3} if changed and "further" in layout else {}
        if changed:
            change(content)
        write_tensors(tmp_path / f"{file}.gguf", architecture, common_keys(model) | keys | more, content)
        convert_checkpoint(tmp_path / f"{file}.gguf", tmp_path / file, dtype=DType.FLOAT32, progress=False)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert ("b.gguf: without its layers that predict further tokens" in caplog.text) == ("further" in layout)
