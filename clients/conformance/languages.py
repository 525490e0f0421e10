"""The languages that there are clients of: what each needs here, how it is built, and what it was built with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

CLIENTS = Path(__file__).parents[1]
_ORDER = ("python", "typescript", "go", "java", "cpp")
OWN = "program"
"""Stands for the language of a program that is no client of ours."""
TITLES = {OWN: "program", "python": "Python", "typescript": "TypeScript", "go": "Go", "java": "Java", "cpp": "C++"}


class BuildError(Exception):
    """A client could not be built; with what the tools said."""


def languages() -> list[str]:
    """Names of the folders that have a client, in the order of the tables."""
    return [name for name in _ORDER if (CLIENTS / name / "Makefile").exists()]


def missing(language: str) -> str:
    """Packages that this machine lacks for the language's client, between spaces; empty: none."""
    return _make(language, "missing").strip()


def remedy(language: str) -> str:
    """What a person is told of a language whose tools are not all here; empty: they are."""
    packages = missing(language)
    return f"{language} is left out: apt-get install {packages}" if packages else ""


def versions(language: str) -> str:
    """Tools and libraries that the client is built with here."""
    if language == OWN:
        return "-"
    return _make(language, "versions").strip()


def build(language: str) -> Path:
    """The program that the cases are run against."""
    _make(language, "build")
    return CLIENTS / language / "build/conformance"


def package(language: str) -> Path:
    """The README's first example, against the package as it is installed elsewhere."""
    _make(language, "package")
    return CLIENTS / language / "build/readme-example"


def test(language: str) -> None:
    """Run what tests of its own the client has."""
    if "\ntest:" in (CLIENTS / language / "Makefile").read_text(encoding="utf-8"):
        _make(language, "test")


@contextmanager
def _alone(language: str) -> Iterator[None]:
    """Nobody else makes anything of this language meanwhile."""
    folder = CLIENTS / language / "build"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        flock(lock, LOCK_EX)
        yield


def _make(language: str, target: str) -> str:
    command = ["make", "--silent", "--no-print-directory", "-C", str(CLIENTS / language), target]
    environment = os.environ | {"PYTHON": sys.executable}
    with _alone(language):
        ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)  # noqa: S603
    if ran.returncode != 0:
        raise BuildError(f"make -C clients/{language} {target}:\n{ran.stdout[-3000:]}{ran.stderr[-6000:]}")
    return ran.stdout
