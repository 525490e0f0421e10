"""The results as a table, of which docs/clients.md has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clients.conformance.cases import Suite
from clients.conformance.languages import TITLES
from clients.conformance.run import Outcome

_MARKS = {True: "yes", False: "**no**", None: "-"}


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
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
