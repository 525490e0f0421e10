"""What lies where a model's file should be, and is something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hsrpc.config import BUNDLED_MODEL
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.hub import resolve_model
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import load_spec

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


def open_model(directory: Path) -> None:
    load_spec(directory, None)
    Checkpoint(directory)
    Tokenizer(directory).close()


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
)
def test_git_lfs_pointer_is_told(model, name):
    """Whatever file it stands for, the command that fetches it is said."""
    (model / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: expected the file itself, found a Git LFS pointer .*lfs pull"):
        open_model(model)


def test_git_lfs_pointer_in_place_of_an_index_or_a_shard_is_told(model):
    """Sharded checkpoints too."""
    (model / "model.safetensors").unlink()
    (model / "model-00001-of-00001.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"00001\.safetensors: .*`git lfs pull` in"):
        open_model(model)
    (model / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"index\.json: .*`git lfs pull` in"):
        open_model(model)


def test_git_lfs_pointer_to_a_pickle_is_told(tmp_path):
    """The converter says it as the reader does."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["opt-125m"]))
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected the file itself, found a Git LFS pointer"):
        convert_checkpoint(tmp_path, tmp_path / "out", progress=False)


def test_files_that_nobody_reads_may_be_pointers(model):
    """A picture or weights of another format are not missed."""
    for name in ("picture.png", "pytorch_model.bin", "model.onnx"):
        (model / name).write_bytes(POINTER)
    open_model(model)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", ["some-Q4_K_M.gguf", "model.safetensors"])
def test_gguf_is_told(tmp_path, name, with_config):
    """As a file, in a directory, and under another name: what it is, and the command that makes what can be served."""
    (tmp_path / name).write_bytes(b"GGUF\x03" + bytes(100))
    if with_config or name == "model.safetensors":
        (tmp_path / "config.json").write_text(json.dumps(SHAPES["opt-125m"]))
    told = rf"{name}: expected safetensors, found GGUF; run `hsrpc convert {tmp_path / name} DIRECTORY` and serve"
    with pytest.raises(CheckpointError, match=told):
        resolve_model(str(tmp_path / name))
    with pytest.raises(CheckpointError, match=told):
        open_model(resolve_model(str(tmp_path)))
