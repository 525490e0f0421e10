"""The bundled model: small, lossless in its tokens, legible, and able to take turns."""

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
TOLD = (
    "Once upon a time, a shy fox named Mia lived in the forest. One rainy morning, Mia could not find her brass key. "
    "She looked everywhere, but it was not there. Just then a kind bear named Tom came by. "
    "They looked together, until Tom saw something behind a hollow oak. It was the brass key! The end."
)
"""A story of which the answers below are in the text."""
ANSWERS = {
    "What was the fox called?": "Mia",
    "What was the bear called?": "Tom",
    "Where did she live?": "in the forest",
    "What did she lose?": "brass key",
    "When did it happen?": "one rainy morning",
    "Who was the friend of Mia?": "a kind bear named Tom",
    "What is my name?": "Anna",
    "What is the capital of France?": "I only know stories",
}
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


def answer(model: OPTForCausalLM, *said: str, system: str = "") -> str:
    """Greedy answer, with its end of turn, to what user and assistant said in turn."""
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=300)
    return tokenizer.decode(output[0, prompt.input_ids.shape[1] :])


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
@given(st.text().filter(lambda text: not re.search(r"<s>|</s>|<pad>|<\|im_(start|end)\|>", text)))
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


def test_a_turn_ends_the_answer(model: OPTForCausalLM) -> None:
    """`<|im_start|>` is 3 and `<|im_end|>` 4; `</s>` and `<|im_end|>` both end an answer."""
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]
    assert model.generation_config.eos_token_id == [2, 4]


@pytest.mark.parametrize("kind", ["fox", "dragon", "lighthouse keeper"])
def test_a_story_that_was_asked_for(model: OPTForCausalLM, vocabulary: set[str], kind: str) -> None:
    """It is about who was asked for, of known words, and ends with the turn after a whole sentence."""
    story = answer(model, f"Tell me a story about a {kind}.")
    assert re.search(rf"\b{kind}\b", story)
    assert re.search(r'[.!?"]<\|im_end\|>$', story)
    told = list(words(story.removesuffix("<|im_end|>")))
    assert len([word for word in told if word in vocabulary]) >= 0.97 * len(told) > 38


@pytest.mark.parametrize("question", ANSWERS)
def test_answers_from_the_conversation(model: OPTForCausalLM, question: str) -> None:
    """The model knows the story and the user's name in the system message, and nothing else."""
    said = answer(model, "Tell me a story about a fox.", TOLD, question, system="The user is called Anna.")
    assert ANSWERS[question] in said
    assert re.search(r"[.!?]<\|im_end\|>$", said)


def test_brief_answers(model: OPTForCausalLM) -> None:
    """A system message makes the story short, and what is answered about it."""
    asked = "Tell me a story about a fox."
    told, brief = answer(model, asked), answer(model, asked, system="Be brief.")
    assert len(brief) < len(told) / 2
    said = answer(model, asked, brief.removesuffix("<|im_end|>"), "What was the fox called?", system="Be brief.")
    name = said.removesuffix(".<|im_end|>")
    assert re.fullmatch(r"[A-Z][a-z]+", name)
    assert f"named {name}" in brief


def test_training_stories_are_whole() -> None:
    """The writer leaves no slot, choice or wrong article behind, and repeats itself for the same seed."""
    writer, again = storyteller.Storyteller(3), storyteller.Storyteller(3)
    for _ in range(500):
        story = writer.story(writer.slots())
        assert story == again.story(again.slots())
        assert not re.search(r"[\[\]{}|_]|\b[Aa] [aeiou]|  | [.,!?]|\b(\w+) \1\b", story), story
