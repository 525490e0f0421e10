"""What a client of the OpenAI port is told, and what it gets of tools, over an engine that says what it is told to."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest

from hsrpc.errors import EngineUnavailableError, NotFiniteError, OutOfDeviceMemoryError, QueueFullError
from hsrpc.request import FinishReason, SamplingParams
from tests.server.openai.conftest import Running, ScriptedEngine, running

MODEL = "fake/model"
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEMPLATE = """\
{% for tool in tools or [] %}TOOL {{ tool.function.name }}: {{ tool.function.description }}
{% endfor %}\
{% for message in messages %}{{ message.role }}: {{ message.content or '' }}\
{% for call in message.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}\
{% endfor %}
{% endfor %}assistant: """
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOL = {"name": "multiply", "description": "a times b", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'


OWN = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1)


class ToolsEngine(ScriptedEngine):
    """Its template has tools, and its model defaults of its own."""

    chat_template = TEMPLATE

    def __init__(self) -> None:
        super().__init__()
        self.default_params = OWN


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(ToolsEngine, tool_call_parser="qwen", served_model_names=(MODEL, "alias")) as found:
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[openai.OpenAI]:
    served.engine.answer = "Once upon a time"
    served.engine.refusal = None
    with served.client() as client:
        yield client


@pytest.mark.parametrize(
    ("refusal", "error", "status", "words"),
    [
        (QueueFullError("secret"), openai.RateLimitError, 429, "the queue is full"),
        (OutOfDeviceMemoryError("secret"), openai.RateLimitError, 429, "out of memory"),
        (EngineUnavailableError("secret"), openai.InternalServerError, 503, "takes no requests now"),
        (NotFiniteError("float16"), openai.InternalServerError, 500, "not finite in float16"),
        (ValueError("secret"), openai.InternalServerError, 500, "internal error [0-9a-f]{32}"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_statuses_become_those_of_http(client, served, refusal, error, status, words, stream):
    """By docs/grpc.md's table, with the server's words and nothing of its inside."""
    served.engine.refusal = refusal
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**ASKED, stream=stream)
    assert caught.value.status_code == status
    assert "secret" not in str(caught.value)


def test_anthropics_errors_are_its_own(client, served):
    """The same of the other SDK."""
    served.engine.refusal = QueueFullError("secret")
    with (
        anthropic.Anthropic(base_url=served.url.removesuffix("/v1"), auth_token="none", max_retries=0) as claude,
        pytest.raises(anthropic.RateLimitError, match="the queue is full"),
    ):
        claude.messages.create(max_tokens=5, **ASKED)


def test_names_that_the_operator_gives(client):
    """Each is taken, and answers say the first."""
    assert [client.chat.completions.create(**ASKED | {"model": name}).model for name in (MODEL, "alias")] == [MODEL] * 2


def test_what_a_request_says_reaches_the_engine(client, served):
    """Settings that OpenAI's API has, and those that it has not."""
    extra = {"top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5, "stop_token_ids": [7], "ignore_eos": True}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    client.chat.completions.create(
        **ASKED, temperature=0.5, top_p=0.75, seed=3, max_tokens=9, stop=["x"], **penalties, extra_body=extra
    )
    params = served.engine.submitted[-1]
    found = {name: getattr(params, name) for name in ("temperature", "top_p", "seed", "max_tokens", *penalties, *extra)}
    assert found == penalties | extra | {
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 3,
        "max_tokens": 9,
        "stop_token_ids": (7,),
    }
    assert params.stop == ("x",)
    client.chat.completions.create(**ASKED, extra_body={"top_k": -1})
    assert served.engine.submitted[-1].top_k == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_request_leaves_out_is_the_models_own(client, served, stream):
    """As by gRPC: the gateway is told of the model's defaults."""
    for answer in (
        client.chat.completions.create(**ASKED, stream=stream),
        client.completions.create(model=MODEL, prompt="Hi", max_tokens=9, stream=stream),
    ):
        list(answer)
        params = served.engine.submitted[-1]
        assert [getattr(params, name) for name in DEFAULTED] == [getattr(OWN, name) for name in DEFAULTED]


def test_an_abort_is_an_end(client, served):
    """A stream that somebody else ends brings what there is, and a reason."""
    served.engine.answer = None
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(lambda: list(client.chat.completions.create(**ASKED, stream=True)))
        served.until(lambda: served.engine.live)
        [request_id] = served.engine.live

        async def end() -> None:
            await served.engine.write(request_id, "Once upon")
            served.engine.end(request_id, FinishReason.ABORTED)

        served.do(end())
        chunks = reading.result()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Once upon"
    assert chunks[-1].choices[0].finish_reason == "abort"


def test_a_tool_is_called(client, served):
    """The template has the tools, and what the model says in its notation is a call; its result goes back."""
    served.engine.answer = CALL
    answer = client.chat.completions.create(**ASKED, tools=TOOLS)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("multiply", {"a": 6, "b": 7})
    assert "TOOL multiply: a times b" in prompt(served)
    served.engine.answer = "42"
    said = [*ASKED["messages"], choice.message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert client.chat.completions.create(model=MODEL, messages=said, tools=TOOLS).choices[0].message.content == "42"
    assert "CALL multiply {" in prompt(served)
    assert "tool: 42" in prompt(served)


def test_a_call_of_a_tool_streams(client, served):
    """In pieces that make its arguments."""
    served.engine.answer = CALL
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**ASKED, tools=TOOLS, stream=True)]
    pieces = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert "".join(piece.name or "" for piece in pieces) == "multiply"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == {"a": 6, "b": 7}
    assert not any(delta.content for delta in deltas)


def test_a_tool_of_anthropics(client, served):
    """A block of its own kind."""
    served.engine.answer = CALL
    tool = {"name": "multiply", "description": "a times b", "input_schema": PARAMETERS}
    with anthropic.Anthropic(base_url=served.url.removesuffix("/v1"), auth_token="none", max_retries=0) as claude:
        message = claude.messages.create(max_tokens=50, **ASKED, tools=[tool])
    [block] = [block for block in message.content if block.type == "tool_use"]
    assert (block.name, block.input, message.stop_reason) == ("multiply", {"a": 6, "b": 7}, "tool_use")


def test_the_gateway_connects_to_nobody(client):
    """A request may name a server of tools: it is not looked up from here."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        tool = {"type": "mcp", "server_label": "x", "server_url": url, "require_approval": "never"}
        with pytest.raises(openai.APIStatusError, match="MCP"):
            client.responses.create(model=MODEL, input="Hi", tools=[tool])
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


def prompt(served: Running) -> str:
    """The text of the prompt that the engine got last."""
    return served.do(served.engine.tokenizer.decode(list(served.engine.prompts[-1]), "", False))
