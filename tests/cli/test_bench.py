"""hsrpc bench: its kinds, and load through gRPC on a server that it starts itself."""

from __future__ import annotations

import json

import pytest

from hsrpc.cli.main import build_parser
from tests.cli.conftest import SMALL
from tests.cli.test_main import examples


@pytest.mark.parametrize("kind", ["decode", "prefill", "offline", "sweep", "serve", "frontend"])
def test_every_kind_has_help_with_examples_that_parse(hsrpc, kind):
    """Each kind has flags of its own, and says how it is used."""
    ran = hsrpc("bench", kind, "--help")
    assert (ran.code, ran.err) == (0, "")
    found = examples(ran.out)
    assert found
    for arguments in found:
        assert arguments[:2] == ["bench", kind]
        assert callable(build_parser().parse_args(arguments).run)


@pytest.mark.parametrize("flag", ["--rate=0", "--rate=often", "--cancel-share=1.5", "--duration=inf"])
def test_a_wrong_number_is_named(hsrpc, flag):
    """Wrong use is exit code 2, with the flag, the value and the remedy in one line."""
    ran = hsrpc("bench", "serve", flag)
    assert ran.code == 2
    assert all(part in ran.err for part in (flag.partition("=")[0], flag.partition("=")[2], "give a"))


def test_a_sweep_is_not_traced(hsrpc):
    """It is many measurements: the flag, its value and the remedy are named before anything runs."""
    ran = hsrpc("bench", "sweep", "--trace=trace.json.gz")
    assert ran.code != 0
    assert all(part in ran.err for part in ("trace='trace.json.gz'", "--activation-share"))


@pytest.mark.timeout(120)
def test_serve_loads_a_server_of_its_own(hsrpc, tmp_path):
    """A server is started with the options after --, loaded, and stopped; all requests are accounted for."""
    files = (f"--json={tmp_path / 'load.json'}", f"--plot={tmp_path / 'load.png'}")
    load = ("--rate=8", "--duration=1.5", "--prompt=8", "--output=4", "--cancel-share=0.3")
    ran = hsrpc("bench", "serve", *load, *files, "--", *SMALL)
    assert ran.code == 0, ran.err
    assert "time to first token" in ran.out
    found = json.loads((tmp_path / "load.json").read_text())
    assert set(found["summary"]["statuses"]) <= {"OK", "CANCELLED"}
    assert sum(found["summary"]["statuses"].values()) == len(found["requests"]) > 3
    assert found["summary"]["first_token"]["p50"] > 0
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_a_server_that_cannot_start_is_an_error(hsrpc):
    """The command ends with 1, and says so."""
    ran = hsrpc("bench", "serve", "--", "--port=1", "--host=256.0.0.1")
    assert ran.code == 1
    assert "before it listened" in ran.err
