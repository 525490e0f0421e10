"""`make` with nothing installed: what it tells while pip works, and that a failure of pip is one of make."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = """\
WARNING: a mirror was slow
Obtaining file:///somewhere/hsrpc
Collecting torch==2.13.0 (from -c constraints.txt (line 3))
  Downloading https://mirror/whl/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (29 kB)
  Downloading https://mirror/whl/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (190.1 MB)
  Using cached scikit_learn-1.8.0-cp311-cp311-linux.whl (12 MB)
Downloading rich-14.0.0-py3-none-any.whl (243 kB)
Downloading mypy-2.4.1-cp311-cp311-linux.whl (9.9 MB)
Downloading nvidia_cublas-13.0-py3-none-linux.whl (1.2 GB)
Installing collected packages: torch, scikit_learn, rich, mypy
Successfully installed mypy-2.4.1 rich-14.0.0 scikit_learn-1.8.0 torch-2.13.0
"""
PYTHON = """\
#!/bin/sh
case $* in
--version) echo Python 3.11.9 ;;
"-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp pip .venv/bin/pip ;;
-c*) echo "[4/4] ready, with torch 2.13.0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a python whose pip prints PIP and then does what the file `end` says."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/install.sh", tmp_path / "tools")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "log").write_text(PIP)
    (tmp_path / "pip").write_text("#!/bin/sh\ngrep '^WARNING' log >&2\ngrep -v '^WARNING' log\n. ./end\n")
    for name in ("python", "pip"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "end").touch()
    return tmp_path


def install(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [checkout / "tools/install.sh", checkout / "python"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)


def test_a_line_for_each_stage_and_large_file(checkout):
    """Few lines, of which one knows how far it is."""
    ran = install(checkout)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "[1/4] making .venv with Python 3.11.9",
        "[2/4] finding and fetching hsrpc's packages and tools, a minute or two; of these are large:",
        "      torch, 190.1 MB",
        "      scikit_learn, 12 MB",
        "      nvidia_cublas, 1.2 GB",
        "[3/4] installing 4 packages",
        "[4/4] ready, with torch 2.13.0",
    ]


def test_what_pip_fails_of_is_shown(checkout):
    """Its words and its failure, and nothing is ready."""
    (checkout / "end").write_text("echo 'ERROR: No matching distribution found' >&2; exit 1\n")
    ran = install(checkout)
    assert (ran.returncode, ran.stderr) == (1, "ERROR: No matching distribution found\n")
    assert "ready" not in ran.stdout
