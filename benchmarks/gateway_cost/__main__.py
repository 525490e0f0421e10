"""What the OpenAI port costs beside gRPC: the same streams by three doors of one server, by turns.

The engine computes nothing, and hands out tokens at a given rate. The clients are on the loopback, in a process of
their own, and read as little of each message as they can: what an SDK takes is not measured. All streams start
together; a first token counts from the sending of its request. The first run by each door is not counted.

    python -m benchmarks.gateway_cost --json gateway.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_cost.client import MODEL, Job, Way, answer_jobs, ask
from benchmarks.record import header, write_json
from hsrpc.bench.process import connected
from hsrpc.cli.loop import run_loop
from hsrpc.client import AsyncClient
from hsrpc.config import BUNDLED_MODEL
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.server import Server, ServerConfig
from hsrpc.testing.stub_engine import StubEngine, StubGeneration

_READY_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run by one door."""

    way: Way
    offered: float
    """Tokens/s that the engine hands out, of all streams."""
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    server_cpu: float
    """CPU seconds of the server's process for 1,000 tokens, the engine that computes nothing among them."""
    gateway_cpu: float
    """The same of the gateway's."""


class WordEngine(StubEngine):
    """A stub whose tokenizer a gateway can have, and whose first token comes with its next step."""

    def __init__(self) -> None:
        super().__init__(name=MODEL)
        self.tokenizer = Tokenizer(BUNDLED_MODEL)  # type: ignore[assignment]  # it has what the stub's has

    def _give(self, generation: StubGeneration, due: int) -> None:
        super()._give(generation, due + 1)


async def measure(
    streams: int, rates: Sequence[float], seconds: float, repeats: int, done: Callable[[Sample], object]
) -> list[Sample]:
    """All samples, by turns; `rates` are tokens/s of all streams together."""
    samples = []
    async with WordEngine() as engine, _serving(engine) as server:
        with connected(answer_jobs) as client:
            bench = _Bench(server, engine, client, streams, seconds)
            for turn, rate, way in product(range(repeats + 1), rates, Way):
                sample = await bench.run(way, rate)
                if turn:
                    samples.append(sample)
                    done(sample)
    return samples


@asynccontextmanager
async def _serving(engine: StubEngine) -> AsyncIterator[Server]:
    """A server with all three doors, ready."""
    server = Server(ServerConfig(port=0, openai_port=0, vllm_engine=True))
    await server.start()
    try:
        await server.attach(engine)
        async with AsyncClient(server.address) as client:
            await client.wait_ready(_READY_SECONDS)
        yield server
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class _Bench:
    server: Server
    engine: StubEngine
    client: Connection
    streams: int
    seconds: float
    """How long a run lasts."""

    async def run(self, way: Way, rate: float) -> Sample:
        gateway = self.server.openai
        assert gateway is not None
        address = f"127.0.0.1:{gateway.port}" if way is Way.OPENAI else self.server.address
        self.engine.rate = rate / self.streams
        job = Job(way, address, self.streams, max(1, int(self.engine.rate * self.seconds)))
        [pid] = gateway.pids
        server_cpu, gateway_cpu = time.process_time(), _cpu_seconds(pid)
        received = await asyncio.to_thread(ask, self.client, job)
        server_cpu, gateway_cpu = time.process_time() - server_cpu, _cpu_seconds(pid) - gateway_cpu
        return Sample(
            way=way,
            offered=rate,
            tokens_per_second=received.tokens / received.seconds,
            first_token_p50=float(np.percentile(received.first, 50)),
            first_token_p99=float(np.percentile(received.first, 99)),
            server_cpu=1000 * server_cpu / received.tokens,
            gateway_cpu=1000 * gateway_cpu / received.tokens,
        )


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken, all its threads."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICKS


def medians(samples: Sequence[Sample]) -> Iterator[Sample]:
    """One for each rate and door, of medians."""
    for offered in dict.fromkeys(sample.offered for sample in samples):
        for way in Way:
            chosen = [sample for sample in samples if (sample.way, sample.offered) == (way, offered)]
            names = ("tokens_per_second", "first_token_p50", "first_token_p99", "server_cpu", "gateway_cpu")
            typical = {name: median(getattr(sample, name) for sample in chosen) for name in names}
            yield Sample(way=way, offered=offered, **typical)


def print_samples(samples: Sequence[Sample]) -> None:
    """A row for each rate and door."""
    table = Table("offered", "door", "tokens/s", "first token", "p99", "CPU of 1,000 tokens: server", "gateway")
    for sample in medians(samples):
        table.add_row(
            f"{sample.offered:,.0f}",
            sample.way,
            f"{sample.tokens_per_second:,.0f}",
            f"{sample.first_token_p50 * 1e3:.1f} ms",
            f"{sample.first_token_p99 * 1e3:.1f} ms",
            f"{sample.server_cpu * 1e3:.1f} ms",
            f"{sample.gateway_cpu * 1e3:.1f} ms",
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, metavar="N", help="at once (default: 64)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[640.0, 2560.0, 10_240.0, 40_960.0],
        metavar="X",
        help="tokens/s of all streams together (default: 640 2560 10240 40960)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of a run (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs that count (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save what was measured")
    options = parser.parse_args(arguments)
    with Console(stderr=True).status("measuring") as status:
        samples = run_loop(
            measure(
                options.streams,
                options.rates,
                options.seconds,
                options.repeats,
                lambda sample: status.update(f"{sample.way} at {sample.offered:,.0f}: {sample.tokens_per_second:,.0f}"),
            )
        )
    print_samples(samples)
    if options.json:
        command = ["python", "-m", "benchmarks.gateway_cost", *(sys.argv[1:] if arguments is None else arguments)]
        content = {"header": header(command), "streams": options.streams, "samples": [asdict(each) for each in samples]}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
