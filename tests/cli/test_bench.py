"""hsrpc bench: its kinds, and load through gRPC on a server that it starts itself."""

from __future__ import annotations

import json

import pytest

from hsrpc.cli import bench
from hsrpc.cli.main import build_parser, main
from hsrpc.errors import ConfigError
from tests.cli.conftest import SMALL
from tests.cli.test_main import examples


@pytest.mark.parametrize("kind", ["decode", "prefill", "offline", "sweep", "calibrate", "serve", "frontend"])
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
    assert all(part in ran.err for part in (flag.partition("=")[0], flag.partition("=")[2], "give "))


@pytest.mark.parametrize("shared", ["-1", "8", "9"])
def test_a_prompt_is_longer_than_what_it_shares(hsrpc, shared):
    ran = hsrpc("bench", "offline", "--prompt=8", f"--shared-prefix={shared}")
    assert ran.code == 1
    assert all(part in ran.err for part in (f"shared_prefix={shared}", "8 prompt tokens", "a longer --prompt"))


def test_a_sweep_is_not_traced(hsrpc):
    """It is many measurements: the flag, its value and the remedy are named before anything runs."""
    ran = hsrpc("bench", "sweep", "--trace=trace.json.gz")
    assert ran.code != 0
    assert all(part in ran.err for part in ("trace='trace.json.gz'", "--activation-share"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("decode", name) for name in ("json", "trace", "plot")),
        *((kind, name) for kind in ("serve", "frontend") for name in ("json", "plot")),
        ("calibrate", "save"),
    ],
)
def test_a_file_that_cannot_be_saved_is_known_before_anything_runs(hsrpc, tmp_path, kind, name):
    """A measurement takes minutes, and would be lost."""
    ran = hsrpc("bench", kind, f"--{name}={tmp_path / 'none' / 'file'}")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"hsrpc: error: {name}=")
    assert "its directory is not there" in ran.err


@pytest.mark.parametrize(
    ("load", "message"),
    [(("--requests=9", "--max-batch=3"), "3 of 9 requests run at once"), (("--output=4",), "4 output tokens, too few")],
)
def test_requests_that_never_decode_together_are_known_before_they_run(hsrpc, load, message):
    """There would be no step to measure, which would be said after the last of their tokens."""
    ran = hsrpc("bench", "decode", "--prompt=8", *load, *SMALL)
    assert ran.code == 1
    assert message in ran.err


def test_requests_that_are_refused_are_an_error_in_a_line(hsrpc):
    """And not a group of tracebacks."""
    ran = hsrpc("bench", "offline", "--requests=5", "--prompt=8", "--output=8", "--max-queued-requests=2", *SMALL)
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "max_queued_requests" in ran.err


def test_an_offline_run_ends_when_its_seconds_have_passed(hsrpc, tmp_path):
    """What was measured until then is the result."""
    load = ("--requests=400", "--prompt=8", "--output=100", "--max-batch=4", "--seconds=1")
    ran = hsrpc("bench", "offline", *load, f"--json={tmp_path / 'offline.json'}", *SMALL)
    assert ran.code == 0, ran.err
    [found] = json.loads((tmp_path / "offline.json").read_text())
    assert 0.5 < sum(found["step_times"]) < 5


def test_a_sweep_is_saved_share_by_share(hsrpc, tmp_path, monkeypatch):
    """What was measured before a failure is in the file."""
    file = tmp_path / "sweep.json"
    original, seen = bench._measure, []

    def measure(options, config):
        seen.append(config.activation_share)
        if len(seen) == 3:
            raise ConfigError("activation_share", 0.2, "no", "yes")
        return original(options, config)

    monkeypatch.setattr(bench, "_measure", measure)
    sweep = ["bench", "sweep", "--prompt=8", "--output=16", "--steps=2", "--max-batch=2", f"--json={file}", *SMALL]
    assert main(sweep) == 1
    assert [found["activation_share"] for found in json.loads(file.read_text())] == [0, pytest.approx(0.1, abs=0.1)]


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
