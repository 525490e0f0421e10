"""Files that stand where a model's file should be, and are something else: said by name, with what can be done."""

from __future__ import annotations

from pathlib import Path

from hsrpc.errors import CheckpointError

HEAD_BYTES = 64
"""Bytes from the start of a file that tell."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_GGUF = b"GGUF"


def check_own(path: Path, head: bytes) -> None:
    """Check from the first bytes of a file that they are its own content.

    Raises:
        CheckpointError: it is a pointer that Git LFS left in its place, or a GGUF file.
    """
    if head.startswith(_LFS_POINTER):
        remedy = f"run `git lfs pull` in {path.parent}"
        raise CheckpointError(f"{path}: expected the file itself, found a Git LFS pointer to it; {remedy}")
    if head.startswith(_GGUF):
        raise refuse_gguf(path)


def refuse_gguf(path: Path) -> CheckpointError:
    """What is said of a model in GGUF format where one is to be served."""
    remedy = f"run `hsrpc convert {path} DIRECTORY` and serve DIRECTORY"
    return CheckpointError(f"{path}: expected safetensors, found GGUF; {remedy}")


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files of a directory."""
    return sorted(directory.glob("*.gguf"))


def is_gguf(path: Path) -> bool:
    """Whether there is a file that begins as one in GGUF format, whatever its name."""
    return path.is_file() and read_head(path).startswith(_GGUF)


def read_head(path: Path) -> bytes:
    """The first bytes of a file, to be checked."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
