"""The results as a table, of which docs/clients.md has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clients.conformance.cases import Suite
from clients.conformance.languages import TITLES
from clients.conformance.run import Outcome

_MARKS = {True: "yes", False: "**no**", None: "-"}


def tables(suite: Suite, outcomes: Sequence[Outcome], versions: Mapping[str, str]) -> dict[str, str]:
    """Each table by its name."""
    return {"conformance": conformance_table(suite, outcomes), "versions": version_table(versions)}


def replace_tables(page: str, found: Mapping[str, str]) -> str:
    """A page with each table in place of what stands between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such marks.
    """
    for name, table in found.items():
        head, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"no place for a table: <!-- table: {name} --> and <!-- end --> are not there")
        page = f"{head}{mark}{table}\n{end}{tail}"
    return page


def conformance_table(suite: Suite, outcomes: Sequence[Outcome]) -> str:
    """Markdown: cases down, languages across."""
    languages = list(dict.fromkeys(outcome.language for outcome in outcomes))
    passed = {(outcome.language, outcome.case): outcome.passed for outcome in outcomes}
    marks = [
        (case.name, *(_MARKS[passed.get((language, case.name))] for language in languages)) for case in suite.cases
    ]
    return _markdown([("case", *(TITLES[language] for language in languages)), *marks])


def version_table(versions: Mapping[str, str]) -> str:
    """Markdown: what each language's client was built and run with."""
    return _markdown([("language", "run with"), *((TITLES[name], text) for name, text in versions.items())])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(line)} |" for line in (head, *body)]
    return "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:]))
