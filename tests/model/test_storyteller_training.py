"""How the bundled model is made: dialogues with right answers, batches made from one seed, a folder that loads."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from hsrpc.model.spec import load_spec

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
storyteller = importlib.import_module("storyteller")
chat = importlib.import_module("storyteller_chat")
trainer = importlib.import_module("train_storyteller")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return trainer.train_tokenizer(trainer.tokenizer_texts(0, 50), 400)


def dialogues(num_dialogues, seed=5):
    writer = storyteller.Storyteller(seed)
    return [chat.Dialogue(writer).write() for _ in range(num_dialogues)]


def test_dialogues_are_whole():
    """A system message at most at the start, then user and assistant in turn; no slot or choice is left behind."""
    again = iter(dialogues(200))
    for turns in dialogues(200):
        assert turns == next(again)
        roles = "".join(turn.role[0] for turn in turns)
        assert re.fullmatch("s?(ua)+", roles)
        said = [turn.content for turn in turns if turn.kind not in {"", "unknown"}]
        assert all(said)
        assert not [text for text in said if re.search(r"[\[\]{}|_]|\b[Aa] [aeiou]|  | [.,!?]", text)]


def test_answers_are_right_and_come_from_the_conversation():
    """The key of each answer is in it; names of people, places and things were said before."""
    copied = {"name of the hero", "name of the friend", "name of the user", "own name", "home", "time", "thing lost"}
    seen = set()
    for turns in dialogues(300):
        for position, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            assert turn.is_right(turn.content), turn
            seen.add(turn.kind)
            before = " ".join(earlier.content for earlier in turns[:position]).lower()
            if turn.kind in copied and turn.key not in {"not told me", "storyteller"}:
                assert turn.key.lower() in before, turn
    assert copied | {"story", "greeting", "unknown", "wonder", "no story yet", "name not told"} <= seen


def test_an_answer_without_the_key_is_wrong():
    turn = chat.Turn("assistant", "The fox was called Mia.", "name of the hero", "Mia")
    assert turn.is_right("MIA.")
    assert not turn.is_right("The fox was called Tom.")


def test_the_template_is_chatml_after_the_first_token(tokenizer):
    """`</s>`, then each turn between its marks; a prompt ends where the assistant begins."""
    text = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "</s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert (ids[:2], ids.count(3), ids.count(4)) == ([2, 3], 3, 3)


def test_a_batch_depends_on_the_seed_and_its_step(tokenizer):
    """Neither on the batches before it nor on who makes it; all rows are full."""
    first, second = (trainer.Batches(tokenizer, seed, 9, 3) for seed in (1, 2))
    assert first[4].shape == (3, 512)
    assert first[4].equal(trainer.Batches(tokenizer, 1, 5, 3)[4])
    assert not first[4].equal(first[5])
    assert not first[4].equal(second[4])


def test_a_turn_is_begun_by_the_template_alone():
    """The model learns every id but `<|im_start|>`: what follows an empty prompt is a story."""
    assert trainer.labels_of(torch.tensor([[2, 3, 9, 4, 2, 9]])).tolist() == [[2, -100, 9, 4, 2, 9]]


def test_the_folder_has_weights_template_ends_and_its_page(tmp_path, monkeypatch):
    """One step of training writes a folder that transformers and hsrpc load, with the evaluation in its page."""
    texts = trainer.tokenizer_texts
    options = "--steps 1 --rows 1 --vocab-size 400 --dialogues 1 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["train", *options.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(trainer, "be_deterministic", torch.manual_seed)
    monkeypatch.setattr(trainer, "tokenizer_texts", lambda seed, _: texts(seed, 50))
    monkeypatch.setattr(trainer, "answer", lambda model, tokenizer, asked: [asked[0].said.content] * len(asked))
    trainer.main()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|im_start|>" in loaded.chat_template
    assert OPTForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 4]
    assert load_spec(tmp_path, None).eos_token_ids == (2, 4)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.search(r"--steps 1 --rows 1 .*--dtype float32", page)
    assert re.search(r"^\| all \| \d+ \| [\d.]+% \|$", page, re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 120
