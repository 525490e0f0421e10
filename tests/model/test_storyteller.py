"""The bundled model: small, lossless in its tokens, and legible."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

import hsrpc

FOLDER = Path(hsrpc.__file__).parent / "models" / "storyteller"
PROMPTS = (
    "Once upon a time",
    "The little robot",
    "One rainy morning",
    "Deep in the forest,",
    "Mia had a",
    "The old clockmaker",
    "On the moon",
    "Tell me a story about a dragon and a red kite.",
)
TEXTS = (
    "🙂",
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 versus é, ﬁ and ﬀ",
    "你好世界。こんにちは 안녕하세요",
    "שלום مرحبا नमस्ते",
    "  two before, two after  ",
    "\n\nlines\r\n\tand tabs\n",
    "don't , stop ! it 's ' fine ' .",
    "\x00\x7f\u200b\ufeff\uffff\U0010ffff",
    "",
)
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
storyteller = importlib.import_module("storyteller")
tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    torch.set_num_threads(1)
    return OPTForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stories(model: OPTForCausalLM) -> dict[str, list[int]]:
    """Greedy output tokens of each prompt."""
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**batch, do_sample=False, max_new_tokens=300)
    return {prompt: row[batch.input_ids.shape[1] :].tolist() for prompt, row in zip(PROMPTS, output, strict=True)}


@pytest.fixture(scope="module")
def vocabulary() -> set[str]:
    """Words of 1000 training stories."""
    writer = storyteller.Storyteller(0)
    return {word for _ in range(1000) for word in words(writer.story(writer.slots()))}


def tell(prompt: str, token_ids: list[int]) -> str:
    return prompt + tokenizer.decode(token_ids, skip_special_tokens=True)


def words(text: str) -> Iterator[str]:
    yield from re.findall(r"[A-Za-z]+", text)


def test_folder_is_small() -> None:
    """The whole folder stays below 8 MB, so that it can travel in the package."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_weights_are_float16_in_the_file(model: OPTForCausalLM) -> None:
    """The file holds two bytes for each weight; loaded, they are float32 and finite."""
    assert model.config.dtype == torch.float32
    num_weights = sum(weight.numel() for weight in model.parameters())
    assert 2 * num_weights < (FOLDER / "model.safetensors").stat().st_size < 2 * num_weights + 65_536
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())


def test_shape_is_a_plain_opt(model: OPTForCausalLM) -> None:
    """Pre-norm, tied embeddings and heads of 64: the family that activation blocks pay for."""
    config = model.config
    assert (config.do_layer_norm_before, config.tie_word_embeddings, config.activation_function) == (True, True, "relu")
    assert config.hidden_size // config.num_attention_heads == 64
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), tokenizer.model_max_length)


def test_prompts_begin_with_end_of_text() -> None:
    """As in OPT, `</s>` (2) begins a prompt, and padding is 1."""
    assert tokenizer("Hello").input_ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1


@pytest.mark.parametrize("text", TEXTS)
def test_chosen_texts_come_back(text: str) -> None:
    """Emoji, scripts, spaces, control characters and punctuation come back exactly."""
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: not re.search("<s>|</s>|<pad>", text)))
def test_any_text_comes_back(text: str) -> None:
    """Any text without a special token in it comes back exactly, and has no unknown token."""
    token_ids = tokenizer(text).input_ids
    assert None not in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_story_ends_by_itself(stories: dict[str, list[int]], prompt: str) -> None:
    """A greedy story ends with `</s>` after a whole sentence."""
    assert tokenizer.eos_token_id in stories[prompt]
    assert tell(prompt, stories[prompt])[-1] in '.!?"'


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_story_is_made_of_known_words(stories: dict[str, list[int]], vocabulary: set[str], prompt: str) -> None:
    """Hardly a word that is not in the training stories."""
    told = list(words(tell("", stories[prompt])))
    known = [word for word in told if word in vocabulary]
    assert len(told) >= 40
    assert len(known) >= 0.97 * len(told)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_story_does_not_go_in_circles(stories: dict[str, list[int]], prompt: str) -> None:
    """No sentence comes three times, and no sentence has a word twice in a row."""
    text = tell(prompt, stories[prompt])
    sentences = Counter(re.split(r'(?<=[.!?])"? ', text))
    assert max(sentences.values()) <= 2
    assert not re.search(r"\b(\w+) \1\b", text)


def test_long_prompt_goes_on(model: OPTForCausalLM, stories: dict[str, list[int]], vocabulary: set[str]) -> None:
    """After 400 tokens of stories the next story is still legible: late positions are trained."""
    prompt = [token for story in stories.values() for token in [2, *(t for t in story if t > 2)]][:400]
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=1)[0, 400:]
    told = list(words(tell("", output.tolist())))[:-1]
    assert len([word for word in told if word in vocabulary]) >= 0.9 * len(told) > 10


def test_training_stories_are_whole() -> None:
    """The writer leaves no slot, choice or wrong article behind, and repeats itself for the same seed."""
    writer, again = storyteller.Storyteller(3), storyteller.Storyteller(3)
    for _ in range(500):
        story = writer.story(writer.slots())
        assert story == again.story(again.slots())
        assert not re.search(r"[\[\]{}|_]|\b[Aa] [aeiou]|  | [.,!?]|\b(\w+) \1\b", story), story
