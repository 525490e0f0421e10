"""hsrpc serve with TLS and tokens, the rule for public addresses, and what a server connects to: nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from hsrpc.cli.main import build_parser
from hsrpc.cli.security import add_security_options, security_config
from hsrpc.client import CallError, Client
from hsrpc.server.security import SecurityConfig
from tests.cli.conftest import SMALL
from tests.server.secured import Authority

ROOT = Path(__file__).parents[2]
TOKEN = "alice-alice-alice-1"
GUARDED = """
import socket, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "os.system"):
        if getattr(arguments[0], "family", None) != socket.AF_UNIX:
            print("OUTBOUND", event, arguments[1:], file=sys.stderr, flush=True)
sys.addaudithook(guard)
from hsrpc.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line, with a word on standard error for each connection and look-up that Python code tries."""


def peers(pid: int) -> set[tuple[int, int]]:
    """Local and remote ports of a process's TCP connections."""
    inodes = {path.stat().st_ino for path in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, remote, state, inode = (line.split()[i] for i in (1, 2, 3, 9))
            if int(inode) in inodes and state != "0A":
                found.add((int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)))
    return found


def test_a_secured_server_end_to_end(tmp_path):
    """TLS, tokens and the health port by flags; while it serves, it connects to nobody and looks no name up."""
    authority = Authority(tmp_path)
    files, tokens = authority.issue(), tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN}\n")
    tokens.chmod(0o600)
    flags = [f"--tls-cert={files['tls_cert']}", f"--tls-key={files['tls_key']}", f"--auth-tokens={tokens}"]
    command = [sys.executable, "-c", GUARDED, "serve", "--port=0", "--health-port=0", *flags, *SMALL]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with Client(address, token=TOKEN, tls_ca=authority.roots) as client:
                client.wait_ready(120)
                assert client.complete("Once upon a time", max_tokens=4).text
                port = int(address.rpartition(":")[2])
                assert {local for local, _ in peers(process.pid)} == {port}
            with Client(address, tls_ca=authority.roots) as stranger, pytest.raises(CallError, match="UNAUTHENTICATED"):
                stranger.get_model()
            process.terminate()
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "OUTBOUND" not in log
    [line] = [line for line in log.splitlines() if "health answers on" in line]
    assert line.rpartition(":")[2] != str(port)


def test_a_public_address_is_refused_in_one_line(hsrpc):
    """Before anything is loaded, the line says what is missing and which flags there are."""
    ran = hsrpc("serve", "--print-config", "--host=0.0.0.0")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: host='0.0.0.0': other machines reach it without encryption (--tls-cert")
    assert ran.err.endswith("or --insecure where the network itself keeps others out\n")


def test_a_token_file_that_others_read_is_refused(hsrpc, tmp_path):
    """The line names the file and how to close it."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN}\n")
    tokens.chmod(0o644)
    ran = hsrpc("serve", "--port=0", f"--auth-tokens={tokens}", *SMALL)
    assert (ran.code, ran.out) == (1, "")
    assert "mode 644 lets others read or change it; run `chmod 600" in ran.err
    assert TOKEN not in ran.err


def test_defaults_are_those_of_the_configuration():
    """Without flags the settings are SecurityConfig's own; each flag sets its field."""
    assert security_config(build_parser().parse_args(["serve"])) == SecurityConfig()
    flags = ["--no-reflection", "--insecure", "--health-port=1", "--max-connection-age=5"]
    assert security_config(build_parser().parse_args(["serve", *flags])) == SecurityConfig(
        reflection=False, insecure=True, health_port=1, max_connection_age=5.0
    )


def test_every_flag_is_documented():
    """The security page names each flag of `hsrpc serve` that is about security."""
    parser = argparse.ArgumentParser(add_help=False)
    add_security_options(parser)
    page = (ROOT / "docs/security.md").read_text()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert len(flags) == 8
    assert [flag for flag in flags if f"`{flag}`" not in page] == []


def test_nothing_unpickles_and_nothing_runs_a_models_code():
    """Only `convert` reads pickles of files, by torch's restricted reader; no source trusts code of a model.

    The processes of several GPUs send each other pickles, over sockets that only they have.
    """
    sources = {path: path.read_text() for path in (ROOT / "hsrpc").rglob("*.py")}
    loads = {path.name for path, text in sources.items() if "torch.load(" in text or "pickle.load" in text}
    assert loads == {"pickles.py", "messages.py"}
    assert all("weights_only=True" in text for text in sources.values() if "torch.load(" in text)
    assert not [path for path, text in sources.items() if "trust_remote_code=True" in text]
