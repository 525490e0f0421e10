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
    """What is said of a model in GGUF format."""
    way = f"from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}) and save_pretrained(DIRECTORY)"
    remedy = f"fetch the model's safetensors checkpoint, or make one with transformers: {way}"
    return CheckpointError(f"{path}: expected safetensors, found GGUF, which hsrpc does not read; {remedy}")


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files of a directory."""
    return sorted(directory.glob("*.gguf"))


def read_head(path: Path) -> bytes:
    """The first bytes of a file, to be checked."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
