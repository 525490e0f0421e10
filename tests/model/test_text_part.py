"""The language model of checkpoints with more than one, against transformers, which is given text alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.config_file import ConfigFile, read_config
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import load_spec
from hsrpc.model.text_part import text_part

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
}
SPELLINGS = [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")]
"""Beginnings of the names of the text model and of its head: as published, and as newer versions save them."""


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "gemma3":
        more = {"image_token_index": 60, "mm_tokens_per_image": 4}
        config = Gemma3Config(text_config=TEXT | {"model_type": "gemma3_text"}, vision_config=VISION, **more)
        return Gemma3ForConditionalGeneration(config)
    text, vision = TEXT | {"model_type": "mistral", "sliding_window": None}, VISION | {"model_type": "pixtral"}
    tied = name == "mistral3-tied"
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=60, tie_word_embeddings=tied)
    return Mistral3ForConditionalGeneration(config)


def respell(directory: Path, text: str, head: str) -> None:
    """Renames the text model's tensors, whatever they are called now."""
    file, renamed = directory / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        _, is_head, rest = name.partition("lm_head.")
        if not is_head and "language_model." in name:
            rest = name.split("language_model.")[1].removeprefix("model.")
        renamed[head + rest if is_head else text + rest if "language_model." in name else name] = tensor
    save_file(renamed, file)


@pytest.mark.parametrize(("text", "head"), SPELLINGS, ids=["published", "newer"])
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "mistral3-tied"])
def test_the_text_model_answers_as_the_whole_does(assert_same_logits, load_packed, tmp_path, name, text, head):
    """In both spellings of the names; what sees is left out."""
    packed = assert_same_logits(make(name))
    expected = packed.logits(([5, 6, 7],))
    respell(tmp_path, text, head)
    assert any(key.startswith(text) for key in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(load_packed(tmp_path).logits(([5, 6, 7],)), expected)


def test_what_is_ignored_is_said(save_packed, tmp_path, caplog):
    """Once, by what it is part of; a layer behind the last one, which predicts further tokens, likewise."""
    save_packed(make("gemma3"))
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"language_model.model.layers.2.eh_proj.weight": torch.zeros(2)}, file)
    with caplog.at_level(logging.WARNING):
        Checkpoint(tmp_path).check_model(create_family(load_spec(tmp_path, None)))
    [said] = [record.getMessage() for record in caplog.records if "alone" in record.getMessage()]
    assert said.endswith("without its layers.2, multi_modal_projector, vision_tower")


def test_a_model_that_is_whole_is_not_spoken_of(save_packed, tmp_path, caplog):
    """A text model in its own checkpoint."""
    model = make("gemma3")
    save_packed(model)
    config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma3ForCausalLM"]}))
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "language_model" in name}, file)
    with caplog.at_level(logging.WARNING):
        Checkpoint(tmp_path).check_model(create_family(load_spec(tmp_path, None)))
    assert not [record for record in caplog.records if "alone" in record.getMessage()]


def test_keys_of_the_whole_hold_for_its_parts(tmp_path):
    """What published files have outside the section, or nowhere; a section's own architectures are nobody's."""
    section = {"model_type": "gemma3_text", "hidden_size": 2560, "architectures": None}
    whole = {"text_config": section, "eos_token_id": [1, 106], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"architectures": ["Gemma3ForConditionalGeneration"]}))
    part = text_part(read_config(tmp_path / "config.json"))
    assert part.file.endswith("config.json: text_config")
    assert part.values["eos_token_id"] == [1, 106]
    assert part.values["vocab_size"] == 262208
    assert "architectures" not in part.values


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {"architectures": ["LlamaForCausalLM"]}])
def test_other_files_are_as_they_are(values):
    """Also one with such a section, of a model that is not served."""
    config = ConfigFile("config.json", values | {"text_config": {}})
    assert text_part(config) is config


def test_a_missing_section_is_said():
    """By its key."""
    with pytest.raises(CheckpointError, match="text_config: expected an object that describes the language model"):
        text_part(ConfigFile("config.json", {"architectures": ["Mistral3ForConditionalGeneration"]}))
