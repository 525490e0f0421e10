"""The file of tokens: how it is read, and who is known by it."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from hsrpc.errors import ConfigError
from hsrpc.server import auth, reloaded_file
from hsrpc.server.auth import Authenticator, Holder, read_tokens
from hsrpc.server.errors import UnauthenticatedError
from hsrpc.server.reloaded_file import ReloadedFiles

ALICE, BOB = "alice-alice-alice-1", "bob-bob-bob-bob-bob+/="


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\nalice {ALICE}\n\nbob {BOB}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("token", "problem"), [(None, "no token"), ("", "no token"), ("carol-carol-carol-3", "the token is unknown")]
)
def test_a_client_without_a_known_token_is_nobody(tokens, token, problem):
    """The error says which of both it is; a known token is its client's name."""
    authenticator = Authenticator(tokens, ReloadedFiles())
    with pytest.raises(UnauthenticatedError, match=problem):
        authenticator.holder_of(token)
    assert authenticator.holder_of(BOB) == Holder("bob")


def test_comparison_looks_at_every_entry(tokens, monkeypatch):
    """Each lookup compares with all tokens, by a comparison of constant time, whichever matches."""
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    class Spy:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Spy)
    found = read_tokens(tokens)
    assert [found.holder_of(token) for token in (ALICE, BOB, "nobody")] == [Holder("alice"), Holder("bob"), None]
    assert len(compared) == 3 * 2
    assert ALICE not in repr(found)


def test_a_name_may_have_several_tokens(tokens):
    """A client's token is replaced without a gap: both are in the file for a while."""
    tokens.write_text(f"alice {ALICE}\nalice {BOB}\n")
    found = read_tokens(tokens)
    assert found.holder_of(ALICE) == found.holder_of(BOB) == Holder("alice")


def test_a_line_may_grant_a_priority(tokens):
    """The third word bounds the priority of those who bring that token, and of nobody else."""
    tokens.write_text(f"alice {ALICE} max-priority=-3\nalice {BOB}\n")
    found = read_tokens(tokens)
    assert [found.holder_of(token) for token in (ALICE, BOB)] == [Holder("alice", -3), Holder("alice")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tokens in it; add a line"),
        ("# nobody\n", "no tokens in it; add a line"),
        (f"alice\nbob {BOB}", "line 1 is no name and token"),
        (f"\nalice {ALICE} more", "line 2 has more than name, token and grant; write nothing more, or max-priority=N"),
        (f"alice {ALICE} max-priority=high", "line 1 has more than name, token and grant"),
        (f"alice {ALICE} max-priority=-3 max-priority=-4", "line 1 has more than name, token and grant"),
        (f"alice {ALICE}\nalice {ALICE} max-priority=-3", "line 2 has the token of 'alice'; .*, and write each once"),
        ("alice short", "line 1 is no name and token"),
        (f"al/ice {ALICE}", "line 1 is no name and token"),
        (f"alice {ALICE}é", "line 1 is no name and token"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2 has the token of 'alice'; give each client a token of its own"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tokens, text, message):
    """The error names the file and the line, and never a token."""
    tokens.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Authenticator(tokens, ReloadedFiles())
    assert str(tokens) in str(caught.value)
    assert ALICE not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "# nobody\n"])
def test_a_file_without_tokens_is_not_taken(tokens, text, monkeypatch, caplog):
    """A file rotated to an empty one locks nobody out: said once, counted once; the next good one is taken."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    failures: list[None] = []
    authenticator = Authenticator(tokens, ReloadedFiles(lambda: failures.append(None)))
    tokens.write_text(text)
    assert [authenticator.holder_of(ALICE) for _ in range(3)] == [Holder("alice")] * 3
    assert caplog.text.count("no tokens in it; add a line") == len(failures) == 1
    tokens.write_text(f"carol {ALICE}\n")
    assert authenticator.holder_of(ALICE) == Holder("carol")


@pytest.mark.parametrize("mode", [0o644, 0o640 | 0o020, 0o602])
def test_a_file_open_to_others_is_refused(tokens, mode):
    """Others may not read the file, and only its owner may change it."""
    tokens.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:03o} lets others read or change it; run `chmod 600"):
        read_tokens(tokens)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_group_may_read_the_file(tokens, mode):
    """Secrets that Kubernetes mounts belong to a group."""
    tokens.chmod(mode)
    assert read_tokens(tokens).holder_of(ALICE) == Holder("alice")
