"""The demo: three streams at once from a model that does not fit its device budget."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from hsrpc.cli.demo import PROMPTS, QUESTIONS


@pytest.fixture(scope="module")
def output() -> str:
    """What `make demo` prints, where the environment names a proxy that does not listen."""
    command = [sys.executable, "-m", "hsrpc.cli.demo"]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stdout


def panels(output: str) -> list[str]:
    """The text of each panel in one line."""
    found: list[list[str]] = []
    for line in output.splitlines():
        if line.startswith("╭"):
            found.append([])
        elif line.startswith("│") and line.endswith("│") and found and line.count("│") == 2:
            found[-1].append(line.strip("│ "))
    return [" ".join(lines) for lines in found]


def table(output: str) -> dict[str, str]:
    """The table's values by their names."""
    cells = [line.strip("│").split("│") for line in output.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_three_stories_are_told(output):
    """Each prompt goes on in a panel of its own, with about a hundred words in all of them."""
    texts = panels(output)
    assert len(texts) == 4
    for text, prompt in zip(texts[:3], PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert len(text.split()) > 30
    assert len({text[-40:] for text in texts}) == 3


def test_curl_gets_the_same_story(output):
    """Through the OpenAI port, where the request is shown as it may be typed."""
    texts = panels(output)
    assert texts[3] == texts[0]
    assert "the same, to the last character" in output
    assert re.search(r"^\$ curl .* http://127\.0\.0\.1:\d+/v1/completions ", output, re.MULTILINE)


def test_the_table_shows_that_it_streamed(output):
    """Weights crossed the bus, both kinds of blocks were used, and K and V were rebuilt."""
    rows = table(output)
    assert float(rows["weights of the model"].split()[0]) > float(rows["device budget"].split()[0])
    assert int(rows["weights resident on the device"].rstrip("%")) < 100
    size, unit = rows["weights streamed"].split()
    assert float(size) > 1
    assert unit in ("MiB", "GiB")
    assert int(rows["KV blocks used"]) > 0
    assert int(rows["activation blocks used"]) > 0
    assert int(rows["K and V rebuilt from activations"].split()[0]) > 0
    assert 200 < int(rows["tokens generated"]) <= 3 * 220


def test_a_conversation_ends_it(output):
    """The second answer has the name that the first one told."""
    first, second = (f"> {question}\n" for question in QUESTIONS)
    story, _, rest = output.partition(first)[2].partition(second)
    name = " ".join(story.split()).partition(" fox named ")[2].split()[0]
    assert name in rest.splitlines()[0]


def test_the_server_is_stopped(output):
    """The last line says that nothing is left running, and how to go on."""
    assert output.splitlines()[-1] == "server stopped; talk with the model yourself: .venv/bin/hsrpc chat"
