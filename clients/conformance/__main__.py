"""Command line of the suite."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from clients.conformance.cases import Suite
from clients.conformance.languages import OWN, BuildError, build, languages, remedy, versions
from clients.conformance.run import Outcome, Runner
from clients.conformance.servers import Servers
from clients.conformance.table import replace_tables, tables

_EXAMPLES = """
examples:
  python -m clients.conformance                          every language whose tools are here, every case
  python -m clients.conformance --language go            one language
  python -m clients.conformance --language go --case "stop string" --case cancel
  python -m clients.conformance --program ./my-client    a program of your own, in any language
  python -m clients.conformance --markdown               the results as tables
  python -m clients.conformance --markdown docs/clients.md
  python -m clients.conformance --list                   the cases, and what each is for
"""
_STDOUT = Path("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 0: all passed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    suite = Suite.load()
    try:
        suite = suite.named(options.case) if options.case else suite
    except ValueError as error:
        parser.error(f"--case: {error}")
    if options.list:
        for case in suite.cases:
            print(f"{case.name:28} {case.about}")
        return 0
    try:
        programs = {OWN: options.program} if options.program else _built(options.language or languages())
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if options.markdown not in (None, _STDOUT) and (options.case or list(programs) != languages()):
        parser.error("--markdown: a page has all cases of all languages, and these are fewer")
    outcomes = _run(suite, programs)
    if options.markdown is not None:
        _write(options.markdown, tables(suite, outcomes, {name: versions(name) for name in programs}))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} passed", file=sys.stderr)
    return 1 if failed or not outcomes else 0


def _built(names: Sequence[str]) -> dict[str, Path]:
    """Programs by language; what cannot be built here is left out, with a line."""
    programs = {}
    for name in names:
        if left_out := remedy(name):
            print(left_out, file=sys.stderr)
        else:
            print(f"{name}: building", file=sys.stderr)
            programs[name] = build(name)
    return programs


def _run(suite: Suite, programs: dict[str, Path]) -> list[Outcome]:
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="hsrpc-conformance-") as name:
        folder = Path(name)
        with Servers(suite.servers, folder) as servers:
            runner = Runner(suite, servers, folder)
            for language, path in programs.items():
                for outcome in runner.run(language, path):
                    print(outcome, file=sys.stderr, flush=True)
                    outcomes.append(outcome)
    return outcomes


def _write(page: Path, found: Mapping[str, str]) -> None:
    if page == _STDOUT:
        print("\n\n".join(found.values()))
    else:
        page.write_text(replace_tables(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clients.conformance",
        description="Run the cases that all clients pass, against servers that are started for it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--language", action="append", choices=languages(), help="build and run this one; may be given again"
    )
    what.add_argument("--program", type=Path, metavar="FILE", help="run this one, which is built already")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case alone; may be given again")
    parser.add_argument(
        "--markdown",
        nargs="?",
        type=Path,
        const=_STDOUT,
        metavar="PAGE",
        help="print the results as tables, or put them into this page, between the marks of each",
    )
    parser.add_argument("--list", action="store_true", help="print the cases, and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
