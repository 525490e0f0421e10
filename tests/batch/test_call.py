"""Bodies of the two endpoints: what they ask of an engine, and what is refused, by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.batch.call import MAX_N, Call, read_call
from hsrpc.batch.line import Endpoint
from hsrpc.batch.refusal import Refusal, UnservedError
from hsrpc.constraint import Choice, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Chat, Text
from tests.batch.support import chat, completion


def chat_call(**body: object) -> Call:
    return read_call(Endpoint.CHAT, chat("a", **body)["body"])


def completion_call(**body: object) -> Call:
    return read_call(Endpoint.COMPLETIONS, completion("a", **body)["body"])


@pytest.mark.parametrize("call", [chat_call, completion_call])
def test_settings_of_both(call):
    """By OpenAI's names; null is absent."""
    given = {"temperature": 0, "top_p": 0.5, "frequency_penalty": 1, "presence_penalty": -1, "seed": 7}
    given |= {"logit_bias": {"5": -100}, "stop": "end", "max_tokens": 9}
    found = call(**given, user="me", metadata={"a": "b"}, n=None, stream=False, response_format={"type": "text"})
    assert found.settings == {**given, "logit_bias": {5: -100.0}, "stop": ["end"]}
    assert (found.n, found.num_requests) == (1, 1)


def test_settings_beyond_openai():
    """By the names that servers of open models use."""
    given = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [3]}
    given |= {"ignore_eos": True, "skip_special_tokens": False}
    assert chat_call(**given).settings == {**given, "top_k": 0}
    [prompt] = chat_call(chat_template_kwargs={"enable_thinking": False}).prompts
    assert prompt.template_parameters == {"enable_thinking": False}


def test_a_conversation():
    """Messages as they are; text in parts is joined, null is absent, calls of tools are kept."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    [prompt] = chat_call(messages=messages).prompts
    assert isinstance(prompt, Chat)
    assert prompt.turns[0].content == "Be\nbrief."
    assert [turn.role for turn in prompt.turns] == ["system", "assistant", "tool"]
    assert prompt.turns[1].tool_calls[0].name == "f"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", [Text("Once")]),
        ([5, 6], [[5, 6]]),
        (["Once", "Then"], [Text("Once"), Text("Then")]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
    ids=str,
)
def test_prompts(prompt, prompts):
    """Text, token ids, or several of them; each of which is asked `n` times."""
    call = completion_call(prompt=prompt, n=2)
    assert list(call.prompts) == prompts
    assert [call.request(index, None)[0] for index in range(call.num_requests)] == [p for p in prompts for _ in "ab"]


def test_seeds_of_one_prompt_differ():
    """By the choice's place; a line's own seed goes before the run's."""
    call = completion_call(prompt=["a", "b"], n=2, seed=2**63 - 1)
    assert [call.request(index, 5)[1]["seed"] for index in range(4)] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert [completion_call(n=2).request(index, 5)[1]["seed"] for index in (0, 1)] == [5, 6]
    assert "seed" not in completion_call().request(0, None)[1]


def test_lengths():
    """Completions end after 16 tokens where nothing is said, conversations with their context."""
    assert completion_call().max_tokens == 16
    assert chat_call().max_tokens is None
    assert chat_call(max_completion_tokens=5).max_tokens == chat_call(max_tokens=5, max_completion_tokens=5).max_tokens


def test_logprobs():
    """Conversations ask for them by a flag and a number, completions by a number."""
    assert "logprobs" not in chat_call(logprobs=False).settings
    assert chat_call(logprobs=True).settings["logprobs"] == 0
    assert chat_call(logprobs=True, top_logprobs=3).settings["logprobs"] == 3
    assert completion_call(logprobs=2).settings["logprobs"] == 2


def test_echo():
    """A prompt that comes back is scored where logprobs are wanted, or nothing is generated."""
    assert not completion_call(logprobs=2, echo=False).echo
    assert "prompt_logprobs" not in completion_call(logprobs=2).settings
    assert completion_call(echo=True).echo
    assert "prompt_logprobs" not in completion_call(echo=True).settings
    assert completion_call(echo=True, logprobs=2).settings["prompt_logprobs"] == 2
    assert completion_call(echo=True, max_tokens=0).settings == {"max_tokens": 0, "prompt_logprobs": 0}


@pytest.mark.parametrize(
    ("call", "body", "message"),
    [
        (chat_call, {"model": None}, "model: absent; give a string"),
        (chat_call, {"messages": "hi"}, "messages: absent or no list"),
        (chat_call, {"messages": []}, "messages: empty"),
        (chat_call, {"messages": ["hi"]}, "messages[0].role: absent"),
        (chat_call, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role: 'king' is none"),
        (
            chat_call,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type: 'image_url' is not served",
        ),
        (chat_call, {"n": 0}, f"n: 0 is outside [1, {MAX_N}]"),
        (chat_call, {"n": True}, "n: a JSON bool; give a whole number"),
        (chat_call, {"temperature": "hot"}, "temperature: a JSON str; give a number"),
        (chat_call, {"temperature": 10**400}, "temperature: too large"),
        (chat_call, {"temperature": float("nan")}, "temperature: nan is outside"),
        (chat_call, {"seed": -1}, "seed: -1 is outside"),
        (chat_call, {"seed": 10**400}, "seed: outside [-2^63"),
        (chat_call, {"max_completion_tokens": 0}, "max_completion_tokens: nothing would come of 0; give 1 or more"),
        (completion_call, {"max_tokens": 0}, "max_tokens: nothing would come of 0; give 1 or more, or echo"),
        (completion_call, {"max_tokens": -1, "echo": True}, "max_tokens: -1 is outside"),
        (completion_call, {"logprobs": 21, "echo": True}, "logprobs: 21 is outside"),
        (completion_call, {"echo": "yes"}, "echo: a JSON str; give true or false"),
        (chat_call, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens: not that of max_tokens"),
        (chat_call, {"top_logprobs": 2}, "top_logprobs: given without logprobs"),
        (chat_call, {"logprobs": True, "top_logprobs": 99}, "top_logprobs: 99 is outside"),
        (chat_call, {"stop": [""]}, "stop: each string must have"),
        (chat_call, {"stop": [5]}, "stop: a JSON int; give a string"),
        (chat_call, {"stop": "\ud800"}, "stop: a lone surrogate"),
        (chat_call, {"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id"),
        (chat_call, {"logit_bias": {"5": 101}}, "logit_bias[5]: 101"),
        (chat_call, {"chat_template_kwargs": 5}, "chat_template_kwargs: a JSON int; give an object"),
        (completion_call, {"prompt": None}, "prompt: absent or empty"),
        (completion_call, {"prompt": [None]}, "prompt[0]: neither text nor token ids"),
        (completion_call, {"prompt": [[5, "a"]]}, "prompt[0][1]: a JSON str; give a whole number"),
        (completion_call, {"prompt": [-1]}, "prompt[0]: -1 is no token id"),
        (completion_call, {"prompt": ["a"] * 100, "n": 100}, "n: 100 prompts, 100 times each, are more than"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_body(call, body, message):
    """Names the parameter as the body does, what was found, and what to give."""
    with pytest.raises(InvalidRequestError) as caught:
        call(**body)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (chat_call, {"stream": True}),
        (chat_call, {"tools": [{"type": "function"}]}),
        (chat_call, {"reasoning_effort": "low"}),
        (chat_call, {"frobnicate": 1}),
        (chat_call, {"echo": True}),
        (completion_call, {"suffix": "."}),
        (completion_call, {"best_of": 2}),
        (completion_call, {"top_logprobs": 2}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(call, body):
    """As OpenAI's API refuses a parameter that a model does not have."""
    [name] = body
    with pytest.raises(UnservedError) as caught:
        call(**body)
    refusal = Refusal.of(caught.value)
    assert (refusal.status, refusal.param, refusal.code) == (400, name, "unsupported_parameter")
    assert "leave it out" in refusal.message


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CONSTRAINTS = (
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, JsonObject()),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, JsonSchema(SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, JsonSchema(SCHEMA)),
    ({"structured_outputs": {"json": "true", "regex": None}}, JsonSchema("true")),
    ({"structured_outputs": {"json_object": True}}, JsonObject()),
    ({"structured_outputs": {"regex": "a+"}}, Regex("a+")),
    ({"structured_outputs": {"grammar": "start: A"}}, Grammar("start: A")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Choice(("a", "b"))),
)


@pytest.mark.parametrize("call", [chat_call, completion_call])
@pytest.mark.parametrize(("body", "constraint"), CONSTRAINTS, ids=str)
def test_constraints(call, body, constraint):
    """As OpenAI has them, and as vLLM does."""
    assert call(**body).settings.get("constraint") == constraint


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_constraint(body, param):
    """Is told with where the body has it."""
    with pytest.raises(InvalidRequestError) as caught:
        chat_call(**body)
    assert caught.value.field == param


def test_what_the_engine_finds_wrong_with_a_constraint():
    """Is told with where the body has it, too."""
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
    assert chat_call(**body).field("json_schema") == "response_format.json_schema.schema"
    assert chat_call(structured_outputs={"regex": "a"}).field("regex") == "structured_outputs.regex"


@pytest.mark.parametrize(
    ("name", "told"),
    [("token_ids[3]", "prompt[3]"), ("text", "prompt"), ("max_tokens", "max_completion_tokens"), ("stop", "stop")],
)
def test_what_the_engine_calls_a_field(name, told):
    """Is told as the body has it."""
    assert chat_call(max_completion_tokens=5).field(name) == told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("model", "messages", "prompt", "n", "temperature", "top_p", "stop", "seed", "logit_bias", "max_tokens"),
    *("logprobs", "top_logprobs", "stream", "response_format", "tools", "chat_template_kwargs", "stop_token_ids"),
    *("max_completion_tokens", "top_k", "best_of", "continue_final_message", "user", "echo", "structured_outputs"),
)


@given(st.sampled_from(Endpoint), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_body_is_a_call_or_refused(endpoint, changes):
    """Nothing else is raised, and what is refused can be told."""
    line = chat("a") if endpoint is Endpoint.CHAT else completion("a")
    try:
        call = read_call(endpoint, {**line["body"], **changes})
    except InvalidRequestError as error:
        json.dumps(Refusal.of(error).as_json())
    else:
        assert call.num_requests >= 1
