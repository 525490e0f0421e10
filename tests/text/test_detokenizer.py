"""Text of token ids, piece by piece."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hsrpc.text.detokenizer import Detokenizer

TEXTS = ["hello world, the cat sat on the mat", "naïve café über", "日本語のテキスト", "👩‍👩‍👧 🎉🎉 e\u0301 ﷽"]
SPECIAL = "<end>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes them: `▁` begins a word, unknown characters are bytes, the first space is dropped."""
    words = [SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁cat", "é"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()


def byte_ids(raw: bytes) -> list[int]:
    """Each byte as a token of BYTE_LEVEL: written as itself where printable, else as a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(rest)}
    vocabulary = BYTE_LEVEL.get_vocab()
    return [vocabulary[names[byte]] for byte in raw]


def fallback_ids(text: str) -> list[int]:
    """The bytes of `text` as tokens of BYTE_FALLBACK."""
    return [byte + 1 for byte in text.encode()]


byte_level_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=120)
# Single bytes: the most unfinished and invalid characters.
single_bytes = st.binary(max_size=100).map(byte_ids)
fallback_pieces = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd").map(fallback_ids),
    st.sampled_from([[0], [257], [258], [259], [260], [261]]),
)


def pieces(detokenizer: Detokenizer, token_ids: list[int], group: int = 1) -> list[str]:
    sent = [detokenizer.push(token_ids[start : start + group]) for start in range(0, len(token_ids), group)]
    return [*sent, detokenizer.flush()]


@settings(deadline=None)
@given(byte_level_ids | single_bytes, st.integers(1, 5))
@example(byte_ids(b"\x80" * 200), 1)
@example(byte_ids("👩‍👩‍👧é日".encode() * 10), 3)
def test_pieces_concatenated_are_the_whole_text(token_ids: list[int], group: int) -> None:
    """Random tokens, with invalid bytes and special tokens among them: nothing is lost, added or changed."""
    assert "".join(pieces(Detokenizer(BYTE_LEVEL.decode), token_ids, group)) == BYTE_LEVEL.decode(token_ids)


@settings(deadline=None)
@given(st.lists(fallback_pieces, max_size=40).map(lambda parts: [token for part in parts for token in part]))
@example(fallback_ids("日🎉" * 30))
def test_byte_fallback_and_word_spaces(token_ids: list[int]) -> None:
    """Valid characters that come byte by byte, and spaces that depend on the token before, are the whole text."""
    assert "".join(pieces(Detokenizer(BYTE_FALLBACK.decode), token_ids)) == BYTE_FALLBACK.decode(token_ids)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_every_piece_of_valid_text_is_whole_characters(text: str) -> None:
    """Valid text has no U+FFFD in any piece, whatever the tokens' borders."""
    token_ids = BYTE_LEVEL.encode(text).ids
    assert pieces(Detokenizer(BYTE_LEVEL.decode), token_ids)[-1] == "" or text.endswith("\ufffd")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces(Detokenizer(BYTE_LEVEL.decode), token_ids))


def test_a_character_is_sent_with_its_last_byte() -> None:
    """Four bytes of an emoji, four tokens: text comes with the fourth."""
    assert pieces(Detokenizer(BYTE_FALLBACK.decode), fallback_ids("🎉")) == ["", "", "", "🎉", ""]


def test_an_unfinished_character_comes_with_flush() -> None:
    """What never became a character is U+FFFD in the end."""
    assert pieces(Detokenizer(BYTE_LEVEL.decode), byte_ids(b"a\xf0")) == ["a", "", "\ufffd"]


def test_bytes_that_never_become_characters_are_sent_after_a_few_tokens() -> None:
    """Invalid bytes do not hold the text back for ever, even after a character that byte fallback would rewrite."""
    token_ids = [*fallback_ids("é"), *[0xFF + 1] * 40]
    sent = pieces(Detokenizer(BYTE_FALLBACK.decode), token_ids)
    assert "".join(sent) == "é" + "\ufffd" * 40
    assert "".join(sent[:10]) == "é" + "\ufffd" * 5


def test_the_context_decides_on_the_first_space() -> None:
    """After a prompt the first word keeps its space; alone it has none."""
    vocabulary = BYTE_FALLBACK.get_vocab()
    cat, context = [vocabulary["▁cat"]], [vocabulary["▁a"]]
    assert pieces(Detokenizer(BYTE_FALLBACK.decode, context), cat) == [" cat", ""]
    assert pieces(Detokenizer(BYTE_FALLBACK.decode), cat) == ["cat", ""]


@settings(deadline=None)
@given(byte_level_ids, byte_level_ids.map(lambda ids: BYTE_LEVEL.encode(BYTE_LEVEL.decode(ids)).ids))
def test_the_context_itself_is_not_sent_again(token_ids: list[int], context: list[int]) -> None:
    """After a context of whole characters, the pieces are what the tokens add to it."""
    whole, before = BYTE_LEVEL.decode(context + token_ids), BYTE_LEVEL.decode(context)
    assert before + "".join(pieces(Detokenizer(BYTE_LEVEL.decode, context), token_ids)) == whole


@pytest.mark.parametrize(
    "token_ids",
    [
        pytest.param(BYTE_LEVEL.encode("The cat sat. " * 300).ids, id="text"),
        pytest.param([0] * 2000, id="special-tokens"),
        pytest.param([*byte_ids(b"a\xe2"), *[0] * 2000], id="unfinished"),
        pytest.param(byte_ids(b"\x80" * 2000), id="invalid"),
        pytest.param(byte_ids("日🎉".encode() * 300), id="bytes"),
    ],
)
def test_the_cost_of_a_token_does_not_grow(token_ids: list[int]) -> None:
    """No call decodes more than a few dozen tokens, and there are about two calls a token."""
    lengths: list[int] = []

    def decode(window: list[int]) -> str:
        lengths.append(len(window))
        return BYTE_LEVEL.decode(window)

    assert "".join(pieces(Detokenizer(decode), token_ids)) == BYTE_LEVEL.decode(token_ids)
    assert max(lengths) <= 60
    assert len(lengths) <= 2.2 * len(token_ids)


def test_a_long_run_that_cannot_be_cut_costs_nothing_afterwards() -> None:
    """While letters are capital since a token far before, no later start is right; then the window is short again."""
    opens, closes, letter = 0, 1, 2
    lengths: list[int] = []

    def decode(window: list[int]) -> str:
        lengths.append(len(window))
        capital, text = False, ""
        for token in window:
            capital = token == opens or (capital and token != closes)
            text += "[" if token == opens else "]" if token == closes else "A" if capital else "a"
        return text

    detokenizer = Detokenizer(decode)
    run = [opens, *[letter] * 500, closes]
    assert detokenizer.push(run) == decode(run)
    detokenizer.push([letter] * 50)
    lengths.clear()
    assert detokenizer.push([letter] * 200) == "a" * 200
    assert max(lengths) <= 60
    assert len(lengths) <= 2.2 * 200
