"""The SDKs of OpenAI and Anthropic against the OpenAI port: what they get is what hsrpc.v1 gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal

import anthropic
import openai
import pydantic
import pytest
import torch

from hsrpc.client import Client
from hsrpc.config import EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.prompt import Chat
from tests.server.openai.conftest import Running, running

MODEL = "storyteller"
QUESTION = {"role": "user", "content": "Tell me a story about a fox."}
CHAT = [{"role": "system", "content": "Be kind."}, QUESTION]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "animal",
        "schema": {
            "type": "object",
            "properties": {"kind": {"enum": ["fox", "owl"]}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    },
}
NO_SCHEMA = (openai.BadRequestError, "sampling_params.json_schema: at the root: Invalid type: text")
CONFIG = EngineConfig(device="cpu", dtype="float32", host_memory="64MiB", max_model_len=256, max_batch=8)


def make_engine() -> Engine:
    torch.set_num_threads(1)
    return Engine(CONFIG)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """The bundled model."""
    with running(make_engine) as found:
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture
def claude(served: Running) -> Iterator[anthropic.Anthropic]:
    base = served.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=base, auth_token="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def direct(served: Running) -> Iterator[Client]:
    with Client(served.server.address) as client:
        yield client


def test_models(client):
    """The one that is loaded, by its name."""
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_chat_is_what_it_is_in_v1(client, direct):
    """Prompt, text, counts and reason: the template is rendered elsewhere, and to the same."""
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=24, temperature=0)
    own = direct.complete(Chat(CHAT), max_tokens=24, temperature=0)
    [choice] = answer.choices
    assert choice.message.content == own.text
    assert choice.finish_reason == "length"
    usage = own.finish.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (usage.prompt_tokens, 24)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_chat_streams(client, direct):
    """Piece by piece, the reason in the last and the usage after it."""
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == direct.complete(Chat(CHAT), max_tokens=24, temperature=0).text
    assert len(list(filter(None, texts))) > 4
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 24


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_what_it_is_in_v1(client, direct, stream):
    """The prompt begins with the tokens that a text begins with, which the gateway leaves out."""
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    if stream:
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    else:
        text = client.completions.create(**asked).choices[0].text
    assert text == direct.complete("Once upon a time", max_tokens=24, temperature=0).text


def test_a_seed_gives_the_same_tokens_by_either_door(client, direct):
    """As do the settings, which cross in half the bits."""
    settings = {"temperature": 0.9, "top_p": 0.85, "seed": 7, "max_tokens": 24}
    extra = {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.1}
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **settings, extra_body=extra)
    assert answer.choices[0].message.content == direct.complete(Chat(CHAT), **settings, **extra).text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models(client, direct, stream):
    """Those of each token, and of the most probable ones."""
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]
        found = [each for part in chunks if part is not None for each in part.content]
    else:
        found = client.chat.completions.create(**asked).choices[0].logprobs.content
    own = direct.complete(Chat(CHAT), max_tokens=5, temperature=0, logprobs=2).logprobs
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in own], rel=1e-5)
    tops = [[top.logprob for top in each.top_logprobs] for each in found]
    assert tops == [pytest.approx([value for _, value in each.top], rel=1e-5) for each in own]
    assert "".join(each.token for each in found) == direct.complete(Chat(CHAT), max_tokens=5, temperature=0).text


def test_stop_strings_end_it(client):
    """Before the string, which is no part of the text."""
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, stop=["."])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (text.partition(".")[0], "stop")
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"temperature": 5.0}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "fox " * 300}]}, openai.BadRequestError, "context length"),
        ({"stop": [f"{number}" for number in range(17)]}, openai.BadRequestError, "stop"),
        ({"extra_body": {"stop_token_ids": [99_999]}}, openai.BadRequestError, r"sampling_params.stop_token_ids\[0\]"),
        ({"model": "another"}, openai.NotFoundError, "another"),
        ({"n": 2}, openai.InternalServerError, "sampling_params.n of 2"),
        ({"response_format": SCHEMA | {"json_schema": {"name": "x", "schema": {"type": "text"}}}}, *NO_SCHEMA),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "sampling_params.regex: unclosed group"),
    ],
)
def test_errors_are_those_of_the_sdk(client, served, asked, error, words):
    """Each of its class, with the field; 501 is what a server lacks."""
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**({"model": MODEL, "messages": CHAT} | asked))
    assert error is not openai.InternalServerError or caught.value.status_code == 501
    assert not served.engine.stats().running


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_followed(client, stream):
    """JSON, whatever the model would rather say; whole, and in pieces."""
    asked = {"model": MODEL, "messages": CHAT, "response_format": SCHEMA, "max_tokens": 60}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**asked).choices
        text, reason = choice.message.content, choice.finish_reason
    assert json.loads(text)["kind"] in ("fox", "owl")
    assert reason == "stop"


def test_a_class_is_parsed(client):
    """As the SDK makes a schema of it, and it of the answer."""

    class Animal(pydantic.BaseModel):
        kind: Literal["fox", "owl"]
        is_old: bool

    parsed = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Animal, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    own = client.responses.parse(model=MODEL, input=QUESTION["content"], text_format=Animal, temperature=0)
    assert isinstance(own.output_parsed, Animal)


def test_any_object(client):
    """An object, of which this model may say more than it has room for."""
    asked = {"model": MODEL, "messages": CHAT, "response_format": {"type": "json_object"}, "max_tokens": 60}
    [choice] = client.chat.completions.create(**asked, temperature=0).choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_expressions_and_grammars(client, direct):
    """By smg's own names, of both endpoints; a completion has a schema's text."""
    for extra, pattern in (
        ({"regex": "[a-z]{3}-[0-9]{2}"}, "[a-z]{3}-[0-9]{2}"),
        ({"ebnf": 'root ::= item item\nitem ::= "a" | "(" [0-9] ")"'}, r"(a|\([0-9]\)){2}"),
    ):
        said = client.chat.completions.create(model=MODEL, messages=CHAT, extra_body=extra).choices[0].message.content
        text = client.completions.create(model=MODEL, prompt="Hi", max_tokens=60, extra_body=extra).choices[0].text
        assert re.fullmatch(pattern, said)
        assert re.fullmatch(pattern, text)
    schema = {"json_schema": json.dumps({"enum": ["fox", "owl"]})}
    text = client.completions.create(model=MODEL, prompt="Hi", max_tokens=60, extra_body=schema).choices[0].text
    assert json.loads(text) in ("fox", "owl")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "see"}}], ids=str)
def test_a_call_of_a_tool_can_be_forced(client, choice):
    """Its arguments are what the tool takes. Of a required call the list may go on: with this seed it does not."""
    parameters = SCHEMA["json_schema"]["schema"]
    tools = [{"type": "function", "function": {"name": "see", "parameters": parameters}}]
    asked = {"model": MODEL, "messages": CHAT, "tools": tools, "tool_choice": choice, "max_tokens": 200}
    [call] = client.chat.completions.create(**asked, temperature=1, seed=0).choices[0].message.tool_calls
    assert call.function.name == "see"
    assert json.loads(call.function.arguments)["kind"] in ("fox", "owl")


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancel_frees_the_blocks(client, served, stream):
    """A client that goes away, amid its stream or before its answer, leaves nothing in the engine."""
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    if stream:
        call = client.chat.completions.create(**asked, stream=True)
        next(iter(call))
        assert served.engine.stats().running
        call.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**asked, timeout=0.05)
    served.until(lambda: not served.engine.integrity())
    assert not any(served.engine.stats().used_blocks.values())


def test_messages(claude, direct):
    """Anthropic's API, whole and streamed, with what ended it."""
    asked = {"model": MODEL, "max_tokens": 24, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    own = direct.complete(Chat([QUESTION]), max_tokens=24, temperature=0)
    message = claude.messages.create(**asked)
    assert (message.content[0].text, message.stop_reason) == (own.text, "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (own.finish.usage.prompt_tokens, 24)
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == own.text
        assert stream.get_final_message().usage.output_tokens == 24
    ended = claude.messages.create(**asked | {"stop_sequences": ["fox"]})
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", "fox")


def test_messages_with_errors(claude):
    """They are of the SDK's classes too."""
    with pytest.raises(anthropic.NotFoundError, match="another"):
        claude.messages.create(model="another", max_tokens=5, messages=[QUESTION])
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=MODEL, max_tokens=5, messages=[])


def test_responses(client, direct):
    """OpenAI's newer API; nothing is stored."""
    answer = client.responses.create(model=MODEL, input=QUESTION["content"], max_output_tokens=24, temperature=0)
    assert answer.output_text == direct.complete(Chat([QUESTION]), max_tokens=24, temperature=0).text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_its_calls_are_the_servers(client, served, direct):
    """They count as those of gRPC do."""
    before = direct.get_server_info().measured.prompt_tokens
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3)
    assert direct.get_server_info().measured.prompt_tokens == before + answer.usage.prompt_tokens
