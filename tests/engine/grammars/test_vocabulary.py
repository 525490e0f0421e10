"""The bytes of tokens: of tokenizers with bytes, with a fallback to them, and of others."""

from __future__ import annotations

import llguidance
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hsrpc.engine.grammars.vocabulary import vocabulary

WORDS = ["</s>", "<unk>", "a", "hello", "world", "{", "}"]


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def word_piece() -> Tokenizer:
    words = {word: number for number, word in enumerate([*WORDS, "##s"])}
    made = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


def unigram() -> Tokenizer:
    pieces = ["</s>", "<unk>", "▁a", "▁hello", "s", "▁", "{"]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def byte_fallback() -> Tokenizer:
    pieces = ["</s>", "<unk>", "<0xC3>", "▁hello", "s", "▁", "a"]
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    replace = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


EXPECTED = {
    word_level: {3: b" hello", 5: b" {"},
    word_piece: {3: b" hello", 7: b"s"},
    unigram: {3: b" hello", 4: b"s"},
    byte_fallback: {2: b"\xc3", 3: b" hello", 4: b"s"},
}


@pytest.mark.parametrize("make", EXPECTED, ids=lambda each: each.__name__)
def test_tokens_have_the_bytes_of_their_text(make):
    """Behind other text; what ends a text and what the model has beyond the tokenizer have none."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>", unk_token="<unk>")
    found = vocabulary(tokenizer, 32, [0])
    assert found.vocab_size == 32
    assert {token_id: found.decode_bytes([token_id]) for token_id in EXPECTED[make]} == EXPECTED[make]
    assert found.is_special_token(0)
    matcher = llguidance.LLMatcher(found, llguidance.LLMatcher.grammar_from_regex("(?s).+"), log_level=0)
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = [token_id for token_id in range(32) if mask >> token_id & 1]
    assert set(EXPECTED[make]) <= set(allowed)
    assert not {0, 1} & set(allowed)
    assert max(allowed) < len(tokenizer)
