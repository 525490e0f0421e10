"""Workflows of a public CI, which never run here: what their schema and a linter of security can find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
RELEASE = ROOT / ".github/workflows/release.yml"
BIN = Path(sys.executable).parent
SCHEMA = (BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows")
SECURITY = (BIN / "zizmor", "--offline", "--quiet")


def passes(check: tuple[str | Path, ...], file: Path) -> bool:
    return subprocess.run([*check, file], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture
def release() -> dict[str, Any]:
    return yaml.safe_load(RELEASE.read_text())


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
@pytest.mark.parametrize("check", [SCHEMA, SECURITY], ids=["schema", "security"])
def test_workflows_pass(check, file):
    """By the schema of GitHub's workflows, and by what zizmor knows of attacks on them."""
    assert passes(check, file)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (SCHEMA, "timeout-minutes: 120", "timeout_minutes: 120"),
        (SCHEMA, "runs-on: ubuntu-24.04", "needs: check"),
        (SECURITY, "persist-credentials: false", "fetch-depth: 1"),
        (SECURITY, "- run: .ci/run", "- run: echo ${{ github.event.head_commit.message }}"),
        (SECURITY, "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd", "actions/checkout@v6"),
    ],
)
def test_a_fault_is_found(check, right, wrong, tmp_path):
    """The checks can fail."""
    text = RELEASE.read_text()
    assert right in text
    (tmp_path / "release.yml").write_text(text.replace(right, wrong))
    assert not passes(check, tmp_path / "release.yml")


def test_a_release_publishes_only_what_was_checked(release):
    """Each job that publishes comes after the check, may do nothing else, and waits for its environment's reviewers."""
    jobs = release["jobs"]
    permissions = {name: job["permissions"] for name, job in jobs.items()}
    assert permissions == {
        "check": {"contents": "read"},
        "build": {"contents": "read"},
        "pypi": {"id-token": "write"},
        "npm": {"id-token": "write"},
        "images": {"contents": "read", "packages": "write"},
    }
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "check": None,
        "build": "check",
        "pypi": "build",
        "npm": "build",
        "images": "check",
    }
    assert {job.get("environment") for job in jobs.values()} == {None, "pypi", "npm", "images"}


def test_images_are_those_of_the_dockerfile(release):
    """Its targets, from its base, whose digest is looked up and given."""
    job, text = release["jobs"]["images"], (ROOT / "Dockerfile").read_text()
    [steps] = [step["run"] for step in job["steps"] if "buildx build" in step.get("run", "")]
    assert f"ARG BASE={job['env']['BASE']}\n" in text
    for target in job["strategy"]["matrix"]["target"]:
        assert f"FROM server AS {target}\n" in text
    assert '--build-arg "BASE=$BASE@$digest"' in steps
    assert set(re.findall(r"--build-arg \"(\w+)=", steps)) == set(
        re.findall(r"^ARG (BASE|VERSION|REVISION)\b", text, re.M)
    )


def test_a_release_names_what_is_there(release):
    """The folder of the client, the lock of the build, and what checks all of it."""
    steps = [step for job in release["jobs"].values() for step in job["steps"]]
    [client] = {step["working-directory"] for step in steps if "working-directory" in step}
    assert (ROOT / client / "package-lock.json").is_file()
    commands = "\n".join(step.get("run", "") for step in steps)
    for file in ("requirements/build.txt", ".ci/run"):
        assert file in commands
        assert (ROOT / file).is_file()


def test_what_never_ran_says_so():
    """In its own first lines, and where releases are described."""
    assert "has never run" in RELEASE.read_text().split("\nname:")[0]
    assert "the workflow was never run" in (ROOT / "docs/operations.md").read_text()
