"""The log's queue: who writes never waits for who reads, and what is lost is told."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import grpc
import pytest

from hsrpc.server.ops import log_queue
from hsrpc.server.ops.log_queue import LogQueue
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc

ROOT = Path(__file__).parents[3]
REQUESTS = 600
"""Some 250 bytes of log each: twice what a pipe holds."""


class Reader:
    """Reads nothing until it is let."""

    def __init__(self) -> None:
        self.reads, self.taken = Event(), Event()
        self.lines: list[str] = []
        self.broken = False

    def write(self, data: bytes) -> None:
        self.taken.set()
        assert self.reads.wait(20)
        if self.broken:
            raise BrokenPipeError
        self.lines += data.decode().splitlines()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.reads.set()


def record(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "", 0, text, arguments, None)


def test_what_does_not_fit_is_dropped_counted_and_told(reader, monkeypatch):
    """Nobody waits; the lines that fitted are written in order, and then how many did not."""
    monkeypatch.setattr(log_queue, "MAX_WAITING_BYTES", 100)
    dropped: list[None] = []
    queue = LogQueue(reader.write, lambda: dropped.append(None))
    for number in range(100):
        queue.handle(record(f"line {number:04}"))
    assert len(dropped) == 90
    reader.reads.set()
    queue.flush()
    told = "90 lines of the log were dropped: they could not be written in time"
    assert reader.lines == [*(f"line {number:04}" for number in range(10)), told]
    queue.handle(record("again"))
    queue.flush()
    assert reader.lines[-2:] == [told, "again"]


def test_a_line_that_cannot_be_written_is_dropped(reader):
    """A reader that has gone, or a record whose arguments do not fit, ends nothing and is told later."""
    dropped: list[None] = []
    queue = LogQueue(reader.write, lambda: dropped.append(None))
    reader.broken = True
    reader.reads.set()
    queue.handle(record("lost"))
    queue.handle(record("%d", "no number"))
    queue.flush()
    assert (reader.lines, len(dropped)) == ([], 2)
    reader.broken = False
    queue.handle(record("found"))
    queue.flush()
    assert reader.lines == ["found", "2 lines of the log were dropped: they could not be written in time"]


def test_a_flush_is_bounded(reader, monkeypatch):
    """The end of the process does not wait for a reader that never reads."""
    monkeypatch.setattr(log_queue, "FLUSH_SECONDS", 0.05)
    queue = LogQueue(reader.write, lambda: None)
    queue.handle(record("waits"))
    assert reader.taken.wait(20)
    started = time.monotonic()
    queue.flush()
    assert 0.04 < time.monotonic() - started < 10


async def test_a_standard_error_that_nobody_reads_holds_up_nothing():
    """All requests are answered, and SIGTERM ends the process with 0 in seconds."""
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "tests.server.serve_fake", "logs"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    try:
        address = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()[-1]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for _ in range(REQUESTS):
                call = stub.Generate(v1.GenerateRequest(text="Hi"), wait_for_ready=True, timeout=10)
                assert [message async for message in call][-1].finish.usage.completion_tokens == 4
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        os.set_blocking(ours, False)
        assert len(os.read(ours, 2**20)) > 60_000  # the pipe was full
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        os.close(ours)
