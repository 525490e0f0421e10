"""Random models made with transformers, and what its `generate` answers: the reference that we did not write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 300
NEW_TOKENS = 64
NUM_PROMPTS = 16
_MARGIN = 2e-3
"""Least difference of the two best logits: far above float32 rounding, so that tokens must be equal."""
_OPT = {"vocab_size": VOCAB, "max_position_embeddings": 160, "num_hidden_layers": 4, "init_std": 0.2, "pad_token_id": 1}
_LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "num_hidden_layers": 4,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
}


def opt(**settings: object) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**(_OPT | {"eos_token_id": 2} | settings)))


def llama(**settings: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(_LLAMA | settings)))


def mistral(**settings: object) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**(_LLAMA | settings)))


_SIZE = {"hidden_size": 48, "num_attention_heads": 4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: opt(**_SIZE, ffn_dim=96),
    "opt-post-norm": lambda: opt(**_SIZE, ffn_dim=96, do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-odd-heads": lambda: opt(hidden_size=60, num_attention_heads=5, ffn_dim=70),
    "llama": lambda: llama(**_SIZE, intermediate_size=80),
    "llama-gqa-tied": lambda: llama(**_SIZE, intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=True),
    "llama3-rope": lambda: llama(**_SIZE, intermediate_size=80, num_key_value_heads=1, rope_parameters=_LLAMA3_ROPE),
    "mistral-window": lambda: mistral(**_SIZE, intermediate_size=80, num_key_value_heads=2, sliding_window=24),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint on disk, prompts, and the tokens that greedy decoding gives."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


def make_reference(name: str, directory: Path) -> Reference:
    """The model `name` saved in `directory`, with prompts of 1 to 60 tokens whose continuations have clear margins."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    spread_norms(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    prompts, outputs = [], []
    generator = torch.Generator().manual_seed(11)
    while len(prompts) < NUM_PROMPTS:
        length = 1 + int(torch.randint(60, (1,), generator=generator))
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        output, margin = greedy(model, prompt)
        if margin > _MARGIN:
            prompts.append(prompt)
            outputs.append(output)
    return Reference(directory, prompts, outputs)


def spread_norms(model: PreTrainedModel) -> None:
    """Random norm weights and biases: freshly made models have ones and zeros, which would hide their loss."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """Output of `generate`, past its end-of-text token, and the least margin on the way."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=VOCAB + 1,
    )
    best = torch.stack(result.logits).squeeze(1).topk(2).values
    return result.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 256 bytes and a few merged pairs, ids below VOCAB."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
