"""`make demo`: a server whose device budget is smaller than its model, three prompts streamed from it at once, a talk,
and the first story once more, asked by curl through the OpenAI port where the extra `gateway` is installed.

Run it with `python -m hsrpc.cli.demo`.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hsrpc.cli.terminal import print_any_text
from hsrpc.client import AsyncClient
from hsrpc.config import format_bytes
from hsrpc.prompt import Chat, Message
from hsrpc.request import Finish
from hsrpc.v1.server_pb2 import BLOCK_KIND_ACTIVATION, BLOCK_KIND_KV, GetServerInfoResponse

PROMPTS = ("Once upon a time", "The little robot", "One rainy morning")
QUESTIONS = ("Tell me a story about a fox.", "What was the fox called?")
SERVER_FLAGS = (
    "--device=cpu",
    "--gpu-memory=13MiB",
    "--host-memory=256MiB",
    "--cache-policy=hybrid",
    "--activation-share=0.5",
    "--min-batch=3",
    "--max-batch=3",
    "--max-model-len=240",
    "--max-prefill-tokens=16",
)
SAMPLING: dict[str, Any] = {"max_tokens": 220, "temperature": 0.7, "seed": 4}
HAS_GATEWAY = all(map(find_spec, ("smg", "smg_grpc_proto")))
_START_SECONDS = 120


@dataclass(slots=True)
class Story:
    """One prompt and what has come of it so far."""

    prompt: str
    text: str = ""
    finish: Finish | None = None


@dataclass(slots=True)
class Doors:
    """The ways to a server."""

    client: AsyncClient
    openai: str | None
    """OpenAI's base URL; None: the extra is not installed."""


@asynccontextmanager
async def running_server() -> AsyncIterator[Doors]:
    """A server on free ports that is ready, with a client of it; both are stopped at the end."""
    flags = [*SERVER_FLAGS, *(["--openai-port=0"] if HAS_GATEWAY else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hsrpc.cli.main", "serve", "--port=0", "--log-level=warning", *flags, stdout=PIPE
    )
    try:
        address = await asyncio.wait_for(_said(process, "listening on "), _START_SECONDS)
        openai = await _said(process, "OpenAI API on ") if HAS_GATEWAY else None
        async with AsyncClient(address) as client:
            await _wait_ready(client, process)
            yield Doors(client, openai)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _said(process: Process, lead: str) -> str:
    """The address behind these words."""
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(lead.encode()):
            return line.decode().removeprefix(lead).strip().partition(",")[0]
    raise SystemExit("demo: the server ended before it listened; its messages are above")


async def _wait_ready(client: AsyncClient, process: Process) -> None:
    ready = asyncio.create_task(client.wait_ready(_START_SECONDS))
    ended = asyncio.create_task(process.wait())
    await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if not ready.done():
        ready.cancel()
        raise SystemExit("demo: the server ended before it was ready; its messages are above")
    await ready


async def stream(client: AsyncClient, story: Story, live: Live, stories: list[Story]) -> None:
    """Fill `story` from the server, showing each piece as it comes."""
    async for delta in client.generate(story.prompt, **SAMPLING):
        story.text += delta.text
        story.finish = delta.finish or story.finish
        live.update(_panels(stories))


def _panels(stories: list[Story]) -> Group:
    return Group(*(Panel(Text.assemble((story.prompt, "bold"), story.text), expand=True) for story in stories))


def summary(stories: list[Story], weights: int, info: GetServerInfoResponse) -> Table:
    """What the server did for the stories."""
    kinds = {BLOCK_KIND_KV: 0, BLOCK_KIND_ACTIVATION: 0}
    for block in info.load.blocks:
        kinds[block.kind] += block.peak
    first = [story.finish.timings.first_token for story in stories if story.finish]
    rows = {
        "weights of the model": format_bytes(weights),
        "device budget": format_bytes(info.plan.device_memory_bytes),
        "weights resident on the device": f"{info.plan.resident_share:.0%}",
        "weights streamed": format_bytes(info.measured.weights_streamed_bytes),
        "KV blocks used": str(kinds[BLOCK_KIND_KV]),
        "activation blocks used": str(kinds[BLOCK_KIND_ACTIVATION]),
        "K and V rebuilt from activations": f"{info.measured.regenerated_tokens} tokens x layers",
        "tokens generated": str(info.measured.generated_tokens),
        "time to first token": f"{min(first) * 1e3:.0f} to {max(first) * 1e3:.0f} ms",
    }
    table = Table("what happened", "", show_lines=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


async def talk(client: AsyncClient, console: Console) -> None:
    """Ask the questions in turn, each with all that was said before it."""
    turns: list[Message] = []
    for question in QUESTIONS:
        console.print(Text.assemble(("> ", "bold"), (question, "bold")))
        turns.append(Message("user", question))
        answer = ""
        async for delta in client.generate(Chat(turns), temperature=0.0):
            answer += delta.text
            console.out(delta.text, end="", highlight=False)
        console.line()
        turns.append(Message("assistant", answer))


async def ask_by_curl(base: str, model: str, story: Story, console: Console) -> None:
    """Ask for the story once more, as any client of OpenAI's API would."""
    asked = {"model": model, "prompt": story.prompt, **SAMPLING}
    command = ["curl", "-sS", "--noproxy", "*", f"{base}/completions"]
    command += ["-H", "content-type: application/json", "-d", json.dumps(asked)]
    console.print(f"$ {shlex.join(command)}", style="bold", highlight=False, soft_wrap=True)
    if shutil.which("curl") is None:
        console.print("curl is not installed")
        return
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    answer, _ = await process.communicate()
    text = json.loads(answer)["choices"][0]["text"]
    console.print(_panels([Story(story.prompt, text)]))
    console.print("the same, to the last character" if text == story.text else "not the same")


async def demo() -> None:
    """Start, stream, report, stop."""
    console = Console()
    console.print("starting a server whose device budget is smaller than its model ...")
    async with running_server() as doors:
        client = doors.client
        model = await client.get_model()
        console.print(f"{model.name} is ready; three prompts at once:")
        stories = [Story(prompt) for prompt in PROMPTS]
        with Live(_panels(stories), console=console, refresh_per_second=12) as live:
            await asyncio.gather(*(stream(client, story, live, stories) for story in stories))
        console.line()
        console.print(summary(stories, model.sizes.model_bytes, await client.get_server_info()))
        console.print("\nand a conversation:")
        await talk(client, console)
        if doors.openai is not None:
            console.print("\nand the first story once more, through OpenAI's API:")
            await ask_by_curl(doors.openai, model.name, stories[0], console)
    console.print("server stopped; talk with the model yourself: .venv/bin/hsrpc chat", highlight=False)


if __name__ == "__main__":
    print_any_text()
    asyncio.run(demo())
