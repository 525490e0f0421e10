"""hsrpc batch: answers are those of the model, by an engine or a server; runs go on where they were ended."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsrpc.cli import batch
from hsrpc.config import BUNDLED_MODEL
from hsrpc.errors import EngineFaultError
from tests.batch.support import StubSource, chat, completion, custom_ids, read_lines, text_of, write_lines
from tests.cli.conftest import ROOT

ENGINE = ("--device=cpu", "--gpu-memory=24MiB", "--host-memory=64MiB", "--max-model-len=200", "--no-advice")
"""The bundled model with a device budget that its weights do not fit in."""
GREEDY = {"model": "storyteller", "temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]
LINES = [
    chat("talk", **GREEDY, messages=MESSAGES),
    completion("text", **GREEDY, prompt="Once upon a time"),
    completion("ids", **GREEDY, prompt=[[2, 47, 11], [5, 6, 7]]),
    completion("long", **GREEDY, prompt="x " * 300),
    chat("tools", **GREEDY, tools=[{"type": "function"}]),
    completion("other", **(GREEDY | {"model": "gpt-9"})),
    b"oops",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", LINES)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def errors_of(output: Path) -> dict[str | None, dict[str, object]]:
    return {line["custom_id"]: line for line in read_lines(output.with_name("out.errors.jsonl"))}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[str]]:
    """What transformers generates for each line, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)

    def generate(ids: list[int]) -> str:
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)

    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return {
        "talk": [generate(tokenizer.encode(rendered, add_special_tokens=False))],
        "text": [generate(tokenizer("Once upon a time").input_ids)],
        "ids": [generate([2, 47, 11]), generate([5, 6, 7])],
    }


def check(output: Path, expected: dict[str, list[str]]) -> None:
    """Every line went where it belongs, with the text of the reference."""
    lines = {line["custom_id"]: line for line in read_lines(output)}
    found = {
        name: [each.get("text") or each["message"]["content"] for each in line["response"]["body"]["choices"]]
        for name, line in lines.items()
    }
    assert found == expected
    errors = errors_of(output)
    assert {name: each["response"] and each["response"]["status_code"] for name, each in errors.items()} == {
        "long": 400,
        "tools": 400,
        "other": 404,
        None: None,
    }
    told = {name: each["response"]["body"]["error"]["param"] for name, each in errors.items() if name is not None}
    assert told == {"long": "prompt", "tools": "tools", "other": "model"}


def test_answers_are_those_of_the_reference(hsrpc, source, output, expected):
    """Then there is nothing left to do, and no model is loaded for that."""
    ran = hsrpc("batch", str(source), str(output), *ENGINE)
    assert (ran.code, ran.out) == (0, "")
    check(output, expected)
    told = ran.err.splitlines()
    assert told[0] == f"{'lines':28} 7, 4 of them in error: {output.with_name('out.errors.jsonl')}"
    assert [line.split("  ")[0] for line in told[1:]] == ["tokens", "time", "share of the limit", "requests at once"]
    before = output.read_bytes()
    ran = hsrpc("batch", str(source), str(output), "--model", "./there-is-none")
    assert (ran.code, ran.out, ran.err) == (0, "", "hsrpc: all 7 lines are done\n")
    assert output.read_bytes() == before


def test_a_server_gives_the_same(hsrpc, source, output, expected, address):
    """With its own refusals in the same form, but for the longer context that this one has."""
    lines = [line if line != LINES[3] else completion("long", **GREEDY, prompt="x " * 600) for line in LINES]
    ran = hsrpc("batch", str(write_lines(source, lines)), str(output), "--target", address)
    assert (ran.code, ran.out) == (0, "")
    check(output, expected)


SCHEMA = {"type": "array", "items": {"enum": ["fox", 7]}, "minItems": 2, "maxItems": 2}
STRUCTURED = {
    "object": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "regex": {"structured_outputs": {"regex": "[a-z]{3}-[0-9]{2}"}},
    "choice": {"structured_outputs": {"choice": ["fox", "owl"]}},
}


@pytest.mark.parametrize("is_remote", [False, True])
def test_answers_match_what_they_must(hsrpc, source, output, address, is_remote):
    """Constraints of each kind, of both endpoints, several of a line."""
    asked = GREEDY | {"max_tokens": 120, "temperature": 1, "n": 2}
    lines = [make(name, **asked, **body) for make in (chat, completion) for name, body in STRUCTURED.items()]
    lines = [{**line, "custom_id": f"{number}-{line['custom_id']}"} for number, line in enumerate(lines)]
    where = ("--target", address) if is_remote else ENGINE
    ran = hsrpc("batch", str(write_lines(source, lines)), str(output), *where)
    assert (ran.code, errors_of(output)) == (0, {})
    for line in read_lines(output):
        for choice in line["response"]["body"]["choices"]:
            text = choice.get("text") or choice["message"]["content"]
            assert choice["finish_reason"] == "stop"
            match line["custom_id"].partition("-")[2]:
                case "object":
                    assert set(json.loads(text)) <= {"fox", 7}
                case "regex":
                    assert re.fullmatch("[a-z]{3}-[0-9]{2}", text)
                case _:
                    assert text in ("fox", "owl")


def test_a_schema_that_cannot_be_is_told_with_where(hsrpc, source, output):
    """By the line's own name for it; the others run."""
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"type": "text"}}}}
    lines = [chat("wrong", **GREEDY, response_format=wrong), completion("right", **GREEDY)]
    ran = hsrpc("batch", str(write_lines(source, lines)), str(output), *ENGINE)
    assert (ran.code, list(custom_ids(output))) == (0, ["right"])
    response = errors_of(output)["wrong"]["response"]
    assert (response["status_code"], response["body"]["error"]["param"]) == (400, "response_format.json_schema.schema")
    assert "at /items: Invalid type: text" in response["body"]["error"]["message"]


def test_it_goes_on_where_it_was_ended(hsrpc, source, output, expected):
    """By Ctrl-C: it says how to go on, and the same command does; what was torn meanwhile runs again."""
    write_lines(source, [*LINES, *(completion(f"r{number}", **GREEDY, n=4) for number in range(400))])
    command = [sys.executable, "-m", "hsrpc.cli.main", "batch", str(source), str(output), *ENGINE, "--concurrency=4"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not output.exists() or not output.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    done = len(read_lines(output)) + len(errors_of(output))
    assert process.returncode == 130
    assert told == f"hsrpc: {done} lines are done; the same command goes on with the rest\n"
    with output.open("ab") as file:
        file.write(b'{"id": "batch_req_5')
    write_lines(source, [*LINES, completion("r0", **GREEDY, n=4)])
    assert hsrpc("batch", str(source), str(output), *ENGINE).code == 0
    lines = {name: count for name, count in custom_ids(output).items() if not name.startswith("r")}
    assert lines == dict.fromkeys(expected, 1)


def test_pipes_and_gzip(tmp_path, address):
    """Compressed lines on standard input, lines on standard output, errors in a file that is compressed."""
    errors = tmp_path / "errors.jsonl.gz"
    command = [sys.executable, "-m", "hsrpc.cli.main", "batch", "-", "-", "--errors", errors, "--target", address]
    lines = [completion("a", **GREEDY), completion("b", **(GREEDY | {"model": "gpt-9"}))]
    data = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    ran = subprocess.run(command, cwd=ROOT, input=data, capture_output=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)["custom_id"] for line in ran.stdout.splitlines()] == ["a"]
    assert custom_ids(errors) == {"b": 1}


def test_an_interrupt_while_standard_input_says_nothing(output, address):
    """Ends at once."""
    command = [sys.executable, "-m", "hsrpc.cli.main", "batch", "-", str(output), "--target", address]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(json.dumps(completion("a", **GREEDY)).encode() + b"\n")
        process.stdin.flush()
        while not output.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert time.monotonic() - began < 5


@pytest.fixture
def stub(monkeypatch) -> StubSource:
    """Answers in place of any engine or server."""
    stub = StubSource()

    @contextmanager
    def running(*_: object, **__: object):
        with asyncio.Runner() as runner:
            yield runner.run, stub

    monkeypatch.setattr(batch, "running_source", running)
    return stub


def test_an_engine_that_dies_says_how_to_go_on(hsrpc, stub, tmp_path, output):
    """Beside what it died of."""
    source = write_lines(tmp_path / "in.jsonl", [completion("a"), completion("b")])
    stub.failures["say b"] = [EngineFaultError("an engine task died; see the log")]
    ran = hsrpc("batch", str(source), str(output), "--concurrency=1", "--target=x:1")
    assert ran.code == 1
    assert ran.err.splitlines() == [
        "hsrpc: 1 lines are done; the same command goes on with the rest",
        "hsrpc: error: an engine task died; see the log",
    ]
    ran = hsrpc("batch", str(source), str(output), "--target=x:1")
    assert (ran.code, ran.err.splitlines()[0]) == (0, "hsrpc: 1 lines were done before; going on with the rest")
    assert custom_ids(output) == {"a": 1, "b": 1}


def test_standard_output_that_nobody_reads(tmp_path, address):
    """Ends quietly, as a program that SIGPIPE ended."""
    source = write_lines(tmp_path / "in.jsonl", [completion(str(number), **GREEDY, n=20) for number in range(20)])
    command = [sys.executable, "-m", "hsrpc.cli.main", "batch", source, "-", "--errors", tmp_path / "errors"]
    ours, theirs = os.pipe()
    os.close(ours)
    ran = subprocess.run([*command, "--target", address], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert ran.returncode == 141
    assert b"Traceback" not in ran.stderr


def test_a_server_needs_no_engine_here(tmp_path):
    """With --target the command loads neither torch nor what else the client's installation lacks."""
    source = write_lines(tmp_path / "in.jsonl", [completion("a")])
    code = f"""
import sys
from hsrpc.cli.main import main
arguments = ["batch", {str(source)!r}, {str(tmp_path / "out")!r}, "--target", "127.0.0.1:1", "--retry-seconds=0"]
assert main(arguments) == 1
names = ("torch", "numpy", "uvloop", "rich", "tqdm", "hsrpc.plan.plan")
sys.exit(" ".join(name for name in names if name in sys.modules) or 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "hsrpc: error: UNAVAILABLE: " in ran.stderr


def test_shards_share_an_input(hsrpc, tmp_path, address):
    """Every line is in the output of one of them, and nowhere else."""
    source = write_lines(tmp_path / "in.jsonl", [completion(f"r{number}", **GREEDY) for number in range(5)])
    outputs = [tmp_path / f"out{index}.jsonl" for index in range(2)]
    for index, output in enumerate(outputs):
        ran = hsrpc("batch", str(source), str(output), "--shard", f"{index}/2", "--target", address)
        assert ran.code == 0, ran.err
    assert [set(custom_ids(output)) for output in outputs] == [{"r0", "r2", "r4"}, {"r1", "r3"}]


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "1/2/3", "one/2"])
def test_a_shard_that_is_none(hsrpc, source, output, shard):
    """Says what one looks like."""
    ran = hsrpc("batch", str(source), str(output), f"--shard={shard}")
    assert ran.code == 2
    assert f"{shard!r} is no shard; give I/N with I from 0 to N - 1, such as 0/8 for the first of eight" in ran.err


def test_a_dry_run_counts_and_predicts(hsrpc, source, tmp_path):
    """Nothing is run, and nothing is written."""
    ran = hsrpc("batch", str(source), str(tmp_path / "out"), *ENGINE, "--dry-run")
    assert ran.code == 0
    rows = {line[:28].strip(): line[29:] for line in ran.out.splitlines()}
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)["input_ids"]
    sizes = [len(rendered), len(tokenizer("Once upon a time").input_ids), 3, 3, len(tokenizer("x " * 300).input_ids)]
    assert rows["lines"] == "7, 3 of them to be refused"
    assert rows["requests"] == "5"
    assert rows["prompt tokens"] == f"{sum(sizes)}: {sum(sizes) / 5:.0f} each, {max(sizes)} at most"
    assert rows["output tokens"] == "at most 60"
    assert rows["longest request"] == f"{max(sizes) + 12} tokens, line 4"
    assert rows["to set"].startswith("--max-model-len 512") or rows[""].startswith("more than the model's 512")
    assert rows["time, as set"].endswith("predicted")
    assert list(tmp_path.iterdir()) == [source]


def test_a_dry_run_of_a_server(hsrpc, source, address):
    """Its tokenizer counts, and it says how fast it is."""
    ran = hsrpc("batch", str(source), "--dry-run", "--target", address)
    assert ran.code == 0
    rows = {line[:28].strip(): line[29:] for line in ran.out.splitlines()}
    assert rows["output tokens"] == "at most 60"
    assert "as the server predicts" in rows["time"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in.jsonl", "-"), "errors=None: standard output has no file beside it; give --errors FILE"),
        (("in.jsonl", "in.jsonl"), "output='in.jsonl': the same file as input; give another one"),
        (("in.jsonl", "out", "--errors=./out"), "errors='out': the same file as output; give another one"),
        (("in.jsonl", "out", "--errors=in.jsonl"), "errors='in.jsonl': the same file as input; give another one"),
        (("in.jsonl", "no/out"), "output='no/out': its directory is not there; make it first"),
        (("in.jsonl", "out", "--errors=no/out"), "errors='no/out': its directory is not there; make it first"),
        (("in.jsonl", "-", "--errors=old"), "errors='old': has lines of an earlier run, which cannot be gone on with"),
        (("in.jsonl", "out", "--window=5x"), "window='5x': not a positive size"),
        (("in.jsonl", "out", "--concurrency=0"), "concurrency=0: not a positive whole number"),
        (("in.jsonl", "out", "--served-model-name=a", "--target=x:1"), "served_model_name='a': has no meaning with"),
        (("none", "out"), "[Errno 2] No such file or directory: 'none'"),
        (("in.jsonl", "old"), "old: holds something else than output of a batch; give another file"),
        (("twice", "out"), "line 2: custom_id 'a' is that of line 1; give each line one of its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_run_is_explained(hsrpc, tmp_path, monkeypatch, arguments, message):
    """Before a model is loaded; nothing that was there is changed."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in.jsonl"), [completion("a")])
    write_lines(Path("twice"), [completion("a"), completion("a")])
    Path("old").write_text("precious")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    ran = hsrpc("batch", *arguments)
    assert (ran.code, ran.out) == (1, "")
    [line] = ran.err.splitlines()
    assert line.startswith(f"hsrpc: error: {message}")
    assert {path: path.read_bytes() for path in before} == before
    assert not Path("none").exists()
    assert "none" not in arguments or not Path("out").exists()


def test_an_output_is_needed(hsrpc):
    """But for a dry run."""
    ran = hsrpc("batch", "in.jsonl")
    assert ran.code == 2
    assert "the following arguments are required: OUT; see `hsrpc batch --help`" in ran.err


@pytest.mark.parametrize(
    ("prompts", "flags", "planned"),
    [
        ([[*range(5, 45), n, 9] for n in range(50, 56)], (), 40),
        ([[*range(5, 45), n, 9] for n in range(50, 56)], ("--expected-shared-prefix=20",), None),
        ([[*range(5, 45), n, 9] for n in range(50, 56)], ("--no-prefix-cache",), None),
        ([[n, *range(5, 45)] for n in range(50, 56)], (), None),
    ],
    ids=["shared", "given", "no cache", "not shared"],
)
def test_the_plan_counts_on_what_prompts_share(hsrpc, tmp_path, output, prompts, flags, planned):
    """Where they share a block or more and no flag says otherwise; what is planned with is told."""
    lines = [completion(str(n), **GREEDY, prompt=prompt) for n, prompt in enumerate(prompts)]
    ran = hsrpc("batch", str(write_lines(tmp_path / "in.jsonl", lines)), str(output), *ENGINE, *flags)
    assert ran.code == 0
    told = re.findall(r"planning with --expected-shared-prefix (\d+)", ran.err)
    assert told == ([] if planned is None else [str(planned)])
    assert len(read_lines(output)) == len(prompts)


def test_names_of_the_model(hsrpc, tmp_path, output):
    """Those given, in place of its own."""
    source = write_lines(
        tmp_path / "in.jsonl", [completion("a", **GREEDY), completion("b", **(GREEDY | {"model": "m"}))]
    )
    assert hsrpc("batch", str(source), str(output), *ENGINE, "--served-model-name=l,m").code == 0
    [line] = read_lines(output)
    assert (line["custom_id"], line["response"]["body"]["model"]) == ("b", "m")
    assert text_of(line)
