"""The tokenizer and the generation settings that a GGUF file has, as files in Hugging Face format."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from hsrpc.model.config_file import shown
from hsrpc.model.gguf.header import Header, Values
from hsrpc.model.gguf.splitting import splitting_of

_log = logging.getLogger(__name__)
_SETTINGS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Settings of a generation_config.json, by their names behind `general.sampling.`"""
_ENDS = ("eos", "eot", "eom")
"""Tokens that end a text, a turn, and a message that calls a tool."""
_PRE = "tokenizer.ggml.pre"
"""Key of how texts are split before their parts become tokens."""


def write_tokenizer(header: Header, directory: Path) -> None:
    """Writes the file's tokenizer and chat template, as transformers reads them.

    One that it cannot read is left out, which the log says: weights are of use without.
    """
    there = f"the model's tokenizer files to {directory.name}"
    values = header.metadata.values
    if "tokenizer.ggml.tokens" not in values:
        _log.warning("%s: it has no tokenizer; copy %s", header.path, there)
        return
    from transformers import PreTrainedTokenizerFast  # takes seconds

    # Apart from the file's own directory, which may hold files of another tokenizer.
    with TemporaryDirectory(prefix="hsrpc-gguf-") as name:
        (Path(name) / header.path.name).symlink_to(header.path.resolve())
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, gguf_file=header.path.name, local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain Exception for what it cannot parse
            _log.warning("%s: the tokenizer cannot be read (%s); copy %s", header.path, error, there)
            return
    if values.get("tokenizer.ggml.model") == "gpt2":
        name = str(values.get(_PRE, "default"))
        if (splitting := splitting_of(name)) is None:
            _log.warning(
                "%s: %s=%s: words are split as GPT-2 does; rather copy %s", header.path, _PRE, shown(name), there
            )
        else:
            tokenizer.backend_tokenizer.pre_tokenizer = splitting
    if isinstance(names := values.get("tokenizer.chat_templates"), list):
        more = {name: values.get(f"tokenizer.chat_template.{name}") for name in names}
        default = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
        tokenizer.chat_template = default | {name: text for name, text in more.items() if isinstance(text, str)}
    tokenizer.save_pretrained(directory)


def generation_config(header: Header, turn_ends: bool) -> Values:
    """The settings that the file recommends, and the tokens that end a text, or with `turn_ends` a turn as well."""
    values = header.metadata.values
    settings = {name: values.get(f"general.sampling.{key}") for name, key in _SETTINGS.items()}
    ends = [values.get(f"tokenizer.ggml.{name}_token_id") for name in (_ENDS if turn_ends else _ENDS[:1])]
    ids = list(dict.fromkeys(end for end in ends if end is not None))
    found = {**settings, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    return {name: value for name, value in found.items() if value is not None}
