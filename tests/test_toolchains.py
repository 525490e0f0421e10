"""`tools/toolchains.sh`: what the clients' languages lack is installed, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUDO = '#!/bin/sh\nshift; exec "$@"\n'
APT_GET = '#!/bin/sh\necho "$DEBIAN_FRONTEND $*" >>calls\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two clients, of which one lacks two packages, and programs that only say how they are called."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/toolchains.sh", tmp_path / "tools")
    for client, missing in (("one", "@echo go-tools gcc"), ("two", "@true")):
        (tmp_path / "clients" / client).mkdir(parents=True)
        (tmp_path / "clients" / client / "Makefile").write_text(f"missing:\n\t{missing}\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("sudo", SUDO), ("apt-get", APT_GET)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(checkout: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    command = [str(checkout / "tools/toolchains.sh")]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=20)


def test_what_is_lacking_is_installed(checkout):
    """By apt-get, which asks nothing."""
    ran = run(checkout)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "installing go-tools gcc\n", "")
    update, install = (checkout / "calls").read_text().splitlines()
    assert update == "noninteractive -qq update"
    assert install.startswith("noninteractive -qq install --yes --no-install-recommends")
    assert install.endswith(" go-tools gcc")


def test_where_all_is_there_nothing_is_done(checkout):
    """Not even a list of packages is fetched."""
    (checkout / "clients/one/Makefile").write_text("missing:\n\t@true\n")
    ran = run(checkout)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "all are here\n", "")
    assert not (checkout / "calls").exists()


def test_a_failure_to_install_is_one(checkout):
    """CI ends there."""
    (checkout / "bin/apt-get").write_text("#!/bin/sh\necho no network >&2; exit 100\n")
    ran = run(checkout)
    assert (ran.returncode, ran.stderr) == (100, "no network\n")
