"""Plans and predictions of well-known models stay as they are written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plan.plans import CASES, describe

WRITTEN = Path(__file__).with_name("plans.txt").read_text(encoding="utf-8")


def written(name: str) -> str:
    return WRITTEN.split(f"[{name}]\n")[1].split("\n[")[0].rstrip("\n") + "\n"


@pytest.mark.parametrize("name", list(CASES))
def test_the_plan_is_as_written_down(name: str):
    """To nine digits; a plan that is meant to change is written down anew (see `tests.plan.plans`)."""
    assert describe(CASES[name]) == written(name)


def test_all_that_is_written_down_is_compared():
    """No case is left behind in the file."""
    assert [line[1:-1] for line in WRITTEN.splitlines() if line.startswith("[")] == list(CASES)
