"""Inputs, a source that answers without a model, and outputs as they are read again."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsrpc.prompt import Chat, Prompt, Text, told
from hsrpc.request import Delta, Finish, FinishReason, Timings, TokenLogprob, Usage

MODEL = "stub"
TIMINGS = Timings(0.0, 0.0, 0.0, 0.0)


def completion(custom_id: str, **body: object) -> dict[str, object]:
    """A line for /v1/completions; parameters of the body by name."""
    body = {"model": MODEL, "prompt": f"say {custom_id}", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, **body: object) -> dict[str, object]:
    """A line for /v1/chat/completions."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"say {custom_id}"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    """A file of lines, JSON but for bytes, compressed where its name ends in .gz."""
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an output; none where there is no file."""
    if not path.exists():
        return []
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" and path.stat().st_size else path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def custom_ids(*paths: Path) -> Counter[str]:
    """How often each custom_id is in the files."""
    return Counter(line["custom_id"] for path in paths for line in read_lines(path))


def text_of(line: dict[str, Any]) -> str:
    """The text of the first choice of a line of output."""
    [choice, *_] = line["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@dataclass
class StubSource:
    """Answers each prompt with itself, a token a character; fails as it is told."""

    failures: dict[str, list[Exception]] = field(default_factory=dict)
    """By prompt: what its next requests end with."""
    other_failures: list[Exception] = field(default_factory=list)
    """What the next calls end with that are no requests."""
    seconds: float = 0.0
    """That a request takes."""
    names: tuple[str, ...] = (MODEL,)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    """Most requests that ran at once."""
    reason: FinishReason = FinishReason.EOS

    async def generate(
        self, prompt: Prompt, settings: dict[str, Any], request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        text = told(prompt) or " ".join(map(str, prompt))  # type: ignore[arg-type]
        self.asked.append((text, settings))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if self.failures.get(text):
                raise self.failures[text].pop(0)
            top = settings.get("prompt_logprobs")
            if top is not None:
                best = tuple((65 + rank, -1.0 - rank) for rank in range(top))
                yield Delta(prompt_logprobs=tuple(TokenLogprob(ord(each), -2.0, 3, best) for each in text[1:]))
            if settings.get("max_tokens") == 0:
                yield Delta(finish=Finish(FinishReason.MAX_TOKENS, Usage(len(text), 0), TIMINGS))
                return
            half = len(text) // 2
            yield self._delta(text[:half], settings)
            usage = Usage(len(text), len(text), cached_tokens=len(text) // 2)
            yield Delta(finish=Finish(self.reason, usage, TIMINGS), **self._part(text[half:], settings))
        finally:
            self.running -= 1

    def _delta(self, text: str, settings: dict[str, Any]) -> Delta:
        return Delta(**self._part(text, settings))

    def _part(self, text: str, settings: dict[str, Any]) -> dict[str, Any]:
        ids = tuple(map(ord, text))
        wanted = settings.get("logprobs")
        top = tuple((65 + rank, -1.0 - rank) for rank in range(wanted or 0))
        logprobs = () if wanted is None else tuple(TokenLogprob(token_id, -0.5, 1, top) for token_id in ids)
        return {"text": text, "token_ids": ids, "logprobs": logprobs}

    async def model(self) -> tuple[str, bool]:
        return self.names[0], True

    async def serves(self, name: str) -> bool:
        self._fail()
        return name in self.names

    def _fail(self) -> None:
        if self.other_failures:
            raise self.other_failures.pop(0)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        self._fail()
        return "".join(map(chr, token_ids)).removeprefix(" ")

    async def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        self._fail()
        return list(map(ord, told(prompt)))

    async def max_batch(self) -> int:
        return 8

    async def cache(self) -> dict[str, object]:
        return {}


@dataclass
class Kept:
    """Results in memory."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)

    def put(self, line: bytes, *, is_error: bool) -> None:
        (self.errors if is_error else self.lines).append(json.loads(line))
