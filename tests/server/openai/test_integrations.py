"""The blocks of Python in docs/integrations.md, run as they stand against an OpenAI port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Unpack

from hsrpc.prompt import Prompt
from hsrpc.request import SamplingParams
from hsrpc.server.engine_protocol import SubmitOptions
from hsrpc.testing.stub_engine import StubGeneration
from tests.server.conftest import ROOT
from tests.server.openai.conftest import ScriptedEngine, running

STRUCTURED = "Structured output"
TITLES = ["OpenAI's SDK", STRUCTURED, "Anthropic's SDK", "LangChain", "LiteLLM"]
BLOCK = re.compile(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STORY = "Once upon a time there was a fox."
RUN_ALL = """
import json, sys
for title, block in json.load(sys.stdin).items():
    print("##", title)
    exec(block, {})
    print()
"""


class Teller(ScriptedEngine):
    """Tells the story, or, where that is no answer, whom it is about."""

    async def submit(self, prompt: Prompt, params: SamplingParams, **options: Unpack[SubmitOptions]) -> StubGeneration:
        self.answer = STORY if params.constraint is None else '{"kind": "fox"}'
        return await super().submit(prompt, params, **options)


def test_each_recipe_tells_the_story():
    """In one program, as they share what takes time to load; it needs no other host than the server's."""
    blocks = dict(BLOCK.findall((ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")))
    assert list(blocks) == TITLES
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment |= {"no_proxy": "127.0.0.1", "LANGSMITH_TRACING": "false"}
    with running(Teller, served_model_names=("storyteller",)) as served:
        here = served.url.removesuffix("/v1")
        programs = {title: block.replace("http://127.0.0.1:8000", here) for title, block in blocks.items()}
        command = [sys.executable, "-c", RUN_ALL]
        asked = json.dumps(programs)
        ran = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=200, env=environment, input=asked
        )
        assert ran.returncode == 0, f"{ran.stdout} {ran.stderr}"
        assert {params.max_tokens for params in served.engine.submitted} == {64}
    told = dict(part.strip().split("\n", 1) for part in ran.stdout.split("## ")[1:])
    assert told == dict.fromkeys(TITLES, STORY) | {STRUCTURED: "fox"}
