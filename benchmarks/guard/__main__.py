"""python -m benchmarks.guard: whether the engine's data path lost speed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import guard
from benchmarks.decoding import Cell
from benchmarks.guard.cases import CASES, Case, tiny
from benchmarks.guard.measure import measure
from benchmarks.guard.reference import Comparison, best, compare, gpu_kind, read_reference, reference_file
from benchmarks.guard.report import line_of, print_table, verdict
from benchmarks.record import header, write_json
from hsrpc.bench.profile import has_gpu
from hsrpc.config import DeviceKind
from hsrpc.device.device import open_device

PROGRAM = "python -m benchmarks.guard"
_TINY_KIND = "tiny"
_EXAMPLES = """\
examples, from the root of the repository:
  python -m benchmarks.guard --json guard.json
  python -m benchmarks.guard --case host-kv --case resident --repeats 3
  python -m benchmarks.guard --save --commit 0123abc
  python -m benchmarks.guard --tiny
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare, say what came of it. Returns the exit status, which the package's docstring explains."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    if not options.tiny and not has_gpu(DeviceKind.CUDA):
        print("the guard measures a GPU, and this machine has none that torch can use", file=sys.stderr)
        return 2
    started = time.perf_counter()
    kind = _TINY_KIND if options.tiny else gpu_kind(open_device(DeviceKind.CUDA).name)
    about = header([*PROGRAM.split(), *words], commit=options.commit)
    reference = read_reference(kind)
    cases = [case for case in CASES if options.case is None or case.name in options.case]
    compared: list[Comparison] = []
    with TemporaryDirectory() as directory:
        for case in cases:
            found = _measure_case(tiny(case, Path(directory)) if options.tiny else case, reference, options)
            compared.append(compare(found, reference))
            if options.json:  # at once: a run that is cut keeps what it has
                write_json(options.json, _content(about, kind, compared))
    print_table(f"{about['machine']}, {time.perf_counter() - started:.0f} s in all", compared)
    return _conclude(compared, kind, about, options)


def _measure_case(case: Case, reference: dict[str, Cell], options: argparse.Namespace) -> Cell:
    """The best of the times that the case is measured; see the package's docstring for how often."""
    from hsrpc.cli.loop import run_loop  # here, so that nothing of the command line is loaded with this module

    cells: list[Cell] = []
    for number in range(options.repeats):
        _tell(f"{case.name}: {case.shows}" + (f" (again, {number + 1} of {options.repeats})" if number else ""))
        cells.append(run_loop(measure(case)))
        _tell(f"  {line_of(cells[-1])}")
        has_lost = compare(best(cells), reference).has_lost(options.within)
        if "failure" in cells[-1] or not (options.save or has_lost):
            break
    return best(cells)


def _conclude(compared: Sequence[Comparison], kind: str, about: dict[str, str], options: argparse.Namespace) -> int:
    """Save the reference, or judge by it. Returns the exit status."""
    if options.tiny:
        print("tiny models on the CPU: these numbers mean nothing")
    failed = [each for each in compared if "failure" in each.cell]
    judged: Sequence[Comparison] = compared
    if options.save and not failed:
        write_json(reference_file(kind), _content(about, kind, compared))
        print(f"SAVED as the reference of {kind}: {reference_file(kind).name}")
        return 0
    if options.save:
        print("NOT SAVED: a reference has all cases")
    if not reference_file(kind).exists():
        print(f"NOT COMPARED: there is no reference of {kind}; make one of a good commit with {PROGRAM} --save")
        judged = failed
    for line in verdict(judged, options.within):
        print(line)
    return int(any(each.has_lost(options.within) for each in judged))


def _content(about: dict[str, str], kind: str, compared: Sequence[Comparison]) -> dict[str, object]:
    """What a file has."""
    return {"header": about, "kind": kind, "cases": [_with_ratios(each) for each in compared]}


def _with_ratios(each: Comparison) -> Cell:
    return each.cell | {"efficiency_to_reference": each.efficiency, "step_to_reference": each.step}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=guard.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be repeated (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here, after each case")
    parser.add_argument("--save", action="store_true", help="make what is measured the reference of this kind of GPU")
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="most times that a case is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--within",
        type=float,
        default=0.02,
        metavar="X",
        help="part that may be lost (default: %(default)s)",
    )
    parser.add_argument("--commit", metavar="HASH", help="of the sources, where they have no git history")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try the guard itself")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: a case is measured at least once; give 1 or more")
    if not 0 <= options.within < 1:
        parser.error(f"--within {options.within}: not a part; give one in [0, 1), such as 0.02")
    if options.save and options.case:
        parser.error("--save: a reference has all cases; leave --case out")
    return options


if __name__ == "__main__":
    sys.exit(main())
