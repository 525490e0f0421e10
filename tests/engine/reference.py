"""Random models made with transformers, and what its `generate` answers: the reference that we did not write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
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
_DECODER = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "num_hidden_layers": 4,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 80,
}


def opt(**settings: object) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**(_OPT | {"eos_token_id": 2} | settings)))


def decoder(kind: str, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(_DECODER | settings)))


_SLIDING = "sliding_attention"
_SIZE = {"hidden_size": 48, "num_attention_heads": 4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40}
_ROPE_BY_KIND = {_SLIDING: {"rope_type": "default", "rope_theta": 500.0}, "full_attention": _YARN_ROPE}
_HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_MINISTRAL3_ROPE = _YARN_ROPE | {"llama_4_scaling_beta": 0.3}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 2.0, 3.0],
    "long_factor": [1.5, 3.0, 4.0],
}
_GRANITE = {
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.8,
    "logits_scaling": 0.9,
}
_GEMMA = {"head_dim": 16, "num_key_value_heads": 2, "initializer_range": 0.05}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_WINDOW = {"sliding_window": 24}

_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "rope_parameters": _YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.1},
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: opt(**_SIZE, ffn_dim=96),
    "opt-post-norm": lambda: opt(**_SIZE, ffn_dim=96, do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-odd-heads": lambda: opt(hidden_size=60, num_attention_heads=5, ffn_dim=70),
    "llama": lambda: decoder("llama"),
    "llama-gqa-tied": lambda: decoder("llama", num_key_value_heads=2, tie_word_embeddings=True),
    "llama3-rope": lambda: decoder("llama", num_key_value_heads=1, rope_parameters=_LLAMA3_ROPE),
    "mistral-window": lambda: decoder("mistral", num_key_value_heads=2, **_WINDOW),
    "qwen3-moe": lambda: decoder("qwen3_moe", num_key_value_heads=2, head_dim=16, **_EXPERTS, mlp_only_layers=[2]),
}
"""What every test compares."""

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "ministral": lambda: decoder(
        "ministral", head_dim=12, num_key_value_heads=2, **_WINDOW, layer_types=2 * [_SLIDING, "full_attention"]
    ),
    "ministral3": lambda: decoder("ministral3", head_dim=12, num_key_value_heads=2, rope_parameters=_MINISTRAL3_ROPE),
    "qwen2-window": lambda: decoder(
        "qwen2", num_key_value_heads=2, use_sliding_window=True, max_window_layers=2, **_WINDOW
    ),
    "qwen3": lambda: decoder("qwen3", head_dim=16, num_key_value_heads=4),
    "qwen2-moe": lambda: decoder("qwen2_moe", num_key_value_heads=2, shared_expert_intermediate_size=40, **_EXPERTS),
    "mixtral": lambda: decoder("mixtral", num_key_value_heads=2, num_local_experts=4, **_WINDOW),
    "olmoe": lambda: decoder("olmoe", num_key_value_heads=4, num_experts=24, num_experts_per_tok=6),
    "granite-moe": lambda: decoder(
        "granitemoeshared", num_key_value_heads=2, num_local_experts=4, shared_intermediate_size=40, **_GRANITE
    ),
    "olmo2": lambda: decoder("olmo2"),
    "olmo3": lambda: decoder("olmo3", **_WINDOW, rope_parameters=_ROPE_BY_KIND),
    "smollm3": lambda: decoder("smollm3", num_key_value_heads=2, no_rope_layer_interval=2),
    "exaone4": lambda: decoder("exaone4", num_key_value_heads=2, sliding_window_pattern=2, **_WINDOW),
    "cohere2": lambda: decoder("cohere2", num_key_value_heads=2, sliding_window_pattern=2, logit_scale=0.5, **_WINDOW),
    "phi3-longrope": lambda: decoder("phi3", rope_parameters=_LONG_ROPE, original_max_position_embeddings=160),
    "phi3-window": lambda: decoder("phi3", **_WINDOW),
    "gemma": lambda: decoder("gemma", head_dim=16, num_key_value_heads=4, initializer_range=0.05),
    "gemma2": lambda: decoder(
        "gemma2",
        **_GEMMA,
        **_WINDOW,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=0.4,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: decoder("gemma3_text", **_GEMMA, sliding_window_pattern=2, **_WINDOW),
    "gpt-oss": lambda: decoder(
        "gpt_oss", head_dim=16, num_key_value_heads=2, num_local_experts=4, rope_parameters=_YARN_ROPE, **_WINDOW
    ),
    "gpt-oss-full": lambda: decoder(
        "gpt_oss", head_dim=16, num_key_value_heads=2, num_local_experts=4, layer_types=4 * ["full_attention"]
    ),
    "glm4-moe": lambda: decoder(
        "glm4_moe", head_dim=16, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, use_qk_norm=True
    ),
    "granite": lambda: decoder("granite", num_key_value_heads=2, **_GRANITE),
    "cohere": lambda: decoder("cohere", use_qk_norm=True, logit_scale=0.5),
    "starcoder2": lambda: decoder("starcoder2", num_key_value_heads=2, **_WINDOW),
    "stablelm": lambda: decoder(
        "stablelm", num_key_value_heads=4, use_parallel_residual=True, use_qkv_bias=True, rope_parameters=_HALF_ROPE
    ),
    "gpt-neox": lambda: decoder("gpt_neox", rope_parameters=_HALF_ROPE),
    "yarn": lambda: decoder("llama", rope_parameters=_YARN_ROPE),
    "deepseek-v2": lambda: decoder("deepseek_v2", **_LATENT, first_k_dense_replace=4),
    "deepseek-v3": lambda: decoder("deepseek_v3", **_LATENT | {"q_lora_rank": 16}, first_k_dense_replace=2),
}
"""The other families of decoders, and rotations that reach beyond the trained context."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint on disk, prompts, and the tokens that greedy decoding gives."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


def make_reference(name: str, directory: Path) -> Reference:
    """The model `name` saved in `directory`, with prompts of 1 to 60 tokens whose continuations have clear margins."""
    torch.manual_seed(7)
    model = (MODELS | FAMILIES)[name]().eval()
    spread_norms(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    prompts, outputs = [], []
    generator = torch.Generator().manual_seed(11)
    while len(prompts) < (NUM_PROMPTS if name in MODELS else NUM_PROMPTS // 2):
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


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template as many models have it."""
SPECIAL = ("<|im_start|>", "<|im_end|>")
"""Special tokens of the tokenizer that `save_chat_tokenizer` makes: ids from 259 on."""
ADDED = ("<tool_call>", "</tool_call>", "<|turn|>")
"""Tokens that it has beside, none of which is special: ids from 261 on."""


def save_chat_tokenizer(directory: Path, template: str | dict[str, str] = CHATML) -> None:
    """The tokenizer of `save_tokenizer` with tokens for conversations, a start token before texts, and a template."""
    save_tokenizer(directory)
    fast = PreTrainedTokenizerFast.from_pretrained(directory)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.add_tokens(list(ADDED))
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.convert_tokens_to_ids("<s>"))]
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
