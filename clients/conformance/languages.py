"""The languages that there are clients of: what each needs here, how it is built, and what it was built with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLIENTS = Path(__file__).parents[1]
_ORDER = ("python", "typescript", "go", "java", "cpp")
TITLES = {"python": "Python", "typescript": "TypeScript", "go": "Go", "java": "Java", "cpp": "C++"}


class BuildError(Exception):
    """A client could not be built; with what the tools said."""


def languages() -> list[str]:
    """Names of the folders that have a client, in the order of the tables."""
    return [name for name in _ORDER if (CLIENTS / name / "Makefile").exists()]


def missing(language: str) -> str:
    """Packages that this machine lacks for the language's client, between spaces; empty: none."""
    return _make(language, "missing").strip()


def versions(language: str) -> str:
    """Tools and libraries that the client is built with here."""
    return _make(language, "versions").strip()


def build(language: str) -> Path:
    """The program that the cases are run against."""
    _make(language, "build")
    return CLIENTS / language / "build/conformance"


def package(language: str) -> Path:
    """The README's first example, against the package as it is installed elsewhere."""
    _make(language, "package")
    return CLIENTS / language / "build/readme-example"


def _make(language: str, target: str) -> str:
    command = ["make", "--silent", "--no-print-directory", "-C", str(CLIENTS / language), target]
    environment = os.environ | {"PYTHON": sys.executable}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)  # noqa: S603
    if ran.returncode != 0:
        raise BuildError(f"make -C clients/{language} {target}:\n{ran.stdout[-3000:]}{ran.stderr[-6000:]}")
    return ran.stdout
