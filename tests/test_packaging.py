"""What `pip install hsrpc` brings: read from a wheel and an sdist that are built here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hsrpc

ROOT = Path(__file__).parents[1]
MODELS = ("storyteller", "storyteller-draft")
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy of the checkout, without a network."""
    folder = tmp_path_factory.mktemp("build")
    generated = shutil.ignore_patterns("__pycache__")
    for name in ("hsrpc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=generated)
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    [path] = dist.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def requirements(metadata: Message, extra: str = "") -> set[str]:
    """Names of the packages that an install with `extra` needs, on Linux."""
    parsed = map(Requirement, metadata.get_all("Requires-Dist") or [])
    return {item.name for item in parsed if item.marker is None or item.marker.evaluate({"extra": extra})}


def package_files() -> set[str]:
    """All files under hsrpc/ that git would keep."""
    files = (ROOT / "hsrpc").rglob("*")
    return {file.relative_to(ROOT).as_posix() for file in files if file.is_file() and "__pycache__" not in file.parts}


def test_a_plain_install_is_the_client_alone(metadata):
    """Without an extra nothing is needed but gRPC."""
    assert requirements(metadata) == {"grpcio", "protobuf"}


def test_the_engine_extra_brings_torch(metadata):
    """`hsrpc[engine]` has what serving imports, and nothing of the tests."""
    needed = requirements(metadata, "engine")
    assert {"torch", "transformers", "uvloop", "grpcio-health-checking", "rich"} <= needed
    assert not {"pytest", "mypy", "matplotlib"} & needed


def test_the_gateway_extra_brings_the_gateway_alone(metadata):
    """What the OpenAI port needs beside the engine: the gateway, and the stubs of what it speaks."""
    assert requirements(metadata, "gateway") - requirements(metadata) == {"smg", "smg-grpc-proto"}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    """Type marker, stubs and the bundled model are in it; tests are not."""
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == package_files()
    assert {"hsrpc/py.typed", *(f"hsrpc/models/{name}/model.safetensors" for name in MODELS)} <= files


def test_the_wheel_has_the_license_and_the_command(wheel):
    """The license text travels along, and `hsrpc` starts the command line."""
    texts = {name.split("/", 1)[1]: wheel.read(name) for name in wheel.namelist() if ".dist-info/" in name}
    assert b"Apache License" in texts["licenses/LICENSE"]
    assert b"hsrpc = hsrpc.cli.main:main" in texts["entry_points.txt"]


def test_the_sdist_can_be_built_again(dist):
    """It has the package, the license and the pinned versions, and no tests."""
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | set(SOURCES) <= names
    assert not [name for name in names if name.startswith("tests")]


def test_versions_agree(metadata):
    """`hsrpc.__version__` is the version of the distribution."""
    assert metadata["Version"] == hsrpc.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
