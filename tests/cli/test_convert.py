"""hsrpc convert: from a pickled checkpoint that is refused to one that generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.reference import decoder, opt, save_tokenizer, spread_norms
from tests.model.gguf.writer import write_gguf

PROMPT = (5, 17, 250, 44, 3)
GENERATE = ("generate", "--device=cpu", "--gpu-memory=8MiB", "--host-memory=32MiB", "--temperature=0", "--ignore-eos")
IDS = ("--token-ids", ",".join(map(str, PROMPT)), "--max-tokens=12")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(3)
    made = opt(hidden_size=48, num_attention_heads=4, ffn_dim=96).eval()
    spread_norms(made)
    return made


@pytest.fixture
def pickled(tmp_path: Path, model: PreTrainedModel) -> Path:
    """The model as published years ago: config, tokenizer, pytorch_model.bin."""
    directory = tmp_path / "pickled"
    directory.mkdir()
    model.config.save_pretrained(directory)
    save_tokenizer(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def greedy(model: PreTrainedModel) -> list[int]:
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, do_sample=False, min_new_tokens=12, max_new_tokens=12)
    return output[0, len(PROMPT) :].tolist()


def test_refused_converted_served(hsrpc, tmp_path, pickled, model):
    """A pickled checkpoint is refused with the command that converts it; then its tokens are transformers'."""
    refused = hsrpc(*GENERATE, *IDS, "--model", str(pickled))
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert f"hsrpc convert {pickled}" in refused.err

    target = tmp_path / "converted"
    converted = hsrpc("convert", str(pickled), str(target))
    assert converted.code == 0
    assert converted.out == f"saved {target}; serve it with: hsrpc serve --model {target}\n"
    assert not list(target.glob("*.bin"))

    ran = hsrpc(*GENERATE, *IDS, "--model", str(target), "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["token_ids"] == greedy(model)


def test_a_target_with_files_is_left_alone(hsrpc, pickled):
    """Nothing is overwritten."""
    before = sorted(pickled.iterdir())
    ran = hsrpc("convert", str(pickled), str(pickled))
    assert ran.code == 1
    assert ran.err.startswith(f"hsrpc: error: dst={str(pickled)!r}: exists and is not an empty directory; give")
    assert sorted(pickled.iterdir()) == before


def test_code_in_a_checkpoint_is_not_run(hsrpc, tmp_path, pickled):
    """A pickle that would run something is refused by name, and no target appears."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Trap()}, pickled / "pytorch_model.bin")
    ran = hsrpc("convert", str(pickled), str(tmp_path / "target"))
    assert ran.code == 1
    assert ran.err.startswith(f"hsrpc: error: {pickled / 'pytorch_model.bin'}: expected tensors alone")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "target").exists()


def test_a_source_without_pickled_weights(hsrpc, tmp_path):
    """A directory that holds no model is named, with the file that is missing."""
    ran = hsrpc("convert", str(tmp_path), str(tmp_path / "target"))
    assert ran.code == 1
    assert ran.err.startswith(f"hsrpc: error: {tmp_path / 'config.json'}: ")


def test_a_target_that_cannot_be_made(hsrpc, tmp_path, pickled):
    """A path below a file is the system's error, in one line."""
    (tmp_path / "file").touch()
    ran = hsrpc("convert", str(pickled), str(tmp_path / "file" / "target"))
    assert ran.code == 1
    assert ran.err.startswith("hsrpc: error: ")
    assert str(tmp_path / "file") in ran.err
    assert ran.err.count("\n") == 1


def test_a_gguf_file_is_refused_converted_served(hsrpc, tmp_path):
    """Refused with the command that converts it; then its tokens are transformers' for the model that it was."""
    llama = decoder("llama", num_key_value_heads=2).eval()
    spread_norms(llama)
    file, target = tmp_path / "tiny.gguf", tmp_path / "converted"
    write_gguf(file, llama, "llama", {})
    refused = hsrpc(*GENERATE, *IDS, "--model", str(file))
    assert refused.code == 1
    assert f"run `hsrpc convert {file} DIRECTORY` and serve DIRECTORY" in refused.err
    converted = hsrpc("convert", str(file), str(target), "--dtype", "float32")
    assert converted.code == 0
    assert converted.out == f"saved {target}; serve it with: hsrpc serve --model {target}\n"
    save_tokenizer(target)
    ran = hsrpc(*GENERATE, *IDS, "--model", str(target), "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["token_ids"] == greedy(llama)


@pytest.mark.parametrize("flags", [("--dtype", "float16"), ("--keep-quantized",)])
def test_flags_of_gguf_files_alone(hsrpc, tmp_path, pickled, flags):
    """Pickled weights keep their type."""
    ran = hsrpc("convert", str(pickled), str(tmp_path / "target"), *flags)
    assert ran.code == 1
    assert "pickled weights" in ran.err
    assert not (tmp_path / "target").exists()
