"""The guard: what it measures, here with tiny models on the CPU, how it judges, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.decoding import Cell
from benchmarks.guard import __main__ as program
from benchmarks.guard import reference
from benchmarks.guard.cases import CASES, Case, Kind, tiny
from benchmarks.guard.reference import best, compare, gpu_kind
from benchmarks.guard.report import verdict
from benchmarks.record import ROOT, header, write_json

NAMES = [case.name for case in CASES]
HEADER = {"commit", "command", "date", "machine", "torch"}


def cell(name: str = "host-kv", efficiency: float = 0.9, **others: object) -> Cell:
    """As a case leaves it, with a limit of 90 ms."""
    figures = {"step_seconds": 0.09 / efficiency, "limit_seconds": 0.09, "predicted_step_seconds": 0.1}
    more = {"tokens_per_second": 960.0, "host_step_seconds": None, "loop_lag_p99": 0.001, "ready_seconds": 3.0}
    about = {"name": name, "shows": "the bus", "setting": {"steps": 5}, "wall_seconds": 5.0}
    return about | figures | more | {"efficiency": efficiency} | others


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where references are, in place of the committed ones."""
    monkeypatch.setattr(reference, "DIRECTORY", tmp_path / "guard")
    return tmp_path / "guard"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes every measurement answer the next of the given cells, or raise it; gives the names of those measured."""

    def give(*cells: Cell | BaseException) -> list[str]:
        measured: list[str] = []
        following: Iterator[Cell | BaseException] = iter(cells)

        async def measure(case: Case) -> Cell:
            measured.append(case.name)
            found = next(following)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(program, "measure", measure)
        return measured

    return give


def save_reference(references: Path, *cells: Cell) -> None:
    write_json(references / "tiny.json", {"header": {}, "kind": "tiny", "cases": cells})


def run(*words: str) -> int:
    return program.main(["--tiny", *words])


def test_cases_are_measured_and_compared_with_what_was_saved(tmp_path, references, monkeypatch, capsys):
    """All figures are there, of decoding, of graphs and of prompts; a second run has a reference to compare with."""
    chosen = [case for case in CASES if case.name in ("host-kv", "resident", "prompts")]
    monkeypatch.setattr(program, "CASES", chosen)
    assert run("--save", "--repeats", "1", "--commit", "0123abc") == 0
    saved = json.loads((references / "tiny.json").read_text())
    assert set(saved["header"]) == HEADER
    assert saved["header"]["commit"] == "0123abc"
    cells = {each["name"]: each for each in saved["cases"]}
    for each in cells.values():
        assert each["num_steps"] == len(each["step_times"]) == 5
        assert min(each["step_seconds"], each["limit_seconds"], each["tokens_per_second"]) > 0
        assert each["efficiency"] > 0
    assert cells["host-kv"]["predicted_step_seconds"] > 0
    assert cells["prompts"]["predicted_step_seconds"] is None
    assert [name for name in cells if cells[name]["host_step_seconds"] is not None] == ["resident"]
    file = tmp_path / "out.json"
    run("--case", "host-kv", "--repeats", "1", "--within", "0.99", "--json", str(file))
    [again] = json.loads(file.read_text())["cases"]
    assert again["setting"] == cells["host-kv"]["setting"]
    assert again["efficiency_to_reference"] == pytest.approx(again["efficiency"] / cells["host-kv"]["efficiency"])
    assert again["step_to_reference"] == pytest.approx(again["step_seconds"] / cells["host-kv"]["step_seconds"])
    assert "mean nothing" in capsys.readouterr().out


def test_a_case_that_does_not_fit_is_an_error_of_that_case(tmp_path, monkeypatch, capsys):
    """The others run; what was asked for was not measured, and the exit status says so."""

    def small(case: Case, directory: Path) -> Case:
        case = tiny(case, directory)
        return replace(case, config=replace(case.config, gpu_memory="1KiB")) if case.name == "host-kv" else case

    monkeypatch.setattr(program, "tiny", small)
    file = tmp_path / "out.json"
    assert run("--case", "host-kv", "--case", "host-auto", "--json", str(file)) == 1
    failed, fine = json.loads(file.read_text())["cases"]
    assert "gpu_memory" in failed["failure"]
    assert "failure" not in fine
    assert "ERROR host-kv: gpu_memory" in capsys.readouterr().out


@pytest.mark.parametrize(("efficiency", "status"), [(0.883, 0), (0.88, 1), (0.95, 0)])
def test_more_than_two_percent_lost_is_a_fault(efficiency, status, references, answers, capsys):
    """0.882 is 2 % less than 0.9; the line names the case and what it lost."""
    save_reference(references, cell())
    answers(*[cell(efficiency=efficiency)] * 2)
    assert run("--case", "host-kv") == status
    out = capsys.readouterr().out
    assert ("LOST host-kv: lost 2.2% of its efficiency, more than 2.0%" in out) == bool(status)
    assert ("OK: 1 compared" in out) == (not status)


@pytest.mark.parametrize("figures", [{"efficiency": 0.8, "step_seconds": 0.1}, {"step_seconds": 0.2}])
def test_another_calibration_or_a_slower_bus_alone_is_no_loss(figures, references, answers):
    """A limit that was measured otherwise changes the efficiency of the same step, and a slower bus the step alone."""
    save_reference(references, cell())
    answers(*[cell(**figures)] * 2)
    assert run("--case", "host-kv") == 0


def test_within_is_what_may_be_lost(references, answers):
    """A wider bound lets a case pass that the default does not."""
    save_reference(references, cell())
    answers(*[cell(efficiency=0.8)] * 4)
    assert run("--case", "host-kv") == 1
    assert run("--case", "host-kv", "--within", "0.2") == 0


def test_a_case_that_seems_to_have_lost_is_measured_again(tmp_path, references, answers):
    """Until it has not, as often as may be; the best counts, and the efficiencies of all are kept."""
    save_reference(references, cell())
    file = tmp_path / "out.json"
    measured = answers(cell(efficiency=0.7), cell(efficiency=0.8), cell(efficiency=0.9), cell())
    assert run("--case", "host-kv", "--repeats", "4", "--json", str(file)) == 0
    assert len(measured) == 3
    [found] = json.loads(file.read_text())["cases"]
    assert found["efficiency"] == 0.9
    assert found["efficiencies"] == [0.7, 0.8, 0.9]
    measured = answers(cell())
    assert run("--case", "host-kv", "--repeats", "4") == 0
    assert len(measured) == 1


def test_without_a_reference_it_says_how_to_make_one(answers, capsys):
    """Nothing was compared, which is neither a fault nor called fine; nothing is measured twice for it."""
    measured = answers(*map(cell, NAMES))
    assert run() == 0
    out = capsys.readouterr().out
    assert "NOT COMPARED: there is no reference of tiny" in out
    assert "--save" in out
    assert out.count("NOT COMPARED") == 1
    assert "OK" not in out
    assert measured == NAMES


def test_saving_measures_every_case_as_often_as_asked(references, answers):
    """A disturbed measurement would be a reference that hides what is lost; the best of each is kept."""
    measured = answers(*(cell(name, efficiency) for name in NAMES for efficiency in (0.8, 0.9, 0.7)))
    assert run("--save", "--repeats", "3") == 0
    assert len(measured) == 3 * len(NAMES)
    saved = json.loads((references / "tiny.json").read_text())
    assert [each["name"] for each in saved["cases"]] == NAMES
    assert {each["efficiency"] for each in saved["cases"]} == {0.9}
    assert saved["header"]["command"] == "python -m benchmarks.guard --tiny --save --repeats 3"


def test_a_reference_has_all_cases(references, answers, capsys):
    """One that failed, or a choice of cases, would leave the others without any."""
    answers({"name": "host-kv", "failure": "no memory", "wall_seconds": 1.0}, *map(cell, NAMES[1:]))
    assert run("--save", "--repeats", "1") == 1
    assert not references.exists()
    assert "NOT SAVED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--save", "--case", "host-kv")
    assert "leave --case out" in capsys.readouterr().err


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path, answers):
    """Each case is in the file before the next begins."""
    file = tmp_path / "new" / "out.json"
    answers(cell(NAMES[0]), cell(NAMES[1]), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run("--json", str(file))
    found = json.loads(file.read_text())
    assert [each["name"] for each in found["cases"]] == NAMES[:2]
    assert set(found["header"]) == HEADER
    assert [path.name for path in file.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("known", "remark"),
    [({}, "no reference"), ({"host-kv": cell(setting={"steps": 6})}, "the reference has another setting")],
)
def test_a_case_is_compared_with_its_like_alone(known, remark):
    """A new case, or one that was changed, has lost nothing; a line says that it was not compared."""
    found = compare(cell(efficiency=0.1), known)
    assert (found.efficiency, found.step, found.remark) == (None, None, remark)
    assert not found.has_lost(0.02)
    assert verdict([found], 0.02) == [f"NOT COMPARED host-kv: {remark}"]
    both = [found, compare(cell("resident"), {"resident": cell("resident")})]
    assert verdict(both, 0.02)[1] == "OK: 1 compared, none lost more than 2.0% of its efficiency"


def test_a_failure_is_the_result_only_where_nothing_else_is():
    """The last failure of several measurements, or the best of the others."""
    failures = [{"name": "host-kv", "failure": text} for text in ("first", "second")]
    assert best(failures)["failure"] == "second"
    assert best([*failures, cell()])["efficiencies"] == [0.9]


def test_without_a_gpu_it_says_that_it_needs_one(capsys):
    """In one sentence, before anything is loaded."""
    assert program.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--within", "2"), ("--case", "nothing")])
def test_options_that_make_no_sense_are_refused(words, capsys):
    """With what was given, and what may be."""
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert words[1] in capsys.readouterr().err


def test_the_kind_of_a_gpu_is_its_name():
    """As files have it."""
    assert gpu_kind("NVIDIA H200") == "nvidia-h200"
    assert gpu_kind("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_names_are_unique_and_settings_can_be_saved():
    """A reference finds its case by its name, and the setting in a file is the one in the table."""
    assert len(set(NAMES)) == len(CASES)
    assert {case.kind for case in CASES} == set(Kind)
    for case in CASES:
        assert json.loads(json.dumps(case.setting)) == case.setting


def test_a_header_names_the_commit_and_no_directories(monkeypatch, tmp_path):
    """Without history it is unknown; a file of the command line keeps its name alone."""
    found = header(["python", "-m", "benchmarks.x", "--json", str(tmp_path / "a b.json"), "--shape", "opt-13b"])
    assert found["command"] == "python -m benchmarks.x --json 'a b.json' --shape opt-13b"
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert header([])["commit"] == record.UNKNOWN
    for words in (["init"], ["add", "f"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m"]):
        (tmp_path / "f").write_text("1")
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    clean = header([])["commit"]
    (tmp_path / "f").write_text("2")
    assert header([])["commit"] == clean + "+"
    assert len(clean) == 12


def test_it_needs_neither_the_server_nor_grpc():
    """A machine that only measures has the packages of the engine alone."""
    loaded = "[m for m in sys.modules if m.startswith(('hsrpc.server', 'hsrpc.cli', 'hsrpc.v1', 'grpc'))]"
    text = f"import sys; import benchmarks.guard.__main__; print({loaded})"
    found = subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
