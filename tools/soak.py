"""Serves the bundled model under load, faults and kills for a while, and checks that nothing bends: `make soak`.

Poisson load at 80 % of the measured capacity, cancels, deadlines, malformed requests, new connections, and two SIGKILL
restarts. Then a siege, beside a lighter load: floods of resets, messages that never end, streams that nobody reads.
Beside it all a greedy canary must give the same text always. Writes soak.json and soak.png; exits with 1 if a check
does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import uvloop
from tqdm import tqdm

from hsrpc.bench.lag import LoopLag
from hsrpc.bench.load import CANCELLED, OK, Arrival, Mix, Outcome, make_arrivals, run_load
from hsrpc.bench.load_report import quantiles
from hsrpc.bench.process import ServerProcess
from hsrpc.bench.siege import Attack, Bounds, Siege
from hsrpc.bench.workload import Lengths
from hsrpc.client import AsyncClient, CallError, Settings
from hsrpc.client_messages import generate_request
from hsrpc.server.observation import CutReason

BOUNDS = Bounds(write_timeout=5.0, request_timeout=30.0)
SERVER = (
    *("--device", "cpu", "--gpu-memory", "24MiB", "--host-memory", "64MiB", "--min-batch", "8", "--max-batch", "8"),
    *("--max-model-len", "256", "--cache-policy", "hybrid", "--activation-share", "0.5"),
    *("--max-queued-requests", "128", "--write-timeout", str(BOUNDS.write_timeout)),
)
PROGRAM = (str(Path(__file__).with_name("trimmed.py")),)
PROMPTS = ("Once upon a time", "The old king said", "In a small village", "Nobody knew why the fox")
LIVES = (0.2, 0.4, 1.0)
"""Shares of the time at which a server's life ends; all but the last by SIGKILL."""
LOAD = 0.8
CANCELS, DEADLINES, MALFORMED, NEW_CONNECTIONS = 0.2, 0.05, 0.01, 0.1
SIEGE = 0.25
"""Share of the time, after the lives, on the last one's server."""
SIEGE_LOAD = 0.2
"""Part of the capacity; a flood leaves honest calls a part of it."""
RESTART_SECONDS = 60.0
TRIM_SECONDS = 3.0
RSS_SLACK, FD_SLACK = 48 * 1024**2, 12
"""Growth from the second quarter of the last life to its last one, bytes and number."""
WARM_UP_SECONDS = 5.0
"""Seconds of floods before memory is measured: the first ones leave what later ones use again, some 70 MiB."""
SIEGE_SLACK, FLOOD_SLACK = 24 * 1024**2, 1024**2
"""Growth of trimmed resident memory over a siege, bytes: of all, and for each flood. Of each call that was reset before
grpc handed it out grpc keeps some 120 bytes, half of the second; 29 floods, 4 times a hundred unread streams and the
load beside them were seen to leave 29 MiB.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's process at one moment."""

    at: float
    pid: int
    fds: int
    rss_bytes: int


@dataclass(slots=True)
class Besieged:
    """What was seen beside hostile connections."""

    siege: Siege
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    before: int = 0
    """Resident bytes, trimmed, with nothing in use."""
    after: int = 0
    """The same."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Connections that the server says to have cut, by reason."""

    @property
    def peak(self) -> int:
        """Most resident bytes of a sample."""
        return max((sample.rss_bytes for sample in self.samples), default=0)

    def summary(self) -> dict[str, object]:
        """What the report says."""
        return {
            "statuses": Counter(outcome.status for outcome in self.outcomes),
            "first_token": asdict(quantiles(_first_token_times(self.outcomes))),
            "attacks": {attack.value: len(seconds) for attack, seconds in self.siege.seconds.items()},
            "longest": {
                attack.value: max(filter(None, seconds), default=0.0) for attack, seconds in self.siege.seconds.items()
            },
            "cuts": self.cuts,
            "resident_mib": {"before": self.before >> 20, "peak": self.peak >> 20, "after": self.after >> 20},
        }


@dataclass(slots=True)
class Record:
    """All that was seen."""

    besieged: Besieged
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
        self.record = Record(Besieged(Siege(0, BOUNDS)))
        self._seconds = seconds
        self._seed = seed
        self._rng = random.Random(seed)
        self._started = time.perf_counter()
        self._canary: dict[str, str] = {}
        self._metrics_port = _free_port()

    async def run(self) -> None:
        """The lives of the server, one after the other."""
        server = await self._start()
        try:
            async with LoopLag() as lag:
                await self._prepare(server.address)
                begin = 0.0
                for number, share in enumerate(LIVES):
                    last = number == len(LIVES) - 1
                    await self._live(server, (share - begin) * self._seconds, number, last=last)
                    begin = share
                    if not last:
                        server = await self._start(server.port)
                await self._besiege(server)
            self.record.lag_p99 = lag.p99()
        finally:
            self.record.exit_code = await asyncio.to_thread(server.stop)

    async def _start(self, port: int = 0) -> ServerProcess:
        arguments = (*SERVER, "--metrics-port", str(self._metrics_port))
        return await asyncio.to_thread(ServerProcess, arguments, port=port, program=PROGRAM)

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
            watch, canaries = self._watch(server.pid, self.record.samples), self._canaries(client)
            async with _beside(watch, canaries, self._malform(server.address), self._churn(server.address)):
                killer = None if last else asyncio.create_task(_kill_after(server, seconds * 0.95))
                mix = _mix(self.record.capacity * LOAD, seconds, cancels=CANCELS, deadlines=DEADLINES)
                self.record.outcomes += await self._load(client, mix, number)
                if killer:
                    await killer
            if last:
                self.record.busy_at_end = await _busy(client)

    async def _besiege(self, server: ServerProcess) -> None:
        """Hostile connections beside a load without cancels and deadlines of its own; memory before and after."""
        besieged, seconds = self.record.besieged, SIEGE * self._seconds
        besieged.siege.port = server.port
        async with AsyncClient(server.address) as client:
            cuts = await _cuts(self._metrics_port)
            await besieged.siege.repeat(Attack.FLOOD, WARM_UP_SECONDS)
            await _busy(client)
            besieged.before = await _trimmed(server.pid)
            async with _beside(self._watch(server.pid, besieged.samples), self._canaries(client)):
                mix = _mix(self.record.capacity * SIEGE_LOAD, max(seconds, BOUNDS.request_timeout))
                besieged.outcomes, _ = await asyncio.gather(
                    self._load(client, mix, len(LIVES)), besieged.siege.run(mix.duration)
                )
            self.record.busy_at_end += await _busy(client)
            besieged.cuts = await _cuts(self._metrics_port) - cuts
            besieged.after = await _trimmed(server.pid)

    async def _load(self, client: AsyncClient, mix: Mix, number: int) -> list[Outcome]:
        offset = time.perf_counter() - self._started
        arrivals = make_arrivals(mix, _VOCAB, _LONGEST, self._seed + number)
        with tqdm(total=len(arrivals), desc=f"load {number + 1}", unit="", mininterval=1) as bar:
            outcomes = await run_load(lambda: client, arrivals, lambda _: bar.update())
        for outcome in outcomes:
            _shift(outcome, offset)
        return outcomes

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

    async def _watch(self, pid: int, samples: list[Sample]) -> None:
        while True:
            with suppress(FileNotFoundError, ProcessLookupError):  # killed
                samples.append(_sample(pid, time.perf_counter() - self._started))
            await asyncio.sleep(1)


_REFUSED = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
"""By a killed and by a full server."""
_REASONS = {Attack.FLOOD: CutReason.RESETS.value, Attack.STALL: CutReason.STALLS.value}
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


@asynccontextmanager
async def _beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """They go on until the block ends. Raises what one of them has raised."""
    tasks = [asyncio.create_task(work) for work in works]
    yield
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


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


async def _trimmed(pid: int) -> int:
    """Resident bytes without what the server's allocator keeps for later."""
    os.kill(pid, signal.SIGRTMIN)
    await asyncio.sleep(TRIM_SECONDS)
    return _sample(pid, 0.0).rss_bytes


async def _cuts(metrics_port: int) -> Counter[str]:
    """Connections that the server has cut, by reason."""
    reader, writer = await asyncio.open_connection("127.0.0.1", metrics_port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    found = re.findall(r'^hsrpc_connections_cut_total\{reason="(\w+)"\} ([\d.]+)$', page, re.MULTILINE)
    return Counter({reason: int(float(count)) for reason, count in found})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


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
    allowed = _REFUSED | {OK, CANCELLED, "DEADLINE_EXCEEDED"}
    fds, rss = growth(record)
    return {
        "every request ended, with a documented status": set(statuses) <= allowed,
        "most requests ended well": statuses[OK] + statuses[CANCELLED] > 0.8 * sum(statuses.values()),
        "the canary gave the same text always": record.canaries[OK] > 0 and not record.wrong,
        "the canary never hung": set(record.canaries) <= _REFUSED | {OK},
        "malformed requests were refused as such": set(record.malformed) <= {"INVALID_ARGUMENT", "UNAVAILABLE"},
        "new connections were served": set(record.churned) <= _REFUSED | {OK, "VANISHED"},
        f"file descriptors flat (grew by {fds})": fds <= FD_SLACK,
        f"resident memory flat (grew by {rss / 2**20:.1f} MiB)": rss <= RSS_SLACK,
        "nothing was in use after the load": record.busy_at_end == 0,
        "the server stopped with 0": record.exit_code == 0,
        **_siege_checks(record.besieged),
    }


def _siege_checks(besieged: Besieged) -> dict[str, bool]:
    siege, kept = besieged.siege, besieged.after - besieged.before
    slack = SIEGE_SLACK + FLOOD_SLACK * len(siege.seconds[Attack.FLOOD])
    return {
        **{f"{attack} were ended within {siege.bounds.of(attack):g} s": siege.withstood(attack) for attack in Attack},
        "hostile connections were cut, each once, and no others": besieged.cuts
        == Counter({reason: len(siege.seconds[attack]) for attack, reason in _REASONS.items()}),
        "honest calls beside were served, or told when to try again": any(o.status == OK for o in besieged.outcomes)
        and all(map(_is_honest_end, besieged.outcomes)),
        f"resident memory back after the siege (kept {kept / 2**20:.1f} MiB)": kept <= slack,
    }


def _is_honest_end(outcome: Outcome) -> bool:
    return outcome.status == OK or (outcome.status in _REFUSED and outcome.retry_after is not None)


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
        "siege": record.besieged.summary(),
        "checks": found,
    }
    print(json.dumps(summary, indent=1))
    samples, outcomes = record.samples + record.besieged.samples, record.outcomes + record.besieged.outcomes
    full = summary | {"samples": [asdict(s) for s in samples], "requests": [asdict(o) for o in outcomes]}
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
    samples, outcomes = record.samples + record.besieged.samples, record.outcomes + record.besieged.outcomes
    seen = [outcome for outcome in outcomes if outcome.first_token is not None]
    top.plot([o.scheduled for o in seen], [t * 1e3 for t in _first_token_times(seen)], ".", markersize=2)
    top.set(ylabel="time to first token, ms", yscale="log")
    times = [sample.at for sample in samples]
    middle.plot(times, [sample.rss_bytes / 2**20 for sample in samples], ".")
    middle.set(ylabel="resident memory, MiB")
    bottom.plot(times, [sample.fds for sample in samples], ".")
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
