"""How much the server can send, with an engine that costs nothing: the highest token rate that it keeps up with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hsrpc.bench.frontend_client import Job, answer_jobs, ask
from hsrpc.bench.lag import LoopLag
from hsrpc.bench.process import connected
from hsrpc.bench.serving import serving
from hsrpc.client_messages import Settings
from hsrpc.testing.stub_engine import StubEngine

MODES: Mapping[str, Settings] = {
    "one token a message": {"return_token_ids": True, "max_tokens_per_message": 1},
    "default": {"return_token_ids": True},
    "gathered for 50 ms": {"return_token_ids": True, "max_message_delay": 0.05},
}
MAX_LAG = 0.01
"""Seconds, 99th percentile of the event loop's lag."""
_SLOWEST = 1.15
"""Most seconds a trial may take, relative to what its rate asks for."""
_FIRST_RATE, _FACTOR, _LAST_RATE = 10_000.0, 1.4, 1_000_000.0
"""Tokens per second; far more than any engine makes."""
_TRIES = 3
"""A rate is kept if one of so many trials keeps it: other processes use the machine too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One rate, offered for some time."""

    mode: str
    streams: int
    offered: float
    """Tokens per second, of all streams."""
    tokens_per_second: float
    messages_per_second: float
    cores: float
    """CPU seconds of the server's process per second, all its threads."""
    loop_lag_p99: float
    kept: bool

    @property
    def tokens_per_core(self) -> float:
        return self.tokens_per_second / self.cores

    @property
    def messages_per_core(self) -> float:
        return self.messages_per_second / self.cores


async def measure_frontend(
    streams: Sequence[int], seconds: float, done: Callable[[Trial], object] = lambda _: None
) -> list[Trial]:
    """The fastest trial that was kept, for each mode and number of streams."""
    async with StubEngine(0.0) as engine, serving(engine) as server:
        with connected(answer_jobs, server.address) as client:
            bench = _Bench(engine, client, seconds, done)
            return [await bench.highest(mode, number) for mode in MODES for number in streams]


@dataclass(frozen=True, slots=True)
class _Bench:
    engine: StubEngine
    client: Connection
    seconds: float
    """Duration of a trial."""
    done: Callable[[Trial], object]

    async def highest(self, mode: str, streams: int) -> Trial:
        """Raise the rate until two in a row are not kept; the last one that was, else the first."""
        rate, best, missed = _FIRST_RATE, None, 0
        while missed < 2 and rate <= _LAST_RATE:
            trial = await self._try(mode, streams, rate)
            for _ in range(_TRIES - 1):
                trial = trial if trial.kept else await self._try(mode, streams, rate)
            missed = 0 if trial.kept else missed + 1
            best = trial if trial.kept or best is None else best
            rate *= _FACTOR
        assert best is not None
        return best

    async def _try(self, mode: str, streams: int, rate: float) -> Trial:
        self.engine.rate = rate / streams
        job = Job(streams, max(1, int(self.engine.rate * self.seconds)), MODES[mode])
        async with LoopLag() as lag:
            cpu, started = time.process_time(), time.perf_counter()
            received = await asyncio.to_thread(ask, self.client, job)
            cores = (time.process_time() - cpu) / (time.perf_counter() - started)
        trial = Trial(
            mode=mode,
            streams=streams,
            offered=rate,
            tokens_per_second=received.tokens / received.seconds,
            messages_per_second=received.messages / received.seconds,
            cores=cores,
            loop_lag_p99=lag.p99(),
            kept=received.seconds <= self.seconds * _SLOWEST and lag.p99() <= MAX_LAG,
        )
        self.done(trial)
        return trial


def print_frontend(trials: Sequence[Trial]) -> None:
    """A row a mode and number of streams."""
    table = Table(
        "messages", "streams", "tokens/s", "messages/s", "cores", "tokens/s per core", "messages/s per core", "lag p99"
    )
    for trial in trials:
        table.add_row(
            trial.mode + ("" if trial.kept else " (not kept)"),
            str(trial.streams),
            f"{trial.tokens_per_second:,.0f}",
            f"{trial.messages_per_second:,.0f}",
            f"{trial.cores:.2f}",
            f"{trial.tokens_per_core:,.0f}",
            f"{trial.messages_per_core:,.0f}",
            f"{trial.loop_lag_p99 * 1e3:.1f} ms",
        )
    Console(width=120).print(table)


def save_frontend(trials: Sequence[Trial], file: Path) -> None:
    """All that the table has."""
    file.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")


def plot_frontend(trials: Sequence[Trial], file: Path) -> None:
    """Tokens per second and core over the number of streams, a line a mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for mode in MODES:
        chosen = [trial for trial in trials if trial.mode == mode]
        axes.plot([t.streams for t in chosen], [t.tokens_per_core for t in chosen], marker="o", label=mode)
    axes.set(xscale="log", yscale="log", xlabel="streams", ylabel="tokens/s per core")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
