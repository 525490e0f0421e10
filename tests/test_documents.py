"""What the documents say of files: links lead somewhere, names of modules exist, lines are no longer than code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hsrpc.model.families.readers import DECODERS
from hsrpc.model.families.registry import REFUSED

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "k8s", "proto", "clients", "clients/*", "benchmarks/results")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))
WIDTH = 120
GENERATED = ROOT / "benchmarks/results/README.md"
"""Its rows have whole command lines, and cannot be wrapped."""
LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"(?<![\w./-])(?:hsrpc|benchmarks|tests|tools|proto|clients|k8s)/[\w./{},-]*")
IS_PATH = re.compile(r"/$|\.(?:py|sh|json|toml|yaml|proto|md)$")
SECTIONS = ("Families", "What is refused, and why")
PLANNED = re.compile(r"<!-- planned -->\n(.*?)<!-- end -->", re.DOTALL)
"""A part whose modules are being moved: it may name some that do not exist, and must name one."""


@pytest.fixture(params=PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in LINK.finditer(CODE.sub("", text)):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        is_missing = bool(link["anchor"]) and target.suffix == ".md" and link["anchor"] not in anchors(target)
        if not target.exists() or is_missing:
            broken.append(link[0])
    return broken


def alternatives(name: str) -> list[str]:
    """`a/{b,c}/` is `a/b/` and `a/c/`."""
    found = re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", name)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [name]


def missing_names(text: str) -> list[str]:
    """Files and folders of this repository that a text names and that do not exist."""
    found = (name.rstrip(".,") for name in NAMED.findall(text))
    names = {path for name in found if IS_PATH.search(name) for path in alternatives(name)}
    return sorted(name for name in names if not (ROOT / name).exists())


def test_links_lead_somewhere(page):
    """Every relative link of every page, with the heading that it names."""
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


def test_a_link_to_nothing_is_seen():
    """Files, headings, and headings of the page itself."""
    text = "[a](nowhere.md) [b](security.md#no-such) [c](#neither) [d](security.md#tokens) [e](https://example.com/x)"
    assert broken_links(text, ROOT / "docs/grpc.md") == ["](nowhere.md)", "](security.md#no-such)", "](#neither)"]


def test_names_of_modules_exist(page):
    """What a page calls by its path is there, except in parts that say that it is being moved."""
    assert missing_names(PLANNED.sub("", page.read_text(encoding="utf-8"))) == []


def test_a_planned_part_ends_when_all_of_it_is_there(page):
    """Then its marks are in the way of the check above."""
    parts = PLANNED.findall(page.read_text(encoding="utf-8"))
    assert [part for part in parts if not missing_names(part)] == [], "take its marks away"


def test_a_module_that_does_not_exist_is_seen():
    """Files, folders, and several at once; neither other paths nor labels such as `hsrpc/client`."""
    text = "`hsrpc/engine/engine.py`, hsrpc/no_such.py; hsrpc/{engine,nothing}/. docs/hsrpc/x.py, hsrpc/client: true"
    assert missing_names(text) == ["hsrpc/no_such.py", "hsrpc/nothing/"]


def test_lines_are_short(page):
    """As those of code, tables included."""
    if page == GENERATED:
        return
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line}" for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []


def test_the_page_of_performance_is_short():
    """Method and current tables; what was learnt has a page of its own."""
    assert len((ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()) <= 210


def test_the_page_of_models_has_every_family_and_every_refusal():
    """By `model_type`, each in the table of its own section, and nothing else."""
    sections = (ROOT / "docs/models.md").read_text(encoding="utf-8").split("\n## ")
    families, refused = (next(each for each in sections if each.startswith(f"{name}\n")) for name in SECTIONS)
    assert set(re.findall(r"^\| `(\w+)` \|", families, re.MULTILINE)) == {"model_type", "opt", *DECODERS}
    rows = [line for line in refused.splitlines() if line.startswith("| ") and "`model_type`" not in line]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(REFUSED)
