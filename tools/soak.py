"""Serves the bundled model under load, faults and kills for a while, and checks that nothing bends: `make soak`.

Poisson load at 80 % of the measured capacity, cancels, deadlines, malformed requests, new connections, and two SIGKILL
restarts. Beside it a greedy canary must give the same text always. Writes soak.json and soak.png; exits with 1 if a
check does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import grpc
import grpc.aio
import uvloop
from tqdm import tqdm

from hsrpc.bench.lag import LoopLag
from hsrpc.bench.load import CANCELLED, OK, Arrival, Mix, Outcome, make_arrivals, run_load
from hsrpc.bench.load_report import quantiles
from hsrpc.bench.process import ServerProcess
from hsrpc.bench.workload import Lengths
from hsrpc.client import AsyncClient, CallError, Settings
from hsrpc.client_messages import generate_request

SERVER = (
    *("--device", "cpu", "--gpu-memory", "24MiB", "--host-memory", "64MiB", "--min-batch", "8", "--max-batch", "8"),
    *("--max-model-len", "256", "--cache-policy", "hybrid", "--activation-share", "0.5", "--max-queued-requests", "64"),
)
PROMPTS = ("Once upon a time", "The old king said", "In a small village", "Nobody knew why the fox")
LIVES = (0.2, 0.4, 1.0)
"""Shares of the time at which a server's life ends; all but the last by SIGKILL."""
LOAD = 0.8
CANCELS, DEADLINES, MALFORMED, NEW_CONNECTIONS = 0.2, 0.05, 0.01, 0.1
RESTART_SECONDS = 60.0
RSS_SLACK, FD_SLACK = 48 * 1024**2, 12
"""Growth from the second quarter of the last life to its last one, bytes and number."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's process at one moment."""

    at: float
    pid: int
    fds: int
    rss_bytes: int


@dataclass(slots=True)
class Record:
    """All that was seen."""

    capacity: float = 0.0
    """Requests per second, closed loop."""
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    canaries: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)
    churned: Counter[str] = field(default_factory=Counter)
    exit_code: int | None = None
    busy_at_end: int = 0
    lag_p99: float = 0.0


class Soak:
    """One run."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.record = Record()
        self._seconds = seconds
        self._seed = seed
        self._rng = random.Random(seed)
        self._started = time.perf_counter()
        self._canary: dict[str, str] = {}

    async def run(self) -> None:
        """The lives of the server, one after the other."""
        server = await asyncio.to_thread(ServerProcess, SERVER)
        try:
            async with LoopLag() as lag:
                await self._prepare(server.address)
                begin = 0.0
                for number, share in enumerate(LIVES):
                    last = number == len(LIVES) - 1
                    await self._live(server, (share - begin) * self._seconds, number, last=last)
                    begin = share
                    if not last:
                        server = await asyncio.to_thread(ServerProcess, SERVER, port=server.port)
            self.record.lag_p99 = lag.p99()
        finally:
            self.record.exit_code = await asyncio.to_thread(server.stop)

    async def _prepare(self, address: str) -> None:
        async with AsyncClient(address) as client:
            await client.wait_ready(RESTART_SECONDS)
            for prompt in PROMPTS:
                self._canary[prompt] = (await client.complete(prompt, **_GREEDY)).text
            self.record.capacity = await _capacity(client, max(5.0, self._seconds / 20))

    async def _live(self, server: ServerProcess, seconds: float, number: int, *, last: bool) -> None:
        """Load a server for some time; then it is killed amid its work, unless it is the last one."""
        async with AsyncClient(server.address) as client:
            await client.wait_ready(RESTART_SECONDS)
            beside = [asyncio.create_task(self._watch(server.pid)), asyncio.create_task(self._canaries(client))]
            beside += [
                asyncio.create_task(self._malform(server.address)),
                asyncio.create_task(self._churn(server.address)),
            ]
            killer = None if last else asyncio.create_task(_kill_after(server, seconds * 0.95))
            await self._load(client, seconds, number)
            if killer:
                await killer
            for task in beside:
                task.cancel()
            for result in await asyncio.gather(*beside, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
            if last:
                self.record.busy_at_end = await _busy(client)

    async def _load(self, client: AsyncClient, seconds: float, number: int) -> None:
        mix = _mix(self.record.capacity * LOAD, seconds, cancels=CANCELS, deadlines=DEADLINES)
        offset = time.perf_counter() - self._started
        arrivals = make_arrivals(mix, _VOCAB, _LONGEST, self._seed + number)
        with tqdm(total=len(arrivals), desc=f"life {number + 1}", unit="", mininterval=1) as bar:
            outcomes = await run_load(lambda: client, arrivals, lambda _: bar.update())
        for outcome in outcomes:
            _shift(outcome, offset)
        self.record.outcomes += outcomes

    async def _canaries(self, client: AsyncClient) -> None:
        """The same prompts again and again; the text must be that of the first time."""
        while True:
            for prompt, expected in self._canary.items():
                await self._sing(client, prompt, expected)
                await asyncio.sleep(0.5)

    async def _sing(self, client: AsyncClient, prompt: str, expected: str) -> None:
        try:
            text = (await client.complete(prompt, **_GREEDY)).text
        except CallError as error:
            self.record.canaries[error.code.name] += 1
            return
        self.record.canaries[OK] += 1
        if text != expected:
            self.record.wrong.append(f"{prompt!r} gave {text!r}, not {expected!r}")

    async def _malform(self, address: str) -> None:
        """Bytes that are no message, at their share of the rate."""
        async with grpc.aio.insecure_channel(address) as channel:
            call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
            while True:
                await asyncio.sleep(self._rng.expovariate(self.record.capacity * LOAD * MALFORMED))
                running = call(b"\xff" + self._rng.randbytes(40), timeout=10)
                with suppress(grpc.aio.AioRpcError):
                    await running.read()
                self.record.malformed[(await running.code()).name] += 1

    async def _churn(self, address: str) -> None:
        """A new connection for each call; half of them vanish amid their stream."""
        request = generate_request(PROMPTS[0], {"max_tokens": 16, "max_tokens_per_message": 1})
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._rng.expovariate(self.record.capacity * LOAD * NEW_CONNECTIONS))
                group.create_task(self._connect(address, request.SerializeToString(), self._rng.random() < 0.5))

    async def _connect(self, address: str, request: bytes, vanish: bool) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
            call = method(request, timeout=60)
            with suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    if vanish:
                        self.record.churned["VANISHED"] += 1
                        return
            self.record.churned[(await call.code()).name] += 1

    async def _watch(self, pid: int) -> None:
        while True:
            with suppress(FileNotFoundError, ProcessLookupError):  # killed
                self.record.samples.append(_sample(pid, time.perf_counter() - self._started))
            await asyncio.sleep(1)


_METHOD = "/hsrpc.v1.GenerationService/Generate"
_VOCAB, _LONGEST = 1536, 256
_GREEDY: Settings = {"temperature": 0.0, "max_tokens": 24, "timeout": 60.0}


def _mix(rate: float, seconds: float, *, cancels: float = 0.0, deadlines: float = 0.0) -> Mix:
    return Mix(
        rate=rate,
        duration=seconds,
        lengths=Lengths.SHAREGPT_LIKE,
        prompt=32,
        output=24,
        cancel_share=cancels,
        deadline_share=deadlines,
        deadline=0.15,
    )


async def _capacity(client: AsyncClient, seconds: float, workers: int = 16) -> float:
    """Requests per second of as many callers as keep the batch full."""
    arrivals = iter(make_arrivals(_mix(1000, seconds), _VOCAB, _LONGEST, seed=99))
    until, ended = time.perf_counter() + seconds, 0

    async def work() -> None:
        nonlocal ended
        while time.perf_counter() < until:
            arrival = next(arrivals)
            now = Arrival(at=0.0, prompt=arrival.prompt, output_tokens=arrival.output_tokens)
            [outcome] = await run_load(lambda: client, [now])
            ended += outcome.status == OK

    await asyncio.gather(*(work() for _ in range(workers)))
    return ended / seconds


async def _kill_after(server: ServerProcess, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.kill)


async def _busy(client: AsyncClient) -> int:
    """Requests and blocks still in use, once there has been time to end; 0 is right."""
    for _ in range(100):
        load = (await client.get_server_info()).load
        busy = load.queued_requests + load.running_requests + sum(use.used for use in load.blocks)
        if not busy:
            break
        await asyncio.sleep(0.1)
    return int(busy)


def _shift(outcome: Outcome, offset: float) -> None:
    outcome.scheduled += offset
    outcome.end += offset
    if outcome.first_token is not None:
        outcome.first_token += offset


def _sample(pid: int, at: float) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Sample(at, pid, len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE"))


def checks(record: Record) -> dict[str, bool]:
    """What must hold, and whether it does."""
    statuses = Counter(outcome.status for outcome in record.outcomes)
    refused = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}  # by a killed and by a full server
    allowed = refused | {OK, CANCELLED, "DEADLINE_EXCEEDED"}
    fds, rss = growth(record)
    return {
        "every request ended, with a documented status": set(statuses) <= allowed,
        "most requests ended well": statuses[OK] + statuses[CANCELLED] > 0.8 * sum(statuses.values()),
        "the canary gave the same text always": record.canaries[OK] > 0 and not record.wrong,
        "the canary never hung": set(record.canaries) <= refused | {OK},
        "malformed requests were refused as such": set(record.malformed) <= {"INVALID_ARGUMENT", "UNAVAILABLE"},
        "new connections were served": set(record.churned) <= refused | {OK, "VANISHED"},
        f"file descriptors flat (grew by {fds})": fds <= FD_SLACK,
        f"resident memory flat (grew by {rss / 2**20:.1f} MiB)": rss <= RSS_SLACK,
        "nothing was in use after the load": record.busy_at_end == 0,
        "the server stopped with 0": record.exit_code == 0,
    }


def growth(record: Record) -> tuple[int, int]:
    """File descriptors and resident bytes: median of the last life's last quarter less that of its second."""
    life = [sample for sample in record.samples if sample.pid == record.samples[-1].pid]
    quarter = max(1, len(life) // 4)
    early, late = life[quarter : 2 * quarter] or life, life[-quarter:]
    return (
        int(median(s.fds for s in late) - median(s.fds for s in early)),
        int(median(s.rss_bytes for s in late) - median(s.rss_bytes for s in early)),
    )


def report(record: Record, out: Path) -> bool:
    """Print, save and plot; whether all checks hold."""
    out.mkdir(parents=True, exist_ok=True)
    found = checks(record)
    summary = {
        "capacity_requests_per_second": record.capacity,
        "statuses": Counter(outcome.status for outcome in record.outcomes),
        "malformed": record.malformed,
        "new_connections": record.churned,
        "canaries": record.canaries,
        "wrong": record.wrong,
        "first_token": asdict(quantiles(_first_token_times(record.outcomes))),
        "inter_token": asdict(quantiles([gap for outcome in record.outcomes for gap in outcome.gaps])),
        "client_loop_lag_p99": record.lag_p99,
        "checks": found,
    }
    print(json.dumps(summary, indent=1))
    full = summary | {"samples": [asdict(s) for s in record.samples], "requests": [asdict(o) for o in record.outcomes]}
    (out / "soak.json").write_text(json.dumps(full, indent=1) + "\n")
    plot(record, out / "soak.png")
    print(f"report: {out / 'soak.json'}, {out / 'soak.png'}")
    return all(found.values())


def plot(record: Record, file: Path) -> None:
    """Time to first token, resident memory and file descriptors over the run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    seen = [outcome for outcome in record.outcomes if outcome.first_token is not None]
    top.plot([o.scheduled for o in seen], [t * 1e3 for t in _first_token_times(seen)], ".", markersize=2)
    top.set(ylabel="time to first token, ms", yscale="log")
    times = [sample.at for sample in record.samples]
    middle.plot(times, [sample.rss_bytes / 2**20 for sample in record.samples], ".")
    middle.set(ylabel="resident memory, MiB")
    bottom.plot(times, [sample.fds for sample in record.samples], ".")
    bottom.set(ylabel="file descriptors", xlabel="s")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _first_token_times(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.first_token - outcome.scheduled for outcome in outcomes if outcome.first_token is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    soak = Soak(options.seconds, options.seed)
    uvloop.run(soak.run())
    return 0 if report(soak.record, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
