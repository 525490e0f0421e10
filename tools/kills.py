"""Harms engines and servers with several GPUs, on the CPU, and looks at what is left of them: `make kills`.

    PYTHONPATH=. python tools/kills.py --kills 50 --gpus 2

A rank is killed, stopped, or brought to hang or to fail: while it starts, at every kind of operation, at random
moments, in a server, and in one that drains; or the server itself is killed. Each time every stream must end within a
second (where a step is wedged, after the time limit of a step) with an error that says what was found, and nothing may
be left: no process, no shared memory, and in this process no descriptor, thread or task more than before. Prints a line
for each, and one JSON object; exits with 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias
from unittest.mock import patch

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tqdm import tqdm

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.bench.process import ServerProcess
from hsrpc.client import AsyncClient, CallError, Settings
from hsrpc.engine.gpus import ranks
from hsrpc.errors import EngineUnavailableError, HsrpcError
from hsrpc.schedule.sweep import OpKind
from hsrpc.server.state import Phase
from hsrpc.testing.harm import Harm, Start, Way, harmed
from hsrpc.testing.processes import children, is_there, shared_memory

WITHIN = 1.0
"""Seconds from the harm to the end of the last stream, and of the last rank."""
STEP_LIMIT = 2.0
"""Seconds that a step may take, where one is wedged: those of an engine are more."""
STREAMS = 6
PATIENCE = 120.0
"""Seconds after which what does not end is given up."""
SETTLE_SECONDS = 5.0
KINDS = (
    *(OpKind.LOAD_WEIGHTS, OpKind.GATHER, OpKind.LOAD_BLOCKS, OpKind.EMBED, OpKind.PROJECT, OpKind.REBUILD),
    *(OpKind.ATTEND, OpKind.FINISH, OpKind.STORE, OpKind.HEAD, OpKind.SAMPLE),
)
"""What steps do with weights and caches of both kinds on the host."""
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "placement": "host",
    "gpu_memory": "24MiB",
    "host_memory": "64MiB",
    "cache_policy": "hybrid",
    "activation_share": 0.5,
    "max_batch": 8,
    "max_model_len": 256,
}
PROMPT = "Once upon a time"
PARAMS = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
ASKED: Settings = {"temperature": 0.0, "max_tokens": 240, "ignore_eos": True, "timeout": PATIENCE}
SAID = {
    Way.KILLED: "the process of GPU {} has ended, killed by SIGKILL",
    Way.STOPPED: "the process of GPU {} has given no sign of life",
    Way.STANDS_STILL: "the process of GPU {} hangs: its event loop has stood still",
    Way.WEDGED: "a step has not ended",
    Way.FAILS: "GPU {} failed: RuntimeError: it was to come to harm",
}
"""What the error says, of the GPU that came to harm."""
FAULT = f"UNAVAILABLE: {Phase.FAILED.name}"
"""What calls end with where an engine dies."""


@dataclass(slots=True)
class Seen:
    """What was seen of one harm."""

    name: str
    seconds: float | None = None
    """From the harm to the end of the last stream."""
    said: str = ""
    """The error that streams ended with."""
    wrong: list[str] = field(default_factory=list)
    """What should not have been."""

    def check(self, holds: bool, problem: str) -> None:
        """Note a problem, unless what should be holds."""
        if not holds:
            self.wrong.append(problem)

    @property
    def line(self) -> str:
        seconds = "" if self.seconds is None else f" {self.seconds:.3f} s"
        return f"{self.name}:{seconds} {'WRONG: ' + '; '.join(self.wrong) if self.wrong else self.said}"


Trial: TypeAlias = Callable[[], Coroutine[Any, Any, Seen]]


@dataclass(frozen=True, slots=True)
class Held:
    """What this process has at one moment."""

    children: int
    shared_memory: int
    fds: int
    threads: int
    """But those that asyncio keeps for calls that block."""
    tasks: int

    @classmethod
    def now(cls) -> Held:
        kept = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
        return cls(
            children=len(children(os.getpid())),
            shared_memory=len(shared_memory()),
            fds=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")) - kept,
            tasks=len(asyncio.all_tasks()),
        )

    def over(self, before: Held) -> dict[str, int]:
        """What there is more of than before, and how much."""
        now, then = asdict(self), asdict(before)
        return {name: now[name] - then[name] for name in now if now[name] > then[name]}


async def settled(before: Held) -> Held:
    """What is held once it is no more than before, or after `SETTLE_SECONDS`."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        held = Held.now()
        if not held.over(before) or time.monotonic() > until:
            return held
        await asyncio.sleep(0.05)


async def harm_engine(harm: Harm, gpus: int) -> Seen:
    """A rank of an engine in this process comes to harm, while it starts or while it serves."""
    seen, limit = Seen(f"engine: {harm}"), STEP_LIMIT if harm.way is Way.WEDGED else ranks.MIN_STEP_LIMIT
    with harmed(harm) as note, patch.object(ranks, "MIN_STEP_LIMIT", limit):
        errors, ended = await _until_fault(EngineConfig(gpus=gpus, **SETTINGS))
        if note.at is None:
            seen.wrong.append("it did not come to that")
            return seen
        seen.seconds = ended - note.at
    expected = SAID[harm.way].format(harm.rank)
    found = [str(error) for error in errors if not isinstance(error, EngineUnavailableError)]  # that one was refused
    seen.said = found[0] if found else ""
    seen.check(bool(found) and all(expected in each for each in found), f"streams ended with {found}")
    within = WITHIN + limit * (harm.way is Way.WEDGED)
    seen.check(seen.seconds < within, f"the last stream ended after {seen.seconds:.2f} s")
    return seen


async def _until_fault(config: EngineConfig) -> tuple[Sequence[BaseException], float]:
    """How streams end that never end by themselves, and when the last one has; ranks are gone by then."""
    others = children(os.getpid())
    try:
        async with asyncio.timeout(PATIENCE), Engine(config) as engine:
            errors = await asyncio.gather(*(_ask_on(engine) for _ in range(STREAMS)))
            await _gone([pid for pid in children(os.getpid()) if pid not in others])
            return errors, time.monotonic()
    except (HsrpcError, TimeoutError) as error:  # it has not started
        return [error], time.monotonic()


async def _ask_on(engine: Engine) -> HsrpcError:
    """Ask again and again; why that ends."""
    try:
        while True:
            async for _ in engine.generate(PROMPT, PARAMS):
                pass
    except HsrpcError as error:
        return error


async def harm_server(number: signal.Signals, gpus: int, *, drains: bool = False) -> Seen:
    """The last rank of a server gets a signal, while calls go on; `drains`: the server has got SIGTERM before."""
    seen = Seen(f"server{' that drains' if drains else ''}: GPU {gpus - 1} gets {number.name}")
    async with _served(gpus) as served:
        if drains:
            await served.drain()
        began = time.monotonic()
        os.kill(served.ranks[-1], number)
        seen.said = ", ".join(sorted(set(await served.ends())))
        seen.seconds = time.monotonic() - began
        seen.check(seen.said == FAULT, f"calls ended with {seen.said}")
        seen.check(seen.seconds < WITHIN, f"the last call ended after {seen.seconds:.2f} s")
        seen.check(await served.is_down(), "its health is SERVING")
        await served.see_ended(seen, 1)
    return seen


async def kill_server(gpus: int) -> Seen:
    """The process of a server is killed: its ranks see that it is gone."""
    seen = Seen("server: it is killed itself")
    async with _served(gpus) as served:
        began = time.monotonic()
        served.server.kill()
        await _gone(served.ranks)
        seen.seconds, seen.said = time.monotonic() - began, "its ranks are gone"
        seen.check(seen.seconds < WITHIN, f"the last rank ended after {seen.seconds:.2f} s")
    return seen


async def drain_server(gpus: int) -> Seen:
    """A server that nobody harms drains: its calls end well, and its ranks end with it."""
    seen = Seen("server: it drains")
    async with _served(gpus) as served:
        await served.drain()
        seen.said = ", ".join(sorted(set(await served.ends())))
        seen.check(seen.said == "OK", f"calls ended with {seen.said}")
        await served.see_ended(seen, 0)
    return seen


@dataclass(frozen=True, slots=True)
class Served:
    """A server, with calls under way."""

    server: ServerProcess
    client: AsyncClient
    ranks: Sequence[int]
    calls: Sequence[asyncio.Task[str]]

    async def drain(self) -> None:
        """Send SIGTERM, and return once the server drains."""
        os.kill(self.server.pid, signal.SIGTERM)
        await _until(self.is_down)

    async def is_down(self) -> bool:
        """Whether its health says so, or nobody answers."""
        async with grpc.aio.insecure_channel(self.server.address) as channel:
            try:
                found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError:
                return True
            return bool(found.status == health_pb2.HealthCheckResponse.NOT_SERVING)

    async def ends(self) -> Sequence[str]:
        """Statuses of the calls, once all have ended."""
        return await asyncio.gather(*self.calls)

    async def see_ended(self, seen: Seen, expected: int) -> None:
        """Wait until the server ends by itself; and see what is left of it."""
        code = await asyncio.to_thread(self.server.wait, PATIENCE)
        seen.check(code == expected, f"its exit code is {code}, not {expected}")
        left = [pid for pid in self.ranks if is_there(pid)]
        seen.check(not left, f"processes {left} are left")


@asynccontextmanager
async def _served(gpus: int) -> AsyncIterator[Served]:
    """Once each call has got something; afterwards the server is ended, if it has not ended."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | {"gpus": gpus}).items()]
    server = await asyncio.to_thread(ServerProcess, arguments)
    try:
        async with AsyncClient(server.address) as client:
            await client.wait_ready(PATIENCE)
            begun = [asyncio.Event() for _ in range(STREAMS)]
            calls = [asyncio.create_task(_call(client, each)) for each in begun]
            async with asyncio.timeout(PATIENCE):
                for each in begun:
                    await each.wait()
            yield Served(server, client, children(server.pid), calls)
            await asyncio.gather(*calls)
    finally:
        server.kill()


async def _call(client: AsyncClient, begun: asyncio.Event) -> str:
    try:
        async for _ in client.generate(PROMPT, **ASKED):
            begun.set()
    except CallError as error:
        return f"{error.code.name}: {error.reason}"
    finally:
        begun.set()
    return "OK"


async def _gone(pids: Sequence[int]) -> None:
    """Return once these processes have ended."""

    async def are_gone() -> bool:
        return not any(map(is_there, pids))

    await _until(are_gone)


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds.

    Raises:
        TimeoutError: it does not.
    """
    end = time.monotonic() + PATIENCE
    while not await holds():
        if time.monotonic() > end:
            raise TimeoutError
        await asyncio.sleep(0.005)


def trials(gpus: int, rng: random.Random) -> Iterator[Trial]:
    """Ever other ones, each kind after a while again."""
    while True:
        harms = [Harm(rng.randrange(gpus), kind.value, Way.KILLED, rng.randint(1, 12)) for kind in KINDS]
        harms += [Harm(rng.randrange(gpus), moment, Way.KILLED) for moment in Start]
        for way in (Way.STOPPED, Way.STANDS_STILL, Way.WEDGED, Way.FAILS):
            harms += [Harm(rng.randrange(gpus), kind.value, way, rng.randint(1, 12)) for kind in rng.sample(KINDS, 3)]
        harms += [Harm(rng.randrange(gpus), Start.JOIN, Way.KILLED, 1, rng.uniform(0, 8)) for _ in range(12)]
        harms += [Harm(rng.randrange(gpus), Start.READY, Way.STOPPED, 1, rng.uniform(0, 2)) for _ in range(6)]
        found: list[Trial] = [partial(harm_engine, harm, gpus) for harm in harms]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            found += [partial(harm_server, number, gpus, drains=drains) for drains in (False, True)]
        found += [partial(kill_server, gpus), partial(drain_server, gpus)]
        rng.shuffle(found)
        yield from found


async def check(chosen: Sequence[Trial], tell: Callable[[str], object]) -> dict[str, Any]:
    """Do all of them, and before them one that shows what a process keeps once it has done so; what was seen.

    Without the garbage collector, that nobody relies on it to close what is open.
    """
    gc.disable()
    try:
        return await _check(chosen, tell)
    finally:
        gc.enable()


async def _check(chosen: Sequence[Trial], tell: Callable[[str], object]) -> dict[str, Any]:
    all_seen = [await harm_engine(Harm(0, OpKind.SAMPLE.value, Way.KILLED), 2)]
    tell(all_seen[0].line)
    before = Held.now()
    for trial in chosen:
        seen = await trial()
        grown = (await settled(before)).over(before)
        seen.check(not grown, f"there is more than before: {grown}")
        tell(seen.line)
        all_seen.append(seen)
    seconds = sorted(seen.seconds for seen in all_seen if seen.seconds is not None)
    return {
        "kills": len(all_seen),
        "seconds": {"median": seconds[len(seconds) // 2], "longest": seconds[-1]},
        "held": asdict(Held.now()),
        "before": asdict(before),
        "wrong": {seen.name: seen.wrong for seen in all_seen if seen.wrong},
    }


def main() -> int:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=lines[0], epilog=f"for example:{lines[2]}")
    parser.add_argument("--kills", type=int, default=50, help="how many; 50 is as many as there are kinds")
    parser.add_argument("--gpus", type=int, default=2, help="ranks of each engine")
    parser.add_argument("--seed", type=int, default=0, help="of which is harmed, and when")
    options = parser.parse_args()
    chosen = list(islice(trials(options.gpus, random.Random(options.seed)), options.kills))
    with tqdm(total=1 + len(chosen), desc="kills", unit="", mininterval=1) as bar:

        def tell(line: str) -> None:
            bar.write(line)
            bar.update()

        found = uvloop.run(check(chosen, tell))
    print(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
