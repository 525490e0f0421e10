"""Every client passes the suite, installs outside the tree, and its README's first example runs there.

What a language's client needs is not part of hsrpc's own set-up: a language without its tools is left out, with a
warning or a skipped test that names the packages. With HSRPC_ALL_CLIENTS=1 that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from clients.conformance import languages as clients
from clients.conformance.cases import ServerKind, Suite
from clients.conformance.run import Outcome, Runner
from clients.conformance.servers import Servers

ROOT = Path(__file__).parents[2]
LANGUAGES = clients.languages()
MUST_BE_HERE = os.environ.get("HSRPC_ALL_CLIENTS") == "1"


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    """A language whose tools are here."""
    name: str = request.param
    if left_out := clients.remedy(name):
        (pytest.fail if MUST_BE_HERE else pytest.skip)(left_out)
    return name


@pytest.mark.timeout(1500)
def test_every_client_conforms(tmp_path: Path):
    """One test for all languages, so that they share the servers."""
    left_out = {name: text for name in LANGUAGES if (text := clients.remedy(name))}
    if MUST_BE_HERE:
        assert left_out == {}
    for text in left_out.values():
        warnings.warn(text, stacklevel=1)
    programs = {name: clients.build(name) for name in LANGUAGES if name not in left_out}
    outcomes: list[Outcome] = []
    with Servers(Suite.load().servers, tmp_path) as servers:
        runner = Runner(Suite.load(), servers, tmp_path)
        for name, program in programs.items():
            outcomes += runner.run(name, program)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, "\n" + "\n".join(map(str, failed))
    assert len(outcomes) == len(programs) * len(Suite.load().cases)


@pytest.mark.timeout(900)
def test_the_package_is_installed_outside_the_tree(language: str, tmp_path: Path):
    """The README's first example, built against it, streams a text; so says the server's log."""
    example = clients.package(language)
    with Servers({"open": ServerKind()}, tmp_path) as servers:
        servers.start(["open"])
        environment = os.environ | {"HSRPC_TARGET": servers["open"].address}
        command = [str(example)]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        log = servers["open"].log
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.split()) > 10
    assert log.count("status=OK finish=") == 1


@pytest.mark.timeout(900)
def test_tests_of_the_language_itself(language: str):
    """Those that a client has beside the suite."""
    clients.test(language)


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "python"], indirect=True)
def test_stubs_are_current(language: str, tmp_path: Path):
    """They are what the proto files give, with the tools of CI; `make proto-check` looks after Python's."""
    if not MUST_BE_HERE:
        pytest.skip("stubs name the version of what made them: compared with HSRPC_ALL_CLIENTS=1, where that is known")
    folder, copy = ROOT / "clients" / language, tmp_path / "clients" / language
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("build", "node_modules"))
    if (folder / "node_modules").exists():
        (copy / "node_modules").symlink_to(folder / "node_modules")
    command = ["make", "--silent", "-C", str(copy), "stubs"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHON": sys.executable})
    differing = [name for name in tracked(folder) if (copy / name).read_bytes() != (folder / name).read_bytes()]
    assert differing == [], f"make -C clients/{language} stubs"


def tracked(folder: Path) -> list[str]:
    """Names of the files that git has of a folder."""
    command = ["git", "-C", str(folder), "ls-files"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
