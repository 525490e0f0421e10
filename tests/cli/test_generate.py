"""hsrpc generate: the same tokens streamed, as JSON, from ids, from standard input and under every policy."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from hsrpc.cli.main import build_parser
from hsrpc.config import BUNDLED_MODEL
from hsrpc.prompt import Chat, Message
from hsrpc.request import Delta, Finish, FinishReason, Timings, Usage
from hsrpc.source import Remote
from tests.cli.conftest import SMALL

PROMPT = "The little robot"
GREEDY = ("generate", *SMALL, "--temperature=0", "--max-tokens=24")
HYBRID = ("--cache-policy=hybrid", "--activation-share=0.5")


def generated(hsrpc, *arguments: str) -> dict:
    """The JSON object of a greedy run."""
    ran = hsrpc(*GREEDY, *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def test_json_is_one_object_with_everything(hsrpc, tokenizer):
    """Token ids, text, why it ended, counts, times, and what the cache did."""
    found = generated(hsrpc, PROMPT, *HYBRID)
    assert set(found) == {"token_ids", "text", "finish_reason", "matched_stop", "usage", "timings", "cache"}
    assert found["text"] == tokenizer.decode(found["token_ids"], skip_special_tokens=True)
    assert (found["finish_reason"], found["matched_stop"]) == ("MAX_TOKENS", None)
    prompt_tokens = len(tokenizer(PROMPT).input_ids)
    nothing = dict.fromkeys(("preemptions", "cached_tokens", "drafted_tokens", "accepted_tokens"), 0)
    assert found["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 24} | nothing
    assert len(found["token_ids"]) == 24
    assert set(found["timings"]) == {"queue", "prefill", "decode", "first_token"}
    assert found["timings"]["first_token"] == pytest.approx(found["timings"]["queue"] + found["timings"]["prefill"])
    assert found["timings"]["decode"] > 0


def test_json_tells_what_the_cache_did(hsrpc):
    """With half the tokens as activations and weights on the host, both streamed and were rebuilt."""
    cache = generated(hsrpc, PROMPT, *HYBRID)["cache"]
    assert (cache["policy"], cache["activation_share"], cache["block_size"]) == ("hybrid", 0.5, 16)
    assert 0 <= cache["resident_share"] < 1
    assert cache["weights_streamed_bytes"] > 0
    assert cache["regenerated_tokens"] > 0
    assert cache["peak_blocks"]["host_activation"] + cache["peak_blocks"]["device_activation"] > 0
    assert cache["reason"]


def test_streaming_prints_the_same_text(hsrpc):
    """Without --json the text alone is on standard output, with a newline at its end."""
    ran = hsrpc(*GREEDY, PROMPT)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == generated(hsrpc, PROMPT)["text"] + "\n"


def test_token_ids_stand_for_a_prompt(hsrpc, tokenizer):
    """--token-ids with the prompt's ids gives the prompt's output."""
    ids = ",".join(map(str, tokenizer(PROMPT).input_ids))
    assert generated(hsrpc, "--token-ids", ids)["token_ids"] == generated(hsrpc, PROMPT)["token_ids"]


@pytest.fixture
def pipe_in(monkeypatch):
    """`pipe_in(data, encoding)` is what a shell does for `printf DATA | hsrpc`."""

    def pipe_in(data: bytes, encoding: str = "utf-8") -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding, "surrogateescape"))

    return pipe_in


@pytest.mark.parametrize("text", [PROMPT, f"{PROMPT}\n", f"\n {PROMPT}\r\n\n"], ids=ascii)
def test_a_dash_reads_standard_input(hsrpc, pipe_in, text):
    """`hsrpc generate -` is `hsrpc generate TEXT`, to the last newline and to the kind of newline."""
    pipe_in(text.encode())
    found, wanted = generated(hsrpc, "-"), generated(hsrpc, text)
    assert (found["usage"], found["token_ids"]) == (wanted["usage"], wanted["token_ids"])


def test_policies_give_the_same_tokens(hsrpc):
    """What is cached changes no token."""
    found = [generated(hsrpc, PROMPT, f"--cache-policy={policy}") for policy in ("kv", "activation", "recompute")]
    assert [one["cache"]["policy"] for one in found] == ["kv", "activation", "recompute"]
    assert found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
    assert generated(hsrpc, PROMPT, *HYBRID)["token_ids"] == found[0]["token_ids"]


def test_a_stop_string_ends_the_text(hsrpc):
    """The text ends before the string, which is named."""
    text = generated(hsrpc, PROMPT)["text"]
    stop = text[len(text) // 2 :][:4]
    found = generated(hsrpc, PROMPT, "--stop", "never said", "--stop", stop)
    assert (found["finish_reason"], found["matched_stop"]) == ("STOP_STRING", stop)
    assert found["text"] == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (r"\n", "\n"),
        (r"\t\r", "\t\r"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\x41\u00e9.", "Aé."),
        (r"\x4\u12\d\N\"", r"\x4\u12\d\N\""),
        ("end\\", "end\\"),
        ("a\nb", "a\nb"),
    ],
    ids=ascii,
)
def test_escapes_in_a_stop_string(given, text):
    """An escape stands for its character; a backslash before anything else stays."""
    assert build_parser().parse_args(["generate", "--stop", given, "hi"]).stop == [text]


def test_more_tokens_than_the_context_has_room_for(hsrpc):
    """A huge --max-tokens ends where --max-model-len ends, and says so."""
    found = generated(hsrpc, PROMPT, "--max-tokens", "1000000", "--ignore-eos")
    assert found["finish_reason"] == "CONTEXT_LENGTH"
    assert found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"] == 96


def test_a_seed_repeats_what_is_drawn(hsrpc):
    """With --seed, two runs with a temperature print the same; another seed prints something else."""
    drawn = {hsrpc("generate", *SMALL, "--max-tokens=24", "--seed", seed, PROMPT).out for seed in ("1", "1", "2")}
    assert len(drawn) == 2


@pytest.mark.parametrize("arguments", [("--temperature=0",), ("--seed=1",)], ids=" ".join)
def test_a_server_says_the_same(hsrpc, address, arguments):
    """With --target the text of a server is streamed: the embedded engine's, token by token, drawn ones too."""
    request = ("generate", *arguments, "--max-tokens=24", PROMPT)
    ran = hsrpc(*request, "--target", address)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == hsrpc(*request, *SMALL).out


def test_json_of_a_server_is_that_of_an_engine(hsrpc, address):
    """The same object, less how blocks are, which a server's state has not; its counters are all requests'."""
    ran = hsrpc("generate", "--temperature=0", "--max-tokens=24", PROMPT, "--target", address, "--json")
    found, embedded = json.loads(ran.out), generated(hsrpc, PROMPT)
    for name in ("token_ids", "text", "finish_reason", "matched_stop", "usage"):
        assert found[name] == embedded[name]
    assert found.keys() == embedded.keys()
    assert found["cache"].keys() == embedded["cache"].keys() - {"block_size", "format"}
    assert found["cache"]["peak_blocks"].keys() == embedded["cache"]["peak_blocks"].keys()
    assert found["cache"]["weights_streamed_bytes"] > 0


def test_a_server_refuses_as_an_engine_does(hsrpc, address):
    """One line that names the field."""
    ran = hsrpc("generate", "--target", address, "x " * 400)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: text: 801 prompt tokens; at most 383 fit")


def test_settings_of_an_engine_are_not_for_a_server(hsrpc):
    """They are refused, before anything is asked of the server."""
    ran = hsrpc("generate", "--target", "127.0.0.1:1", "--gpu-memory", "1GiB", "hi")
    problem = "has no meaning with --target 127.0.0.1:1; give it to the server, or leave it out"
    assert (ran.code, ran.err) == (1, f"hsrpc: error: gpu_memory='1GiB': {problem}\n")


def test_a_token_is_not_for_an_engine(hsrpc):
    """It is refused, so that nobody takes the engine for the server."""
    ran = hsrpc("generate", "--token-file", "token", "hi")
    problem = "has no meaning without a server; give --target HOST:PORT too"
    assert (ran.code, ran.err) == (1, f"hsrpc: error: token_file='token': {problem}\n")


def test_a_server_needs_no_engine_here():
    """With --target the command loads neither torch nor uvloop."""
    code = """
import sys
from hsrpc.cli.main import main
assert main(["generate", "--target", "127.0.0.1:1", "hi"]) == 1
sys.exit(" ".join(name for name in ("torch", "numpy", "uvloop") if name in sys.modules) or 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("hsrpc: error: UNAVAILABLE: ")


class SilentClient:
    """Answers with nothing."""

    def __init__(self, has_chat_template: bool) -> None:
        self._model = SimpleNamespace(name="mute", has_chat_template=has_chat_template)

    async def get_model(self) -> SimpleNamespace:
        return self._model

    @asynccontextmanager
    async def generate(self, *_: object, **__: object):
        async def deltas():
            yield Delta(finish=Finish(FinishReason.EOS, Usage(3, 1), Timings(0, 0, 0, 0)))

        yield deltas()


@pytest.mark.parametrize(
    ("has_chat_template", "prompt", "is_told"),
    [(True, "hi", True), (False, "hi", False), (True, [5], False), (True, Chat([Message("user", "hi")]), False)],
)
async def test_a_model_that_answers_text_with_nothing_wants_a_chat(caplog, has_chat_template, prompt, is_told):
    """A server's model gets the hint that an embedded one gets."""
    deltas = [delta async for delta in Remote(SilentClient(has_chat_template), None).generate(prompt, {})]
    assert len(deltas) == 1
    assert ("hsrpc chat" in caplog.text) == is_told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "PROMPT: empty; give text, or --token-ids"),
        (("--token-ids", ""), "--token-ids: '' is not a list of numbers such as 5,6,7"),
        (("--token-ids", "5,six"), "--token-ids: '5,six' is not a list of numbers"),
        (("--token-ids", "5,99999"), "token_ids[1]: 99999 is no token id; use 0 to 1535"),
        (("--token-ids", "-5"), "token_ids[0]: -5 is no token id"),
        (("x " * 200,), "text: 401 prompt tokens; at most 95 fit"),
        (("a\udcff",), "text: a lone surrogate U+DCFF at character 1; give valid Unicode"),
        (("hi", "--max-tokens", "0"), "max_tokens: 0 is outside [1, "),
        (("hi", "--temperature", "nan"), "temperature: nan is outside [0.0, 100.0]"),
        (("hi", "--stop", ""), "stop: each string must have 1 to 256 characters, found 0"),
        (("hi", "--gpu-memory", "1KiB"), "gpu_memory='1.0 KiB': too small for a context of 96: "),
        (("hi", "--host-memory", "1MiB"), "host_memory='1.0 MiB': "),
        (("hi", "--max-model-len", "5000"), "max_model_len=5000: "),
    ],
)
def test_what_cannot_be_generated_is_explained(hsrpc, arguments, message):
    """One line on standard error names the field, what was found and what is allowed; the exit code is 1."""
    ran = hsrpc("generate", *SMALL, *arguments)
    assert (ran.code, ran.out) == (1, "")
    [line] = ran.err.splitlines()
    assert line.startswith(f"hsrpc: error: {message}")


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"", "utf-8", "PROMPT: empty"),
        (
            b"a\xff",
            "utf-8",
            "PROMPT: standard input has byte 0xff at 1, which is not utf-8; convert it to utf-8, or set",
        ),
        (b"ab\x81", "cp1252", "PROMPT: standard input has byte 0x81 at 2, which is not cp1252; convert it to cp1252"),
    ],
)
def test_standard_input_without_text_is_refused(hsrpc, pipe_in, data, encoding, message):
    """Nothing, or bytes that are not of the encoding that standard input is read in, are no prompt."""
    pipe_in(data, encoding)
    ran = hsrpc("generate", "-")
    assert ran.code == 1
    assert ran.err.startswith(f"hsrpc: error: {message}")


def test_standard_input_that_is_closed(hsrpc, monkeypatch):
    """`hsrpc generate - <&-` says so."""
    monkeypatch.setattr("sys.stdin", None)
    ran = hsrpc("generate", "-")
    assert (ran.code, ran.err) == (1, "hsrpc: error: PROMPT: standard input is closed; give text, or --token-ids\n")


def test_a_hub_id_out_of_reach(hsrpc, monkeypatch, tmp_path):
    """A hub id that is not cached, without a network, says so and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ran = hsrpc("generate", "--model", "some-org/some-model", "hi")
    assert ran.code == 1
    problem = "'some-org/some-model' is not on this machine and the hub is out of reach"
    assert ran.err == f"hsrpc: error: {problem}; fetch it where there is a network and give its directory\n"


@pytest.fixture
def files(tmp_path):
    """A schema and a grammar in files."""
    (tmp_path / "schema.json").write_text('{"enum": [{"a": 1}, {"b": [2]}]}')
    (tmp_path / "list.lark").write_text('start: ITEM ("," ITEM)~2\nITEM: "fox" | "owl"\n')
    return tmp_path


def test_outputs_that_must_match(hsrpc, files):
    """Constraints of each kind, by an engine of its own."""
    for flags, pattern in (
        (("--json-schema", f"{files}/schema.json"), r'\{\s*"a"\s*:\s*1\s*\}|\{\s*"b"\s*:\s*\[\s*2\s*\]\s*\}'),
        (("--grammar", f"{files}/list.lark"), "((fox|owl),){2}(fox|owl)"),
        (("--regex", "[a-z]{3} [0-9]{2}"), "[a-z]{3} [0-9]{2}"),
        (("--choice", "one", "--choice", r"t\tw\x6f"), "one|t\two"),
        (("--json-object",), r"(?s)\{.*"),
    ):
        ran = hsrpc("generate", *SMALL, "--seed=1", "--max-tokens=70", *flags, PROMPT)
        assert (ran.code, ran.err) == (0, ""), flags
        assert re.fullmatch(pattern, ran.out.removesuffix("\n")), flags


def test_a_server_takes_the_same_constraints(hsrpc, address):
    """And its refusal is told as an engine's is."""
    ran = hsrpc("generate", "--target", address, "--choice", "fox", "--choice", "owl", PROMPT)
    assert (ran.code, ran.out.strip() in ("fox", "owl")) == (0, True)
    ran = hsrpc("generate", "--target", address, "--regex", "a(", PROMPT)
    assert ran.code == 1
    assert "regex: unclosed group, at character 1 of the expression" in ran.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--regex", "a", "--json-object"], "not allowed with argument --regex"),
        (["--json-schema", "there-is-none"], "json_schema='there-is-none': it cannot be read: No such file"),
        (["--json-schema", "{files}/list.lark"], "json_schema: not JSON"),
        (["--choice", ""], "choice[0]: empty"),
    ],
)
def test_constraints_that_are_none(hsrpc, files, flags, words):
    """Are told before a model is loaded."""
    ran = hsrpc("generate", "--model", "there-is-none", *(flag.format(files=files) for flag in flags), PROMPT)
    assert ran.code in (1, 2)
    assert words in ran.err
