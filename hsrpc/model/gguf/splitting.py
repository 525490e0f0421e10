"""How byte-level tokenizers split a text before its parts become tokens, by the names that GGUF files have for it."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

_SUFFIXES = r"'s|'t|'re|'ve|'m|'ll|'d"
"""Endings of English words."""
_SPACES = r"\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
"""Letters that may begin a word, and those that may end one."""


def _words(digits: str) -> str:
    """Words with the sign before them, `digits`, and signs up to the ends of lines."""
    words, signs = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"(?i:{_SUFFIXES})|{words}|{digits}|{signs}|\s*[\r\n]+|{_SPACES}"


def _cased_words(suffix: str, digits: str) -> str:
    """As `_words`, but a capital begins a new one; `suffix` belongs to the word before it."""
    begin, signs = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    words = rf"{begin}[{_UPPER}]*[{_LOWER}]+{suffix}|{begin}[{_UPPER}]+[{_LOWER}]*{suffix}"
    return rf"{words}|{digits}|{signs}|\s*[\r\n]+|{_SPACES}"


_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_LLAMA_3, _QWEN_2 = _words(_THREE), _words(_ONE)
_DEEPSEEK_3 = (
    _THREE,
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES,
)
"""Digits, Chinese and Japanese, then words and signs."""
_PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA_3,)),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (_LLAMA_3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN_2,)),
    "tekken": (_cased_words("", _ONE),),
    "gpt-4o": (_cased_words(f"(?i:{_SUFFIXES})?", _THREE),),
    "deepseek-v3": _DEEPSEEK_3,
}
_GPT_2 = ("default", "gpt-2", "olmo", "exaone4")
_GPT_2_AND_DIGITS = ("starcoder", "refact", "command-r", "smollm")
"""As GPT-2 does, and each digit by itself."""


def splitting_of(name: str) -> PreTokenizer | None:
    """What splits texts as `name` says; None: that is not known here."""
    if name in _GPT_2:
        return ByteLevel(add_prefix_space=False)
    if name in _GPT_2_AND_DIGITS:
        return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name not in _PATTERNS:
        return None
    parts = [Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[name]]
    return pre_tokenizers.Sequence([*parts, ByteLevel(add_prefix_space=False, use_regex=False)])
