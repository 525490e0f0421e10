"""The tokenizer of a model directory, on its own threads."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers, trainers

from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.errors import CheckpointError, InvalidRequestError
from hsrpc.prompt import Chat
from hsrpc.text.detokenizer import Detokenizer

LONG = 100_000
"""Characters or ids of a text that no other has to wait for."""

R = TypeVar("R")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of about 270 tokens; its file asks for truncation, as some published ones do."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the cat sat"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "clean_up_tokenization_spaces": True,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def tokenizer(directory: Path) -> Iterator[Tokenizer]:
    made = Tokenizer(directory)
    yield made
    made.close()


@pytest.mark.parametrize("text", ["", "naïve 日本語 👩‍👩‍👧 e\u0301", "do n't , please .", "the cat sat " * 500])
async def test_decode_gives_back_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    """Any text survives the way there and back: nothing is truncated or tidied."""
    assert await tokenizer.decode(await tokenizer.encode(text)) == text


async def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    """The end-of-text token is known and is left out of the text."""
    assert tokenizer.end_token_ids == [0]
    assert await tokenizer.decode([*await tokenizer.encode("hello"), 0]) == "hello"


async def test_decode_names_an_id_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    """The field, the id, its position and the limits."""
    for wrong in (tokenizer.vocab_size, -1):
        message = f"token_ids: {wrong} at position 1 is outside [0, {tokenizer.vocab_size})"
        with pytest.raises(InvalidRequestError, match=re.escape(message)):
            await tokenizer.decode([1, wrong])
    assert await tokenizer.run(tokenizer.decode_now, [tokenizer.vocab_size]) == ""


async def test_encode_refuses_a_lone_surrogate(tokenizer: Tokenizer) -> None:
    """Text that is no valid Unicode is the caller's mistake, and is named."""
    with pytest.raises(InvalidRequestError, match=r"text: a lone surrogate U\+D800 at character 2"):
        await tokenizer.encode("ab\ud800")


async def test_a_whole_step_is_detokenized_in_one_call(tokenizer: Tokenizer) -> None:
    """`run` carries any function to the decoding thread, where Detokenizers may call decode_now."""
    texts = ["hello 🎉", "the cat"]
    ids = [await tokenizer.encode(text) for text in texts]
    requests = [Detokenizer(tokenizer.decode_now) for _ in texts]

    def step(position: int) -> list[str]:
        return [request.push(tokens[position : position + 1]) for request, tokens in zip(requests, ids, strict=True)]

    steps = [await tokenizer.run(step, position) for position in range(max(map(len, ids)))]
    assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == texts


async def test_decode_now_belongs_to_its_thread(tokenizer: Tokenizer) -> None:
    """Called elsewhere it says where to call it; `run` is always on that one thread."""
    with pytest.raises(RuntimeError, match=r"call it through Tokenizer\.run"):
        tokenizer.decode_now([1])
    threads = {await tokenizer.run(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_encoding_and_decoding_at_once(tokenizer: Tokenizer) -> None:
    """Both threads use one tokenizer at the same time, many times over, and give the right results."""
    text = "the cat sat, hello world " * 40
    ids = await tokenizer.encode(text)
    both = [work for _ in range(100) for work in (tokenizer.encode(text), tokenizer.decode(ids))]
    assert await asyncio.gather(*both) == [ids, text] * 100


async def test_a_long_prompt_holds_up_neither_the_loop_nor_decoding(tokenizer: Tokenizer) -> None:
    """While a prompt of a million characters is encoded, decoding goes on."""
    encoding = asyncio.create_task(tokenizer.encode("the cat sat " * 80_000))
    await asyncio.sleep(0)
    assert await tokenizer.decode([1, 2, 3]) != ""
    assert not encoding.done()
    assert len(await encoding) > 80_000


class SlowTokenizer:
    """A model's tokenizer that works on a long text, or many ids, until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def encode(self, text: str, **_: object) -> list[int]:
        return self._answer(len(text), [len(text)])

    def decode(self, token_ids: list[int], **_: object) -> str:
        return self._answer(len(token_ids), str(len(token_ids)))

    def _answer(self, length: int, answer: R) -> R:
        if length >= LONG:
            self.begun.set()
            assert self.go_on.wait(20)
        return answer


@pytest.fixture
def slow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowTokenizer]:
    made = SlowTokenizer()
    monkeypatch.setattr(tokenizer, "_tokenizer", made)
    monkeypatch.setattr(tokenizer, "_num_rows", 10**9)  # its ids are lengths
    yield made
    made.go_on.set()


@pytest.mark.parametrize("kind", ["encode", "decode"])
async def test_long_work_holds_up_neither_short_texts_nor_output(
    kind: str, tokenizer: Tokenizer, slow: SlowTokenizer
) -> None:
    """While a text of many characters or ids is worked on, a short one is encoded and decoded, and output too."""
    work = tokenizer.encode("x" * LONG) if kind == "encode" else tokenizer.decode([1] * LONG)
    long = asyncio.create_task(work)
    assert await asyncio.to_thread(slow.begun.wait, 20)
    async with asyncio.timeout(20):
        assert await tokenizer.encode("short") == [5]
        assert await tokenizer.decode([1, 2, 3]) == "3"
        assert await tokenizer.run(tokenizer.decode_now, [1, 2]) == "2"
    assert not long.done()
    slow.go_on.set()
    await long


async def test_close_ends_the_threads(directory: Path) -> None:
    """After close nothing runs any more."""
    tokenizer = Tokenizer(directory)
    tokenizer.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        await tokenizer.encode("hello")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({}, "tokenizer.json: no tokenizer found", id="none"),
        pytest.param({"config.json": '{"model_type": "opt"}'}, "copy the tokenizer files", id="empty-family"),
        pytest.param({"tokenizer.json": "{"}, "the tokenizer cannot be read", id="cut-off"),
        pytest.param({"tokenizer.json": '{"added_tokens": [], "model": {}}'}, "tokenizer files again", id="no-model"),
    ],
)
def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    """The error names the directory, what is wrong and what to do, and no thread is left behind."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
async def test_byte_order_marks_are_read_over(tmp_path, directory, encoding):
    """The tokenizer is the same whatever encoding of JSON its files, and the model's, have."""
    for path in directory.iterdir():
        (tmp_path / path.name).write_text(path.read_text(), encoding=encoding)
    (tmp_path / "config.json").write_text('{"model_type": "opt"}', encoding=encoding)
    marked, plain = Tokenizer(tmp_path), Tokenizer(directory)
    assert await marked.encode("the cat") == await plain.encode("the cat")
    marked.close(), plain.close()


async def test_a_list_of_begin_tokens_is_no_hindrance(tmp_path, directory):
    """What transformers refuses in config.json does not concern the tokenizer."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "bos_token_id": [1, 2]}')
    made = Tokenizer(tmp_path)
    assert await made.decode(await made.encode("the cat")) == "the cat"
    made.close()


@pytest.mark.parametrize(("content", "package"), [(b"\n\x0e\n\x05", "sentencepiece"), (b"IQ== 0\n", "tiktoken")])
def test_package_that_reads_a_vocabulary_is_named(tmp_path, monkeypatch, content, package):
    """Where it is not installed, the command that installs it is said."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: the package {package}, .*`pip install {package}`"):
        Tokenizer(tmp_path)


async def test_sentencepiece_vocabulary_alone_is_read(tmp_path):
    """A model without tokenizer.json, as Llama 2 was first published."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        lines = ["the cat sat on the mat", "hello world"] * 20
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=40, model_type="bpe", minloglevel=2
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    made = Tokenizer(tmp_path)
    assert await made.decode(await made.encode("the cat")) == "the cat"
    made.close()


async def test_text_with_a_token_that_the_model_lacks_is_refused(directory, caplog):
    """A tokenizer may have more tokens than the model has rows: said at start, and of the text that needs one."""
    made = Tokenizer(directory, 100)
    assert f"the tokenizer has {made.vocab_size} tokens and the model 100" in caplog.text
    [last] = await made.encode("b")
    assert last < 100
    with pytest.raises(InvalidRequestError, match=r"^text: '.*' is token \d+ of the tokenizer, and the model has 100"):
        await made.encode("a cat")
    made.close()
    caplog.clear()
    Tokenizer(directory, 280).close()
    assert not caplog.text


def test_tokens_that_end_a_turn_are_those_of_the_chat_template(tmp_path, directory):
    """A special token that the template does not use ends nothing, nor does one that the model has no row for."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_special_tokens(["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
    made.save(str(tmp_path / "tokenizer.json"))
    template = "{{ messages[0].content }}<|im_end|><|eot_id|>"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    first = made.token_to_id("<|im_end|>")
    for rows, expected in ((first + 3, [0, first, first + 1]), (first + 1, [0, first])):
        tokenizer = Tokenizer(tmp_path, rows)
        assert list(tokenizer.end_token_ids) == expected
        tokenizer.close()


TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
CHAT = Chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("own", [True, False], ids=["own template", "template of the operator"])
async def test_its_files_make_the_same_tokenizer_elsewhere(tmp_path, directory, own):
    """By hsrpc and by the tokenizers library alone, which heeds what a file says of truncation."""
    shutil.copytree(directory, tmp_path / "here")
    (tmp_path / "here" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "here" / "chat_template.jinja").write_text(TEMPLATE if own else "")
    here = Tokenizer(tmp_path / "here", chat_template=None if own else TEMPLATE)
    files = await here.files()
    (tmp_path / "there").mkdir()
    for name, content in files.items():
        (tmp_path / "there" / name).write_bytes(content)
    there = Tokenizer(tmp_path / "there")
    assert "model.safetensors.index.json" not in files
    for prompt in ("hello world, the cat sat", CHAT):
        assert await there.encode(prompt) == await here.encode(prompt)
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    text = "hello world, the cat sat on the mat"
    assert raw.encode(text, add_special_tokens=False).ids == await here.encode(text)
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == TEMPLATE
    here.close()
    there.close()
