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
drafts = importlib.import_module("train_storyteller_draft")
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


@pytest.mark.parametrize(
    ("is_right", "length", "passes"),
    [
        ([], 3, 0),
        ([False], 3, 1),
        ([True] * 8, 3, 2),
        ([True, False, True, True, True, True, False], 3, 3),
        ([True, False, True, True, True, True, False], 5, 2),
        ([False] * 4, 5, 4),
    ],
)
def test_passes_that_a_text_takes(is_right, length, passes):
    """Each pass gives the drafted tokens up to the first wrong one, and the right one in its place or behind them."""
    assert drafts.num_passes(is_right, length) == passes


def test_a_model_drafts_its_own_words(tokenizer):
    """By replay of what it said itself all of its drafts are accepted: a pass gives one token more than are drafted."""
    torch.manual_seed(3)
    model = trainer.make_model(len(tokenizer), hidden_size=32, num_layers=1, num_heads=2).eval()
    outputs = drafts.say(model, [[2, 70, 71], [2, 80], [2, 90, 91, 92]], 24, 0.0)
    found = drafts.replay(model, outputs)
    assert (found.tokens, found.right) == (sum(map(len, outputs.texts)),) * 2
    assert found.passes == tuple(sum(-(-len(text) // (length + 1)) for text in outputs.texts) for length in (3, 5))


def test_a_draft_model_begins_with_the_teachers_embeddings(tokenizer):
    """Tokens that are alike for the teacher are alike for it, and their size is that of a new model's."""
    teacher, student = (trainer.make_model(len(tokenizer), size, 1, 2) for size in (64, 32))
    similar = teacher.model.decoder.embed_tokens.weight
    with torch.no_grad():
        similar[70] = similar[71] = similar[70] * 10
    before = student.model.decoder.embed_tokens.weight.std()
    drafts.embed_as(student, teacher)
    made = student.model.decoder.embed_tokens.weight
    assert torch.allclose(made[70], made[71], atol=1e-5)
    assert made.std().item() == pytest.approx(before.item(), rel=1e-3)


def test_the_teacher_tells_what_comes_next(tokenizer):
    """A model that says what the teacher says loses what the teacher does not know, and another one more."""
    torch.manual_seed(4)
    teacher, other = (trainer.make_model(len(tokenizer), 32, 1, 2).eval() for _ in range(2))
    ids = torch.randint(5, 300, (3, 20))
    loss = drafts.TaughtLoss(teacher, 3)
    assert loss(teacher, ids) < loss(other, ids)
    mixed, text = drafts.TaughtLoss(teacher, 1)(other, ids), trainer.text_loss(other, ids[1:])
    assert mixed.item() == pytest.approx((drafts.TaughtLoss(teacher, 1)(other, ids[:1]) + 2 * text).item() / 3)
