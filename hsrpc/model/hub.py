"""From what a user calls a model to a directory: a path, or an id of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hsrpc.errors import CheckpointError, ModelNotFoundError
from hsrpc.model.config_file import read_config
from hsrpc.model.foreign import check_own, read_head
from hsrpc.model.shapes import random_models

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
_SAFETENSORS = "model*.safetensors"
_PICKLES = "pytorch_model*.bin"


def model_name(directory: Path) -> str:
    """Last component of the directory, or of the hub id that a directory of the hub's cache belongs to."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name


def resolve_model(name: str, *, pickled: bool = False, trust_links: bool = False) -> Path:
    """The directory of the model `name`, from the hub where need be; its local cache is tried first.

    With `pickled` the weights are those in PyTorch's own format, which `hsrpc convert` reads. With `trust_links` the
    files may be links to other places.

    Raises:
        ModelNotFoundError: neither a directory nor a model that the hub has, or the hub is out of reach.
        CheckpointError: a file in it is a link to a place outside, or the name is that of a GGUF file.
    """
    directory = _find(name, pickled)
    if not trust_links:
        _check_inside(directory)
    return directory


def _find(name: str, pickled: bool) -> Path:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        check_own(Path(path), read_head(Path(path)))
    if os.path.exists(path):
        raise ModelNotFoundError(f"{name!r} is a file; give the directory that it is in")
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        remedy = "give a directory, or a hub id such as org/name"
        random = random_models(name) if "/" not in name and not pickled else []
        hint = f"; for random weights, give {' or '.join(random)}" if random else ""
        raise ModelNotFoundError(f"{name!r} is not a directory; {remedy}{hint}")
    pattern = _PICKLES if pickled else _SAFETENSORS
    cached = _fetch(name, pattern, local_files_only=True)
    if cached is not None and _is_complete(cached, pattern):
        return cached
    directory = _fetch(name, pattern, local_files_only=False)
    if directory is None:
        remedy = "fetch it where there is a network and give its directory"
        raise ModelNotFoundError(f"{name!r} is not on this machine and the hub is out of reach; {remedy}")
    if not _is_complete(directory, pattern):
        converted = "serve it without converting it, or fetch a GGUF file and give its path"
        remedy = converted if pickled else f"run `hsrpc convert {name} DIRECTORY`"
        raise ModelNotFoundError(f"{name!r} has no complete {pattern} on the hub; {remedy}")
    return directory


def forbid_downloads() -> None:
    """From here on the hub's library answers from its cache alone, and connects to nobody."""
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # for what loads it later
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def _check_inside(directory: Path) -> None:
    """Check that all its files lie in `directory`: a link in a model that was fetched must not open other files.

    Files of the hub's cache are links to blobs beside the snapshots, so there the model's whole folder counts.

    Raises:
        CheckpointError: a file of the model is a link to one elsewhere.
    """
    real = directory.resolve()
    root = real.parent.parent if real.parent.name == "snapshots" else real
    for path in real.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            remedy = "put the file itself there, or use --trust-links if you trust whoever made the link"
            raise CheckpointError(
                f"{directory / path.name}: expected a file of the model, found a link out of it; {remedy}"
            )


def _is_complete(directory: Path, pattern: str) -> bool:
    """Whether the configuration and all weight files are there."""
    index = next(directory.glob(f"{pattern}.index.json"), None)
    section = read_config(index).section("weight_map") if index else None
    names = section.values.values() if section else [path.name for path in directory.glob(pattern)]
    return bool(names) and all((directory / str(name)).is_file() for name in ("config.json", *names))


def _fetch(name: str, pattern: str, *, local_files_only: bool) -> Path | None:
    """The directory in the hub's cache; None when it is not there, or the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        patterns = [*_TEXT_FILES, pattern]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except errors.HFValidationError:
        problem = "is neither a directory nor a hub id; give a directory, or a hub id such as org/name"
    except errors.GatedRepoError:
        problem = "needs its owner's permission; ask for it on the hub, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "is neither a directory nor a public model on the hub; check the spelling, or run `hf auth login`"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError):
        return None
    raise ModelNotFoundError(f"{name!r} {problem}")
