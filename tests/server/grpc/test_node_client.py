"""The Node.js client's own tests, against a server over the fake engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hsrpc.server import Server
from tests.server.conftest import NODE_CLIENT
from tests.server.secured import Authority, serving


async def run_tests(server: Server, **settings: str) -> tuple[int, str]:
    """Exit code and output of `node --test` against a server."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "--test",
        cwd=NODE_CLIENT,
        env=os.environ | {"HSRPC_TARGET": server.address} | settings,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, output.decode()


async def test_the_node_client_passes_its_tests(server: Server):
    """`node --test` finds the service as the proto files say."""
    code, output = await run_tests(server)
    assert code == 0, output
    assert "# pass 7" in output


async def test_the_node_client_reaches_this_machine_without_a_proxy(server: Server):
    """The proxy that the environment names does not listen."""
    code, output = await run_tests(server, http_proxy="http://127.0.0.1:9", no_proxy="")
    assert code == 0, output


async def test_the_node_client_brings_a_token_over_tls(tmp_path: Path):
    """The same tests pass with a token and the server's roots, and all fail without the token."""
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    tokens.write_text("node node-node-node-node\n")
    tokens.chmod(0o600)
    async with serving(auth_tokens=tokens, **authority.issue()) as server:
        roots = {"HSRPC_TLS_CA": str(authority.roots)}
        code, output = await run_tests(server, HSRPC_TOKEN="node-node-node-node", **roots)
        assert code == 0, output
        assert "# pass 7" in output
        assert "# pass 0" in (await run_tests(server, **roots))[1]
