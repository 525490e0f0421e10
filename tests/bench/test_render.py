"""Results and the tables made of them: every file says where it comes from, and every table is what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import raw_results, render, tables
from benchmarks.raw_results import Header, Record

ROOT = Path(__file__).parents[2]
HEADER = {
    "commit": "d88018c",
    "command": "hsrpc bench decode",
    "date": "2026-11-28",
    "machine": "a machine",
    "torch": "2.11",
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the results."""
    monkeypatch.setattr(raw_results, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", raw_results.names())
def test_every_result_says_where_it_comes_from(name):
    """Commit, command, date, machine and torch, none of them empty."""
    assert raw_results.read(name).header.command


def test_every_result_is_in_a_table_that_a_page_shows():
    """A file that nothing is made of is one that nobody keeps true."""
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in render.PAGES)
    shown = {match["name"] for match in render.MARKED.finditer(pages)} - {"commands"}
    used = {source for name in shown for source in render.TABLES[name].sources}
    assert sorted(used) == raw_results.names()


def test_every_table_is_shown():
    """One that no page has is dead code."""
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in render.PAGES)
    assert {match["name"] for match in render.MARKED.finditer(pages)} == set(render.TABLES)


def test_tables_are_what_the_results_say(capsys):
    """`python -m benchmarks.render --check` names none."""
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_named_and_written_again(tmp_path, monkeypatch, capsys):
    """A figure changed by hand is found by --check, and put right without it."""
    page = tmp_path / "page.md"
    fresh = f"before\n<!-- table: grpc -->\n{render.render('grpc', page)}<!-- end -->\nbehind\n"
    page.write_text(fresh.replace("13,291", "14,291"), encoding="utf-8")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "PAGES", ("page.md",))
    assert render.main(["--check"]) == 1
    assert "page.md: table grpc is stale" in capsys.readouterr().out
    assert render.main([]) == 0
    assert page.read_text(encoding="utf-8") == fresh
    assert render.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("commit", "main"),
        ("command", ""),
        ("date", "yesterday"),
        ("machine", " "),
        ("torch", None),
    ],
)
def test_a_header_that_says_nothing_is_refused(results, field, value):
    """The error names the file, the field and the value."""
    (results / "case.json").write_text(json.dumps({"header": HEADER | {field: value}, "result": 1}))
    with pytest.raises(ValueError, match=rf"case: the header's {field} is {value!r}"):
        raw_results.read("case")


def test_a_header_without_a_field_is_refused(results):
    """So is a file without any header."""
    header = {field: value for field, value in HEADER.items() if field != "torch"}
    (results / "case.json").write_text(json.dumps({"header": header, "result": 1}))
    with pytest.raises(ValueError, match=r"case: the header must have .*torch; it has commit, command"):
        raw_results.read("case")
    (results / "case.json").write_text("[1]")
    with pytest.raises(ValueError, match="header"):
        raw_results.read("case")


def test_a_result_is_read_with_its_header(results):
    """By its path below the folder."""
    (results / "question").mkdir()
    (results / "question" / "case.json").write_text(json.dumps({"header": HEADER, "result": [1]}))
    assert raw_results.names() == ["question/case"]
    assert raw_results.read("question/case") == ("question/case", Header(**HEADER), [1])
    (results / "more.json").write_text(
        json.dumps({"header": HEADER | {"commit": "d88018c+"}, "kind": "h", "cases": []})
    )
    assert raw_results.read("more").result == {"kind": "h", "cases": []}


def test_the_guards_references_are_listed_by_gpu():
    """A line a case; the GPU is said once."""
    cell = {"step_seconds": 0.5, "limit_seconds": 0.49, "efficiency": 0.98, "tokens_per_second": 128.0}
    cases = [cell | {"name": "host-kv"}, cell | {"name": "resident", "step_seconds": 0.0044}]
    record = Record("guard/nvidia-h200", Header(**HEADER), {"kind": "nvidia-h200", "cases": cases})
    assert list(tables.guard([record])) == [
        ("nvidia-h200", "host-kv", "500 ms", "490 ms", "0.98", "128", "d88018c"),
        ("", "resident", "4.4 ms", "490 ms", "0.98", "128", "d88018c"),
    ]


def test_numbers_have_as_many_digits_as_they_are_worth():
    """Milliseconds and rates."""
    assert [tables.ms(seconds) for seconds in (0.00791, 0.0999, 0.1, 1.8723)] == [
        "7.9 ms",
        "99.9 ms",
        "100 ms",
        "1872 ms",
    ]
    assert list(map(tables.rate, (7.81, 99.4, 254.2, 20471.6))) == ["7.8", "99.4", "254", "20,472"]
