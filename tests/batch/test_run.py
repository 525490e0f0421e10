"""Runs of lines: what comes of each, how many at a time, what is tried again, and what ends them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import grpc
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from hsrpc.batch import retry
from hsrpc.batch.call import read_call
from hsrpc.batch.caller import default_concurrency
from hsrpc.batch.line import read_line
from hsrpc.batch.order import Job
from hsrpc.batch.refusal import BatchError, Fault, Refusal
from hsrpc.batch.run import Runner, Tally
from hsrpc.client import CallError
from hsrpc.errors import (
    EngineFaultError,
    GaveWayError,
    HsrpcError,
    InvalidRequestError,
    NotFiniteError,
    OutOfDeviceMemoryError,
    QueueFullError,
)
from hsrpc.request import FinishReason
from tests.batch.support import Kept, StubSource, chat, completion, text_of


def jobs(*lines: dict[str, object]) -> Iterator[list[Job]]:
    """A window of lines, as they are."""
    found = []
    for number, line in enumerate(lines, start=1):
        read = read_line(number, json.dumps(line).encode())
        assert not isinstance(read.content, Fault)
        found.append(Job(read, read_call(*read.content)))
    yield found


@pytest.fixture
def source() -> StubSource:
    return StubSource()


@pytest.fixture
def kept() -> Kept:
    return Kept()


async def run(source: StubSource, kept: Kept, windows: Iterator[list[Job]], **settings: object) -> Tally:
    runner = Runner(source, kept, **({"concurrency": 4} | settings))
    await runner.run(windows)
    assert source.running == 0
    return runner.tally


async def test_each_line_has_an_answer(source, kept):
    """The answer is its own endpoint's, as the types of OpenAI's client read it."""
    tally = await run(source, kept, jobs(chat("a", logprobs=True, top_logprobs=2), completion("b", logprobs=1)))
    bodies = {line["custom_id"]: line["response"]["body"] for line in kept.lines}
    talk = ChatCompletion.model_validate(bodies["a"], strict=True)
    assert talk.to_dict() == bodies["a"]
    assert talk.choices[0].message.role == "assistant"
    assert len(talk.choices[0].logprobs.content) == talk.usage.completion_tokens
    assert len(talk.choices[0].logprobs.content[0].top_logprobs) == 2
    text = Completion.model_validate(bodies["b"], strict=True)
    assert text.to_dict() == bodies["b"]
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("say b", "stop")
    assert text.choices[0].logprobs.tokens == list("say b")
    assert text.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4]
    assert text.choices[0].logprobs.top_logprobs[0] == {"s": -0.5, "A": -1.0}
    assert [line["response"]["status_code"] for line in kept.lines] == [200, 200]
    assert [line["error"] for line in kept.lines] == [None, None]
    assert (tally.lines, tally.errors, tally.requests) == (2, 0, 2)


async def test_choices_of_prompts_and_n(source, kept):
    """One for each prompt, `n` times over, in order; a prompt's tokens count once."""
    tally = await run(source, kept, jobs(completion("a", prompt=["x", "yy"], n=2, seed=5)))
    [line] = kept.lines
    body = line["response"]["body"]
    assert [(each["index"], each["text"]) for each in body["choices"]] == [(0, "x"), (1, "x"), (2, "yy"), (3, "yy")]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert sorted(settings["seed"] for _, settings in source.asked) == [5, 5, 6, 6]
    assert (tally.requests, tally.prompt_tokens, tally.completion_tokens, tally.longest) == (4, 6, 6, 4)
    assert tally.cached_tokens == 2


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (FinishReason.EOS, "stop"),
        (FinishReason.STOP_STRING, "stop"),
        (FinishReason.STOP_TOKEN, "stop"),
        (FinishReason.MAX_TOKENS, "length"),
        (FinishReason.CONTEXT_LENGTH, "length"),
        (FinishReason.TIME_LIMIT, "length"),
    ],
)
async def test_why_an_output_ended(source, kept, reason, told):
    """In OpenAI's words."""
    source.reason = reason
    await run(source, kept, jobs(completion("a")))
    assert kept.lines[0]["response"]["body"]["choices"][0]["finish_reason"] == told


async def test_what_an_operator_aborts_is_in_error(source, kept):
    """It has no whole output."""
    source.reason = FinishReason.ABORTED
    await run(source, kept, jobs(completion("a")))
    assert kept.lines == []
    assert kept.errors[0]["response"]["body"]["error"]["code"] == "aborted"


@pytest.mark.parametrize("prompt", ["say b", list(b"say b")])
async def test_a_prompt_comes_back(source, kept, prompt):
    """In front of the output, in the text and in each list of logprobs, where its first token has none."""
    body = {"prompt": prompt, "echo": True, "logprobs": 1}
    lines = [completion("a", **body), completion("b", **body, max_tokens=0), completion("c", prompt=prompt, echo=True)]
    await run(source, kept, jobs(*lines))
    bodies = {line["custom_id"]: line["response"]["body"] for line in kept.lines}
    said = "say b" if isinstance(prompt, str) else " ".join(map(str, prompt))
    for custom_id, output in {"a": said, "b": "", "c": said}.items():
        [choice] = bodies[custom_id]["choices"]
        assert choice["text"] == "say b" + output
        assert choice["finish_reason"] == ("stop" if output else "length")
        if custom_id == "c":
            assert choice["logprobs"] is None
            continue
        found = choice["logprobs"]
        assert found["tokens"][0] == said[0] if isinstance(prompt, str) else "s"
        assert found["token_logprobs"][:2] == [None, -2.0]
        assert found["top_logprobs"][0] is None
        assert found["top_logprobs"][1].keys() == {"A", found["tokens"][1]}
        assert found["text_offset"][:2] == [0, 1]
        assert {len(each) for each in found.values()} == {len(said) + len(output)}


async def test_offsets_are_those_of_the_text(source, kept, monkeypatch):
    """A token that the tokenizer puts before a text is in the lists, and takes no place in the text."""

    async def tokenize(prompt):
        return [1, *map(ord, prompt.text)]

    monkeypatch.setattr(source, "tokenize", tokenize)
    await run(source, kept, jobs(completion("a", echo=True, logprobs=0, max_tokens=0, prompt="xsay")))
    found = kept.lines[0]["response"]["body"]["choices"][0]
    assert (found["text"], found["logprobs"]["tokens"]) == ("xsay", ["\x01", "s", "a", "y"])
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 2]


async def test_logprobs_of_what_text_cannot_tell(source, kept):
    """A part of a character has no bytes, minus infinity is a number, and a space at a token's beginning is kept."""
    prompt = chat("a", messages=[{"role": "user", "content": " \ufffd"}], logprobs=True)
    await run(source, kept, jobs(prompt))
    tokens = kept.lines[0]["response"]["body"]["choices"][0]["logprobs"]["content"]
    found = {token["token"]: token["bytes"] for token in tokens}
    assert found[" "] == [32]
    assert found["\ufffd"] is None


async def test_another_model_is_refused(source, kept):
    """With status 404, as the API does; the one that is served is named."""
    source.names = ("mine", "yours")
    await run(source, kept, jobs(completion("a", model="gpt-9"), completion("b", model="yours")))
    [refused] = kept.errors
    assert refused["response"]["status_code"] == 404
    assert refused["response"]["body"]["error"] == {
        "message": "model: 'gpt-9' is not served here; give 'mine'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert [line["custom_id"] for line in kept.lines] == ["b"]


async def test_lines_that_were_refused_before(source, kept):
    """A refusal is a response, a fault of the line an error; both have the line's ids."""
    refused = Job(read_line(1, b"{}"), Refusal(400, "stop: no", param="stop"))
    faulty = Job(read_line(2, b"oops"), Fault("invalid_json_line", "line 2: not JSON", 2))
    await run(source, kept, iter([[refused, faulty]]))
    first, second = kept.errors
    assert (first["response"]["status_code"], first["error"], first["id"]) == (400, None, refused.line.id)
    assert first["response"]["body"]["error"]["param"] == "stop"
    assert second["response"] is None
    assert second["error"] == {"code": "invalid_json_line", "message": "line 2: not JSON", "param": None, "line": 2}
    assert second["custom_id"] is None


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_so_many_run_at_once(source, kept, concurrency):
    """Requests, not lines; and no fewer while there are more."""
    source.seconds = 0.002
    lines = [completion(str(number), n=1 + number % 3) for number in range(8)]
    await run(source, kept, jobs(*lines), concurrency=concurrency)
    assert source.peak == concurrency
    assert len(kept.lines) == 8


def test_some_wait():
    """So that a place that gets free is taken at once."""
    assert [default_concurrency(size) for size in (1, 32, 512)] == [9, 40, 640]


async def test_lines_come_as_they_end(source, kept):
    """Not in the order in which they began."""
    source.failures["say 0"] = [QueueFullError("full", 0.02)]
    await run(source, kept, jobs(*(completion(str(number)) for number in range(3))))
    assert [text_of(line) for line in kept.lines] == ["say 1", "say 2", "say 0"]


async def test_seeds_are_those_of_lines(source, kept):
    """With a seed of the run, whatever runs before; other seeds give others."""

    async def seeds(seed: int | None, *names: str) -> dict[str, int | None]:
        source.asked.clear()
        await run(source, kept, jobs(*(completion(name) for name in names)), seed=seed)
        return {text: settings.get("seed") for text, settings in source.asked}

    first, later = await seeds(1, "a", "b"), await seeds(1, "b")
    assert first["say b"] == later["say b"] != first["say a"]
    assert (await seeds(2, "b"))["say b"] != later["say b"]
    assert (await seeds(None, "b"))["say b"] is None


def call_error(code: str, message: str = "", reason: str | None = None) -> CallError:
    error = CallError(grpc.StatusCode[code], message)
    error.reason = reason
    return error


@pytest.fixture
def quick(monkeypatch):
    """No time between attempts."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.001)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("full", 0.001),
        GaveWayError("full", 0.001),
        OutOfDeviceMemoryError("oom"),
        call_error("RESOURCE_EXHAUSTED"),
        call_error("RESOURCE_EXHAUSTED", reason="OUT_OF_DEVICE_MEMORY"),
        call_error("UNAVAILABLE"),
        call_error("DATA_LOSS"),
        call_error("INTERNAL"),
        call_error("CANCELLED"),
    ],
    ids=lambda error: str(error)[:30] or type(error).__name__,
)
async def test_what_passes_is_tried_again(source, kept, error):
    """By a new id, until it goes well."""
    source.failures["say a"] = [error, error]
    await run(source, kept, jobs(completion("a")))
    assert (len(kept.lines), len(kept.errors), len(source.asked)) == (1, 0, 3)


@pytest.mark.usefixtures("quick")
async def test_what_is_asked_beside_requests_is_tried_again(source, kept):
    """Which models there are, and texts of tokens for logprobs."""
    source.other_failures = [call_error("UNAVAILABLE")] * 3
    await run(source, kept, jobs(completion("a")))
    source.other_failures = [call_error("UNAVAILABLE"), QueueFullError("full", 0.001), call_error("INTERNAL")]
    await run(source, kept, jobs(completion("b", logprobs=0)))
    assert ([line["custom_id"] for line in kept.lines], kept.errors) == (["a", "b"], [])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "status", "param", "attempts"),
    [
        (InvalidRequestError("token_ids", "too many"), 400, "prompt", 1),
        (InvalidRequestError("text", "too long"), 400, "prompt", 1),
        (NotFiniteError("float16"), 500, None, 1),
        (call_error("INTERNAL", "not finite", "NOT_FINITE"), 500, None, 1),
        (call_error("INVALID_ARGUMENT", "bad"), 400, None, 1),
        (call_error("UNIMPLEMENTED", "no"), 400, None, 1),
        (call_error("NOT_FOUND", "no model"), 404, "model", 1),
        (call_error("RESOURCE_EXHAUSTED", "Received message larger than max (5 vs. 4)"), 400, None, 1),
        (call_error("INTERNAL", "error id 5"), 500, None, retry.MAX_ATTEMPTS),
        (OutOfDeviceMemoryError("oom"), 500, None, retry.MAX_ATTEMPTS),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, HsrpcError) else "",
)
async def test_what_is_a_request_s_own_fault(source, kept, error, status, param, attempts):
    """Becomes an error of its line, and others go on; by chance it may be only so often."""
    source.failures["say a"] = [error] * 9
    await run(source, kept, jobs(completion("a"), completion("b")))
    [refused] = kept.errors
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("a", status)
    assert refused["response"]["body"]["error"]["param"] == param
    assert [line["custom_id"] for line in kept.lines] == ["b"]
    assert len(source.asked) == attempts + 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [EngineFaultError("died"), call_error("UNAUTHENTICATED"), ValueError("a fault")])
async def test_what_all_requests_would_end_with(source, kept, error):
    """Ends the run, with the error itself; no line is in error for it, and nothing runs on."""
    source.failures["say b"] = [error]
    source.seconds = 0.001
    with pytest.raises(type(error)) as caught:
        await run(source, kept, jobs(completion("a"), completion("b")), concurrency=1)
    assert caught.value is error
    assert [line["custom_id"] for line in kept.lines] == ["a"]
    assert (kept.errors, source.running) == ([], 0)


@pytest.mark.usefixtures("quick")
async def test_a_server_that_is_gone(source, kept):
    """Is waited for as long as was asked; then the run ends, and says what it was."""
    source.failures["say a"] = [call_error("UNAVAILABLE", "no route")] * 10_000
    with pytest.raises(BatchError, match=r"UNAVAILABLE: no route; that has been so for 0 s \(--retry-seconds\)"):
        await run(source, kept, jobs(completion("a")), retry_seconds=0.02)
    assert kept.errors == []


async def test_a_choice_that_is_refused_refuses_its_line(source, kept):
    """Once, and what runs of it goes nowhere."""
    source.failures["bad"] = [InvalidRequestError("text", "no")]
    await run(source, kept, jobs(completion("a", prompt=["good", "bad", "good"])), concurrency=1)
    assert (len(kept.errors), len(kept.lines)) == (1, 0)
    assert [text for text, _ in source.asked] == ["good", "bad"]


async def test_a_run_that_is_cancelled(source, kept):
    """Ends its requests; what had ended was given away."""
    source.seconds = 0.005
    lines = [completion(str(number)) for number in range(40)]
    some = asyncio.Event()
    running = asyncio.create_task(run(source, kept, jobs(*lines), note=lambda _: some.set()))
    await some.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert source.running == 0
    assert 0 < len(kept.lines) < 40


async def test_an_input_that_breaks_off(source, kept):
    """Its error ends the run, once it is reached."""

    def windows() -> Iterator[list[Job]]:
        yield from jobs(completion("a"))
        raise BatchError("line 2: no")

    with pytest.raises(BatchError, match="line 2: no"):
        await run(source, kept, windows())


async def test_results_that_cannot_be_written(source, kept, monkeypatch):
    """End the run with the system's error."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "put", fail)
    with pytest.raises(OSError, match="No space left"):
        await run(source, kept, jobs(completion("a"), completion("b")))
