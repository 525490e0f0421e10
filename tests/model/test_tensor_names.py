"""Checkpoints as people write them: prefixes of training wrappers, and tied heads in one file or the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import load_spec
from hsrpc.model.tensor_names import TensorNames
from tests.model.conftest import PROMPTS, spread

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=True)
OPT = OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=1)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small tied Llama."""
    spread(LlamaForCausalLM(LLAMA)).save_pretrained(tmp_path)
    return tmp_path


def bend(directory: Path, rename=lambda name: name, more: dict[str, torch.Tensor] | None = None, without: str = ""):
    """Renames, adds and removes tensors of a checkpoint."""
    file = directory / "model.safetensors"
    state = load_file(file) | (more or {})
    state = {rename(name): tensor.clone() for name, tensor in state.items() if name != without}
    save_file(state, file, metadata={"format": "pt"})


def reference_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])


def check(directory: Path) -> None:
    Checkpoint(directory).check_model(create_family(load_spec(directory, None)))


def other_head() -> torch.Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("more", "without"),
    [({}, ""), ({HEAD: other_head()}, EMBEDDING), ({HEAD: other_head()}, "")],
    ids=["embedding", "head", "both"],
)
def test_tied_head_is_what_the_file_has(llama, load_packed, more, without):
    """One of the two stands for both; two that differ are two tensors, as in transformers."""
    bend(llama, more=more, without=without)
    found = load_packed(llama).logits(PROMPTS)
    torch.testing.assert_close(found, reference_logits(llama), atol=1e-4, rtol=1e-4)


def test_tied_head_that_is_the_embedding_is_one_tensor(llama):
    """Two that are equal stay tied, and take the memory of one."""
    bend(llama, more={HEAD: load_file(llama / "model.safetensors")[EMBEDDING]})
    sources = [source for each in create_family(load_spec(llama, None)).fixed_tensors() for source in each.sources]
    assert HEAD not in sources


def test_head_never_stands_for_the_embedding_of_an_untied_model(llama):
    """An untied model needs both, and the refusal says how to tie them."""
    config = json.loads((llama / "config.json").read_text()) | {"tie_word_embeddings": False}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected tensor lm_head\.weight, .*set tie_word_embeddings to true"):
        check(llama)
    bend(llama, more={HEAD: other_head()}, without=EMBEDDING)
    with pytest.raises(CheckpointError, match=r"expected tensor model\.embed_tokens\.weight"):
        check(llama)


@pytest.mark.parametrize(
    "prefix", ["", "model.model.", "module.", "module.model.", "language_model.model.", "_orig_mod."]
)
def test_prefixes_of_wrappers_are_seen_through(llama, load_packed, prefix):
    """The tensors are those of the plain file, whatever they were wrapped in when they were saved."""
    expected = load_packed(llama).logits(PROMPTS)
    bend(llama, lambda name: prefix + name.removeprefix("model."))
    torch.testing.assert_close(load_packed(llama).logits(PROMPTS), expected)


@pytest.mark.parametrize("prefix", ["decoder.", "module.model.decoder."])
def test_prefixes_of_opt_are_seen_through(tmp_path, load_packed, prefix):
    """OPT's names have `decoder.` behind the wrappers."""
    spread(OPTForCausalLM(OPT)).save_pretrained(tmp_path)
    expected = load_packed(tmp_path).logits(PROMPTS)
    bend(tmp_path, lambda name: prefix + name.removeprefix("model.decoder."))
    torch.testing.assert_close(load_packed(tmp_path).logits(PROMPTS), expected)


def test_unknown_spelling_is_answered_with_names_in_the_file(llama):
    """The refusal shows what the file calls its tensors."""
    bend(llama, lambda name: name.replace("model.layers", "blocks"))
    with pytest.raises(CheckpointError, match=r"found as the nearest blocks\.\d"):
        check(llama)


def test_two_spellings_of_one_tensor_are_told():
    """The canonical one counts; of two others neither does, and both are named."""
    assert TensorNames(["module.model.a", "model.a"]).find("model.a") == "model.a"
    names = TensorNames(["module.model.a", "module.a", "b"])
    assert names.find("model.a") is None
    assert names.nearest("model.a") == ["module.a", "module.model.a"]
