"""Whether two models have the same tokenizer, so that the tokens of one can be verified by the other."""

from __future__ import annotations

from collections.abc import Mapping

from hsrpc.engine.model_files import ModelFiles
from hsrpc.engine.tokenizer import has_tokenizer, read_vocabulary
from hsrpc.errors import ConfigError
from hsrpc.model.family import ModelSpec

_REMEDY = "choose a smaller model of the same family"
_SHOWN = 3


def check_same_tokenizer(field: str, value: str, files: ModelFiles, other: ModelFiles) -> None:
    """Check that what each of both has at an id is the same token; one may have more tokens than the other.

    Where one has no tokenizer, the sizes of the vocabularies and the special ids must agree. `field` and `value`: the
    setting that names `files`.

    Raises:
        ConfigError: they differ.
        CheckpointError: a tokenizer cannot be read.
    """
    different = _difference(files, other)
    if different:
        problem = f"has another tokenizer than {other.spec.name}: {different}"
        raise ConfigError(field, value, problem, _REMEDY)


def _difference(files: ModelFiles, other: ModelFiles) -> str:
    """How they differ, for people; empty where they do not."""
    directories = [each.directory for each in (files, other) if each.directory is not None]
    if len(directories) == 2 and all(map(has_tokenizer, directories)):
        return _of_vocabularies(*map(read_vocabulary, directories))
    return _of_specs(files.spec, other.spec)


def _of_vocabularies(one: Mapping[int, str], other: Mapping[int, str]) -> str:
    different = [token_id for token_id in sorted(one.keys() & other.keys()) if one[token_id] != other[token_id]]
    if not different:
        return ""
    shown = ", ".join(f"{token_id} {one[token_id]!r} / {other[token_id]!r}" for token_id in different[:_SHOWN])
    return f"{len(different)} ids stand for other tokens, such as {shown}"


def _of_specs(one: ModelSpec, other: ModelSpec) -> str:
    values = {
        "vocab_size": (one.vocab_size, other.vocab_size),
        "bos_token_id": (one.bos_token_id, other.bos_token_id),
        "pad_token_id": (one.pad_token_id, other.pad_token_id),
        "eos_token_id": (one.eos_token_ids, other.eos_token_ids),
    }
    return ", ".join(f"{name} {here} / {there}" for name, (here, there) in values.items() if here != there)
