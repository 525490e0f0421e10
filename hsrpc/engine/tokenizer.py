"""Text to token ids and back, on threads of its own: a long text holds up no loop, no output and no short text."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import logging
import threading
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from hsrpc.engine.chat_template import ChatTemplate
from hsrpc.engine.fair_thread import FairThread
from hsrpc.engine.grammars.vocabulary import vocabulary
from hsrpc.engine.plain_words import PlainWords
from hsrpc.errors import CheckpointError, InvalidRequestError
from hsrpc.model.config_file import read_config
from hsrpc.model.foreign import check_own, read_head
from hsrpc.prompt import Chat, Text, check_unicode, field_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_MAX_SHORT = 65_536
"""Characters, or token ids, of a short text: the slowest of that length that was measured took 0.13 s."""
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = ("tokenizer.json", *SENTENCEPIECE_FILES, "vocab.json", "tekken.json")
CHAT_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>")
"""Tokens that end a turn, where a chat template has them."""
_READ = (".json", ".txt", ".jinja", ".model")
"""Ends of the names of the files that may be a tokenizer's."""
_BYTE_ORDER_MARKS = (BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)
_TEMPLATE_FILE = "chat_template.jinja"
_SHARED = (
    *_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("config.json", "generation_config.json", "chat_template.json", _TEMPLATE_FILE),
)
"""Files that make a tokenizer elsewhere; the configurations tell which tokens end a text."""
_KEPT = ("model_type", "architectures", "tokenizer_class", "transformers_version")
"""What a tokenizer reads of config.json."""

_MAX_CHARACTERS = 2**26
"""Most characters of a conversation's text, where nothing is said of it."""

R = TypeVar("R")
Args = TypeVarTuple("Args")


class Tokenizer:
    """The tokenizer of a model directory in Hugging Face format, and its chat template.

    `chat_template` is the text of one in place of the model's own; `max_characters` bounds the text of a conversation.

    `num_rows`: tokens that the model has an embedding of; None: as many as the tokenizer. Text may hold no others.
    The texts of callers are encoded and decoded on two threads, one for short texts and one for long ones, on each of
    which clients take turns; output is decoded on a third. All belong to this object until `close`.
    Making one reads files and takes seconds: do it on a thread where an event loop runs.

    Raises:
        CheckpointError: the directory holds no tokenizer that can be read.
    """

    def __init__(
        self,
        directory: str | Path,
        num_rows: int | None = None,
        *,
        chat_template: str | None = None,
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        self._directory = Path(directory)
        _check_files(self._directory)
        self._short = FairThread("hsrpc-short-texts")
        self._long = FairThread("hsrpc-long-texts")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="hsrpc-decode")
        self._decoder_thread = self._decoder.submit(threading.get_ident).result()
        loading = self._decoder.submit(_load, self._directory)
        # The tokenizers library raises plain Exception for what it cannot parse.
        if (error := loading.exception()) is not None:
            self.close()
            raise _unreadable(self._directory, error) from error
        self._tokenizer = loading.result()
        self._vocab_size = len(self._tokenizer)
        self._num_rows = self._vocab_size if num_rows is None else num_rows
        if self._vocab_size > self._num_rows:
            _log.warning(
                "%s: the tokenizer has %s tokens and the model %s: text that needs others is refused",
                directory,
                self._vocab_size,
                self._num_rows,
            )
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        added = self._tokenizer.added_tokens_decoder
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._chat_template = ChatTemplate(self._tokenizer, max_characters)
        self._plain_words = PlainWords(self._tokenizer, self._special_ids)
        self._prefix, self._suffix = _added_ids(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids are below this, special and added tokens included; the model's own vocabulary may be padded to more."""
        return self._vocab_size

    @property
    def end_token_ids(self) -> Sequence[int]:
        """The end-of-text token that the tokenizer names, and those that end a turn in its chat template."""
        template = json.dumps(self._tokenizer.chat_template or "", ensure_ascii=False)
        names = [name for name in CHAT_ENDS if name in template]
        added = self._tokenizer.get_added_vocab()
        ids = [self._tokenizer.eos_token_id, *(added[name] for name in names if name in added)]
        return [token_id for token_id in ids if isinstance(token_id, int) and token_id < self._num_rows]

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template.exists

    def vocabulary(self, end_token_ids: Sequence[int]) -> LLTokenizer:
        """What constraints are matched against: the bytes of the model's tokens, and which of them end a text.

        Raises:
            ValueError: the tokenizer does not tell.
        """
        return vocabulary(self._tokenizer, self._num_rows, end_token_ids)

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token that is spelt `text`; None: there is none."""
        return self._special_ids.get(text)

    async def encode(self, prompt: str | Text | Chat, client: str = "") -> list[int]:
        """Token ids of a prompt, at `client`'s turn; of text with the special tokens that the model's prompts have.

        Raises:
            InvalidRequestError: it is not valid Unicode, or a conversation that no template takes, or it holds a token
                that the model does not have.
        """
        if isinstance(prompt, str):
            prompt = Text(prompt)
        return await self._thread(prompt.num_characters).run(client, self._encode, prompt)

    async def render(self, chat: Chat, client: str = "") -> str:
        """The text that `chat` becomes, at `client`'s turn.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the conversation.
        """
        return await self._thread(chat.num_characters).run(client, self._chat_template.render, chat)

    async def decode(self, token_ids: Sequence[int], client: str = "", skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, special tokens left out or shown, at `client`'s turn.

        Raises:
            InvalidRequestError: an id is outside the vocabulary.
        """
        return await self._thread(len(token_ids)).run(client, self._decode, list(token_ids), skip_special_tokens)

    def with_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of a text that was encoded without the special tokens of a prompt, with them; the first never twice."""
        begun = list(token_ids[: len(self._prefix)]) == self._prefix
        return [*([] if begun else self._prefix), *token_ids, *self._suffix]

    async def files(self) -> dict[str, bytes]:
        """Files that make the same tokenizer elsewhere, by their names, with the chat template in effect."""
        return await asyncio.to_thread(self._read_files)

    async def run(self, function: Callable[[*Args], R], *args: *Args) -> R:
        """Calls `function` on the decoding thread, such as one that pushes a whole step's tokens to Detokenizers."""
        return await asyncio.get_running_loop().run_in_executor(self._decoder, function, *args)

    def decode_now(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, for Detokenizer: ids outside the vocabulary have none. Only inside `run`.

        Raises:
            RuntimeError: called on another thread.
        """
        if threading.get_ident() != self._decoder_thread:
            raise RuntimeError("decode_now: called outside the decoding thread; call it through Tokenizer.run")
        return self._text(token_ids, skip_special_tokens)

    def close(self) -> None:
        """Ends the threads after what was asked of them: nobody who waits sees a cancellation that is not his."""
        self._short.close()
        self._long.close()
        self._decoder.shutdown(wait=False)

    def _read_files(self) -> dict[str, bytes]:
        with _readable(self._directory) as directory:
            files = {name: (directory / name).read_bytes() for name in _SHARED if (directory / name).is_file()}
        if self._tokenizer.is_fast:  # as it is used here: what was left out of the file must not come back
            files["tokenizer.json"] = self._tokenizer.backend_tokenizer.to_str().encode()
        template = self._tokenizer.chat_template
        if isinstance(template, str):
            settings = json.loads(files.get("tokenizer_config.json", b"{}"))
            files["tokenizer_config.json"] = json.dumps(settings | {"chat_template": template}).encode()
            files[_TEMPLATE_FILE] = template.encode()
        return files

    def _thread(self, length: int) -> FairThread:
        return self._short if length <= _MAX_SHORT else self._long

    def _encode(self, prompt: Text | Chat) -> list[int]:
        made = self._chat_template.encode(prompt) if isinstance(prompt, Chat) else self._encode_text(prompt)
        if max(made, default=0) >= self._num_rows:
            token_id = next(each for each in made if each >= self._num_rows)
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            found = f"{token!r} is token {token_id} of the tokenizer, and the model has {self._num_rows}"
            raise InvalidRequestError(field_of(prompt), f"{found}; leave it out")
        return made

    def _encode_text(self, text: Text) -> list[int]:
        check_unicode("text", text.text)
        pieces = [text.text] if text.parse_special else self._plain_words.pieces(text.text)
        if len(pieces) > 1:
            token_ids = self._plain_words.encode(pieces)
            return [*self._prefix, *token_ids, *self._suffix] if text.add_special_tokens else token_ids
        token_ids = list(self._tokenizer.encode(text.text, add_special_tokens=text.add_special_tokens, verbose=False))
        begun = len(self._prefix)
        is_begun_twice = text.add_special_tokens and begun and token_ids[begun : 2 * begun] == self._prefix
        return token_ids[begun:] if is_begun_twice else token_ids

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    "token_ids", f"{token_id} at position {position} is outside [0, {self._vocab_size})"
                )
        return self._text(token_ids, skip_special_tokens)

    def _text(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has files of a tokenizer."""
    return any((directory / name).is_file() for name in _FILES)


def read_vocabulary(directory: Path) -> dict[int, str]:
    """Tokens of a model directory's tokenizer by their ids, added and special ones among them; takes seconds.

    Raises:
        CheckpointError: it cannot be read.
    """
    _check_files(directory)
    try:
        tokens = _load(directory).get_vocab()
    except Exception as error:  # the tokenizers library raises no other for what it cannot parse
        raise _unreadable(directory, error) from error
    return {token_id: token for token, token_id in tokens.items()}


def _unreadable(directory: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{directory}: the tokenizer cannot be read ({error}); copy the model's tokenizer files again"
    )


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before a text and after it."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    begun = next((start for start in range(len(whole)) if whole[start : start + len(alone)] == alone), len(whole))
    return whole[:begun], whole[begun + len(alone) :]


def _check_files(directory: Path) -> None:
    """Some families load as an empty tokenizer where the files are missing."""
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory / 'tokenizer.json'}: no tokenizer found (looked for {', '.join(_FILES)}); "
            "copy the tokenizer files of the model there"
        )
    for path in _text_files(directory):
        check_own(path, read_head(path))
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tekken.json")):
        _check_reader(next(directory / name for name in SENTENCEPIECE_FILES if (directory / name).is_file()))


def _text_files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix in _READ and path.is_file()]


def _check_reader(file: Path) -> None:
    """Check that what reads a vocabulary of that kind is installed: SentencePiece's begins with a newline's byte."""
    package = "sentencepiece" if read_head(file)[:1] == b"\n" else "tiktoken"
    if importlib.util.find_spec(package) is None:
        remedy = f"run `pip install {package}`, or copy the model's tokenizer.json there"
        raise CheckpointError(f"{file}: the package {package}, which reads it, is not installed; {remedy}")


@contextmanager
def _readable(directory: Path) -> Iterator[Path]:
    """The directory; or, where it has what hsrpc reads and transformers does not, one with the same tokenizer."""
    marked = [path for path in _text_files(directory) if read_head(path).startswith(_BYTE_ORDER_MARKS)]
    config = directory / "config.json"
    values = read_config(config).values if config.is_file() else {}
    if not marked and not isinstance(values.get("bos_token_id"), list):
        yield directory
        return
    with TemporaryDirectory(prefix="hsrpc-tokenizer-") as name:
        copy = Path(name)
        for path in _text_files(directory):
            if path in marked and path.suffix == ".json":
                (copy / path.name).write_text(json.dumps(dict(read_config(path).values)), encoding="utf-8")
            else:
                (copy / path.name).symlink_to(path.resolve())
        kept = {key: values[key] for key in _KEPT if key in values}
        (copy / config.name).unlink(missing_ok=True)
        (copy / config.name).write_text(json.dumps(kept), encoding="utf-8")
        yield copy


def _load(directory: Path) -> PreTrainedTokenizerBase:
    # Imported here: it takes seconds, on this thread.
    auto = importlib.import_module("transformers").AutoTokenizer
    with _readable(directory) as readable:
        tokenizer: PreTrainedTokenizerBase = auto.from_pretrained(
            readable, local_files_only=True, trust_remote_code=False
        )
    # Drops truncation and padding settings now: later calls then only read, which threads may do at once.
    tokenizer.encode("")
    return tokenizer
