"""The Node.js client's own tests, against a server over the fake engine."""

from __future__ import annotations

import asyncio
import os

from hsrpc.server import Server
from tests.server.conftest import NODE_CLIENT


async def test_the_node_client_passes_its_tests(server: Server):
    """`node --test` finds the service as the proto files say."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "--test",
        cwd=NODE_CLIENT,
        env=os.environ | {"HSRPC_TARGET": server.address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    assert b"# pass 6" in output
