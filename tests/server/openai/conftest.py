"""Servers with an OpenAI port, each on an event loop in a thread of its own: the SDKs' clients are synchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack

import openai
import pytest

from hsrpc.config import BUNDLED_MODEL
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.prompt import Prompt, Text
from hsrpc.request import Delta, SamplingParams
from hsrpc.server import Server, ServerConfig
from hsrpc.server.engine_protocol import SubmitOptions
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.testing.stub_engine import StubGeneration

T = TypeVar("T")
READY_SECONDS = 60


class Running:
    """A server and its engine, on their loop."""

    def __init__(self, server: Server, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.engine = engine
        self._loop = loop

    @property
    def url(self) -> str:
        return self.server.openai.url

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to, on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(READY_SECONDS)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until it holds there; fail after some seconds."""

        self.do(_wait(condition))

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)


async def _wait(condition: Callable[[], object]) -> None:
    for _ in range(READY_SECONDS * 100):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"not within {READY_SECONDS} s")


@contextmanager
def running(make_engine: Callable[[], Any], **settings: Any) -> Iterator[Running]:
    """A server that is ready, with an engine that is made on its loop."""
    started: Future[Running] = Future()
    done = threading.Event()

    async def serve() -> None:
        server = Server(ServerConfig(port=0, openai_port=0, **settings))
        try:
            await server.start()
            async with make_engine() as engine:
                await server.attach(engine)
                await _wait(lambda: server.openai.is_ready)
                started.set_result(Running(server, engine, asyncio.get_running_loop()))
                await asyncio.to_thread(done.wait)
                await server.drain()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise
        finally:
            await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.result()
    finally:
        done.set()
        thread.join()


class ScriptedEngine(FakeEngine):
    """A fake engine with the bundled model's tokenizer; it says `answer`, or, if that is None, what the test writes."""

    chat_template: str | None = None

    def __init__(self) -> None:
        super().__init__(held=True)
        self.answer: str | None = None
        self.tokenizer = Tokenizer(BUNDLED_MODEL, chat_template=self.chat_template)

    async def __aexit__(self, *error: Any) -> None:
        self.tokenizer.close()
        await super().__aexit__(*error)

    async def submit(self, prompt: Prompt, params: SamplingParams, **options: Unpack[SubmitOptions]) -> StubGeneration:
        generation = await super().submit(prompt, params, **options)
        if self.answer is not None:
            await self.write(generation.request_id, self.answer)
            self.end(generation.request_id)
        return generation

    async def write(self, request_id: str, text: str) -> None:
        """Put a token at a time."""
        for token_id in await self.tokenizer.encode(Text(text, add_special_tokens=False)):
            self.live[request_id].put(Delta("x", (token_id,)))
