"""Conversations and special tokens through the embedded engine, and over gRPC."""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from hsrpc import Chat, Engine, EngineConfig, SamplingParams
from hsrpc.client import AsyncClient
from hsrpc.engine import delivery
from hsrpc.errors import ConfigError, InvalidRequestError
from hsrpc.request import Finish, FinishReason
from hsrpc.server import Server, ServerConfig
from tests.engine.reference import Reference, save_chat_tokenizer
from tests.engine.support import collect, greedy, ids, roomy, text

EOS, IM_END = 2, 260
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = Chat(MESSAGES)


@pytest.fixture(scope="module")
def made(reference: Callable[[str], Reference], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The model of a reference, with a tokenizer for conversations."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(reference("opt").directory, directory)
    save_chat_tokenizer(directory)
    return replace(reference("opt"), directory=directory)


@pytest_asyncio.fixture
async def engine(made: Reference) -> AsyncIterator[Engine]:
    async with Engine(roomy(made, max_batch=4)) as opened:
        yield opened


async def run(engine: Engine, prompt: Any = CHAT, **settings: Any) -> tuple[str, list[int], Finish]:
    """Text, ids and finish of a fixed random output of the letters a and b and of <|im_end|>, one token each."""
    letters = [*await engine.tokenizer.encode("ab"), IM_END][1:]
    params = {"temperature": 2.0, "seed": 4, "max_tokens": 30, "logit_bias": dict.fromkeys(letters, 100.0)}
    params |= settings
    deltas = await collect(engine.generate(prompt, SamplingParams(**params)))
    assert deltas[-1].finish is not None
    return text(deltas), ids(deltas), deltas[-1].finish


async def test_a_conversation_is_a_prompt(engine: Engine, made: Reference) -> None:
    """Its tokens are those that transformers makes of it, and so is the output."""
    wanted = AutoTokenizer.from_pretrained(made.directory).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    generation = await engine.submit(CHAT, greedy(8))
    assert generation.prompt_token_ids == wanted == await engine.tokenize(CHAT)
    assert ids(await collect(generation)) == ids(await collect(engine.generate(wanted, greedy(8))))
    assert await engine.render(CHAT) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_conversation_that_cannot_fit_is_refused(engine: Engine) -> None:
    """By its length alone, or once it has become tokens."""
    for length, message in ((64 * 128, "characters; at most 8192"), (200, "prompt tokens; at most 127 fit")):
        with pytest.raises(InvalidRequestError, match=f"messages: .*{message}"):
            await engine.submit(Chat([MESSAGES[0] | {"content": "x" * length}]), greedy(1))


async def test_special_tokens_are_shown_where_that_is_asked_for(engine: Engine) -> None:
    """The text is what the tokenizer makes of the ids, with them or without."""
    shown, token_ids, _ = await run(engine, skip_special_tokens=False, ignore_eos=True)
    assert token_ids.count(IM_END) > 1
    assert shown == await engine.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert "<|im_end|>" in shown
    skipped, same_ids, _ = await run(engine, ignore_eos=True)
    assert same_ids == token_ids
    assert skipped == shown.replace("<|im_end|>", "") == await engine.detokenize(token_ids)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include_stop", [False, True])
async def test_the_text_of_a_special_token_stops_at_it(engine: Engine, skip: bool, include_stop: bool) -> None:
    """Whether or not the text has it; what might have become another stop string is sent."""
    _, whole, _ = await run(engine)
    cut = whole.index(IM_END)
    before = await engine.detokenize(whole[:cut])
    assert before
    stop = ["<|im_end|>", before[-1] + "z"]
    found, token_ids, finish = await run(engine, stop=stop, skip_special_tokens=skip, include_stop=include_stop)
    assert token_ids == whole[: cut + 1]
    assert (finish.reason, finish.matched_stop) == (FinishReason.STOP_STRING, "<|im_end|>")
    assert found == (before + "<|im_end|>" if include_stop else before)


@pytest.mark.parametrize(("include_stop", "ending"), [(False, ""), (True, "</s>")])
async def test_the_token_that_ends_the_output_is_shown_with_include_stop(
    engine: Engine, include_stop: bool, ending: str
) -> None:
    """And where special tokens are."""
    settings = {"logit_bias": {EOS: 100.0}, "include_stop": include_stop}
    found, token_ids, finish = await run(engine, skip_special_tokens=False, **settings)
    assert (found, token_ids, finish.reason) == (ending, [EOS], FinishReason.EOS)
    assert (await run(engine, **settings))[0] == ""


async def test_text_that_is_answered_with_nothing_is_hinted_at_once(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for a conversation, nor for an answer, nor a second time."""
    with caplog.at_level(logging.WARNING, delivery.__name__):
        await run(engine, CHAT, logit_bias={EOS: 100.0})
        await run(engine, [5, 6], logit_bias={EOS: 100.0})
        await run(engine, "Hi")
        assert not caplog.records
        for _ in range(2):
            await run(engine, "Hi", logit_bias={EOS: 100.0})
    [record] = caplog.records
    assert "answered text with nothing" in record.message


async def test_a_client_gets_what_the_engine_gives(engine: Engine) -> None:
    """A conversation, its tokens, its text and its output, over gRPC."""
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address) as client:
        assert await client.tokenize(CHAT) == await engine.tokenize(CHAT)
        assert await client.render(CHAT) == await engine.render(CHAT)
        assert (await client.get_model()).has_chat_template
        completion = await client.complete(
            CHAT, temperature=0.0, max_tokens=8, ignore_eos=True, return_token_ids=True, echo_prompt=True
        )
        assert list(completion.token_ids) == ids(await collect(engine.generate(CHAT, greedy(8))))
        assert completion.text.startswith("user\nHi\nassistant\n")
        shown = await client.complete(CHAT, max_tokens=1, echo_prompt=True, skip_special_tokens=False)
        assert shown.text.startswith(await engine.render(CHAT))
    await server.stop()


async def test_a_file_takes_the_place_of_the_models_template(made: Reference, tmp_path: Path) -> None:
    """Tags that transformers knows among them."""
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!")
    async with Engine(roomy(made, chat_template=str(file))) as engine:
        assert await engine.render(CHAT) == "Hi!"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file or directory; give a file that can be read", id="absent"),
        pytest.param(b"{% if %}", "no template .*; correct it", id="syntax"),
        pytest.param(b"\xff", "no template .*; correct it", id="bytes"),
    ],
)
async def test_a_file_that_is_no_template_is_named(
    made: Reference, tmp_path: Path, content: bytes | None, message: str
) -> None:
    """Before anything is loaded."""
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"chat_template='{file}': {message}"):
        await Engine(roomy(made, chat_template=str(file))).__aenter__()


async def test_a_template_for_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="chat_template='x': random:opt-125m has no tokenizer; leave it out"):
        await Engine(EngineConfig(model="random:opt-125m", chat_template="x")).__aenter__()
