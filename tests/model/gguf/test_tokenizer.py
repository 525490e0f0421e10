"""A GGUF file's tokenizer, chat templates, end tokens and sampling settings, as files that hsrpc reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.generation_config import read_default_params
from hsrpc.model.gguf.splitting import splitting_of
from hsrpc.model.spec import load_spec
from hsrpc.prompt import Chat, Message
from tests.model.gguf.test_architectures import make_model
from tests.model.gguf.writer import add_key, common_keys, finish, tensors

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
ALPHABET = sorted(ByteLevel.alphabet())
SPECIAL = ["<s>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "3 4", "a b", "Ġ a", "' l", "'l l", "o n", "on e"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
BYTES: dict[str, object] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.padding_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": TEMPLATE,
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
PIECE_KEYS: dict[str, object] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(6)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
}


def convert(directory: Path, keys: dict[str, object], architecture: str = "llama") -> Path:
    """A model with those keys, converted."""
    kind = {"gpt-oss": "gpt_oss"}.get(architecture, architecture)
    size = len(keys.get("tokenizer.ggml.tokens", [])) or 40
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8} if kind == "gpt_oss" else {}
    model = make_model(kind, {"vocab_size": size, "num_hidden_layers": 1} | experts)
    sizes = {"expert_count": 4, "expert_used_count": 2} if experts else {}
    writer = gguf.GGUFWriter(directory / "a.gguf", architecture)
    for key, value in (common_keys(model) | sizes | keys).items():
        add_key(writer, key, value, architecture)
    for name, tensor in tensors(model, architecture):
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)
    convert_checkpoint(directory / "a.gguf", directory / "out", progress=False)
    return directory / "out"


async def pieces(directory: Path, text: str) -> list[str]:
    """The tokens that hsrpc makes of a text."""
    tokenizer = Tokenizer(directory)
    ids = await tokenizer.encode(text)
    found = [await tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    tokenizer.close()
    return found


async def test_byte_level_tokenizer(tmp_path):
    """Texts, special tokens, a start token, and the chat template with the token that ends a turn."""
    out = convert(tmp_path, BYTES)
    assert await pieces(out, "ab a<|im_end|>") == ["<s>", "ab", " a", "<|im_end|>"]
    tokenizer = Tokenizer(out)
    assert await tokenizer.render(Chat((Message("user", "a"),))) == "<|im_start|>a<|im_end|>"
    assert list(tokenizer.end_token_ids) == [2, 4]
    tokenizer.close()


async def test_sentencepiece_tokenizer(tmp_path):
    """Pieces by their scores, other letters as bytes, and the start token that files of that kind need not ask for."""
    out = convert(tmp_path, PIECE_KEYS)
    assert await pieces(out, "ab a!") == ["<s>", "ab", "a", "!"]
    spec = load_spec(out, None)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12", "34", "'ll", " a"]),
        ("smollm", ["1", "2", "3", "4", "'ll", " a"]),
        ("qwen2", ["1", "2", "3", "4", "'ll", " a"]),
        ("stablelm2", ["1", "2", "3", "4", "'ll", " a"]),
        ("glm4", ["12", "3", "4", "'ll", " a"]),
        ("deepseek-v3", ["12", "3", "4", "'ll", " a"]),
    ],
)
async def test_texts_are_split_as_the_file_says(tmp_path, pre, expected, caplog):
    """Digits as one, by threes, or each by itself."""
    out = convert(tmp_path, BYTES | {"tokenizer.ggml.pre": pre})
    assert await pieces(out, "1234'll a") == ["<s>", *expected]
    assert not caplog.records


async def test_an_unknown_way_to_split_is_told(tmp_path, caplog):
    """The conversion goes on, and the log says what is better."""
    out = convert(tmp_path, BYTES | {"tokenizer.ggml.pre": "new"})
    assert await pieces(out, "1234") == ["<s>", "12", "34"]
    assert "a.gguf: tokenizer.ggml.pre='new': words are split as GPT-2 does; rather copy the model's" in caplog.text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "a.gguf: it has no tokenizer; copy the model's tokenizer files to out"),
        (
            {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": TOKENS},
            "a.gguf: the tokenizer cannot be read (Cannot build a tokenizer",
        ),
    ],
)
def test_weights_come_without_a_tokenizer(tmp_path, keys, told, caplog):
    """None, or one that transformers cannot read: the log says what to do."""
    out = convert(tmp_path, keys)
    assert told in caplog.text
    assert (out / "model.safetensors").exists()
    assert not (out / "tokenizer.json").exists()


def test_files_beside_are_not_read(tmp_path):
    """A tokenizer_config.json beside a GGUF file is of some other model."""
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 7, "eos_token": "<other>"}')
    out = convert(tmp_path, BYTES)
    assert "other" not in (out / "tokenizer_config.json").read_text()


async def test_named_templates_come_along(tmp_path):
    """Beside the one without a name."""
    more = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    out = convert(tmp_path, BYTES | more)
    assert {path.name for path in out.rglob("*.jinja")} == {"chat_template.jinja", "tool_use.jinja"}


@pytest.mark.parametrize(("architecture", "ends"), [("llama", (2, 4, 3)), ("gpt-oss", (2,))])
def test_end_tokens_and_settings(tmp_path, architecture, ends):
    """A turn that is over ends the output, but not a part of one; recommended settings are defaults."""
    keys = {
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 3,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
    }
    out = convert(tmp_path, BYTES | keys, architecture)
    assert load_spec(out, None).eos_token_ids == ends
    params = read_default_params(out)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95)


def test_texts_are_split_as_transformers_splits_them():
    """Where it knows the name as well: the same pieces of a text with something of everything."""
    text = (
        "I'LL say: don't, HTTPServer's 12345 Straße\u0301 no\u00eb\u4f60\u597d\u3042  \n\n\t x_y //a\r\n`{!Word} 3.14 "
    )
    compared = 0
    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
        if (ours := splitting_of(name)) is not None:
            theirs = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                    ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), name
            compared += 1
    assert compared >= 11
