"""What docs/clients.md and docs/grpc.md show."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path

from clients.conformance.cases import Suite
from clients.conformance.languages import TITLES, languages
from tests.server.secured import serving

ROOT = Path(__file__).parents[2]


def table(name: str) -> list[list[str]]:
    """Rows of a table of docs/clients.md, without the line below its head."""
    page = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
    return [rows[0], *rows[2:]]


def test_the_table_has_every_case_and_language():
    """As the runner wrote it, and all passed."""
    head, *rows = table("conformance")
    assert head == ["case", *(TITLES[name] for name in languages())]
    assert [row[0] for row in rows] == [case.name for case in Suite.load().cases]
    assert {cell for row in rows for cell in row[1:]} == {"yes"}


def test_the_versions_are_those_of_every_language():
    """One row each, in the same order."""
    _, *rows = table("versions")
    assert [row[0] for row in rows] == [TITLES[name] for name in languages()]
    assert all(re.search(r"\d+\.\d+", row[1]) for row in rows)


async def test_buf_curl_works_as_it_is_shown():
    """The command of docs/grpc.md, without the proto files."""
    page = (ROOT / "docs/grpc.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^    (buf curl .*\\\n.*)$", page, re.MULTILINE)
    async with serving() as server:
        _, *arguments = shlex.split(shown.replace("\\\n", "").replace("127.0.0.1:50051", server.address))
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("buf"), *arguments, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert b'"reason": "FINISH_REASON_' in output
