"""Open-loop load: requests leave when they are due, however slowly the server answers those before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.client import AsyncClient, AsyncStream, CallError, Settings

OK = "OK"
CANCELLED = "CANCELLED"
"""Status of a call that this client ended, on purpose."""
HANG = "HANG"
"""Status of a call that did not end within `_PATIENCE`."""
_PATIENCE = 300.0
"""Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that is to leave `at` seconds after the start."""

    at: float
    prompt: Sequence[int]
    output_tokens: int
    cancel_after: int | None = None
    """Output tokens after which the client cancels."""
    timeout: float | None = None
    """The call's deadline, seconds."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a request; times in seconds after the start of the load."""

    scheduled: float
    status: str = HANG
    first_token: float | None = None
    end: float = 0.0
    retry_after: float | None = None
    """Seconds after which the server asked to try again."""
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    """Times between tokens: a message's gap is shared evenly by its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How many arrivals there are, and of what kind."""

    rate: float
    """Requests per second, on average; exponential gaps."""
    duration: float
    """Seconds."""
    lengths: Lengths
    prompt: int
    output: int
    cancel_share: float = 0.0
    """Share of requests that the client cancels, uniformly over their output."""
    deadline_share: float = 0.0
    """Share of requests with a deadline that is likely to pass."""
    deadline: float = 0.1
    """Seconds."""


def make_arrivals(mix: Mix, vocab_size: int, longest: int, seed: int = 0) -> list[Arrival]:
    """A Poisson process; the same seed gives the same. Requests longer than `longest` tokens are cut."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / mix.rate, int(mix.rate * mix.duration * 1.5) + 20))
    times = times[times < mix.duration]
    workload = make_workload(
        mix.lengths, count=len(times), prompt=mix.prompt, output=mix.output, vocab_size=vocab_size, seed=seed
    )
    made = []
    for at, prompt, output in zip(times.tolist(), workload.prompts, workload.output_tokens, strict=True):
        kept = prompt[: longest - 1]
        count = min(output, longest - len(kept))
        fate, cancel_after = rng.random(), int(rng.integers(0, count))
        cancels = fate < mix.cancel_share
        late = not cancels and fate < mix.cancel_share + mix.deadline_share
        made.append(
            Arrival(
                at=at,
                prompt=kept,
                output_tokens=count,
                cancel_after=cancel_after if cancels else None,
                timeout=mix.deadline if late else None,
            )
        )
    return made


async def run_load(
    client: Callable[[], AsyncClient], arrivals: Sequence[Arrival], done: Callable[[Outcome], object] = lambda _: None
) -> list[Outcome]:
    """Send all arrivals when due, each through the client that `client` gives then; `done` hears of each end."""
    started = time.perf_counter()
    outcomes = []
    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            outcome = Outcome(scheduled=arrival.at)
            outcomes.append(outcome)
            await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - started)))
            group.create_task(_request(client(), arrival, outcome, started, done))
    return outcomes


async def _request(
    client: AsyncClient, arrival: Arrival, outcome: Outcome, started: float, done: Callable[[Outcome], object]
) -> None:
    try:
        async with asyncio.timeout(_PATIENCE), client.generate(arrival.prompt, **_settings(arrival)) as stream:
            outcome.status = await _read(stream, arrival, outcome, started)
    except CallError as error:
        outcome.status, outcome.retry_after = error.code.name, error.retry_after
    except TimeoutError:
        outcome.status = HANG
    outcome.end = time.perf_counter() - started
    done(outcome)


def _settings(arrival: Arrival) -> Settings:
    settings: Settings = {
        "temperature": 0.0,
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if arrival.timeout is not None:
        settings["timeout"] = arrival.timeout
    return settings


async def _read(stream: AsyncStream, arrival: Arrival, outcome: Outcome, started: float) -> str:
    before, finished = 0.0, False
    async for delta in stream:
        now, count = time.perf_counter() - started, len(delta.token_ids)
        if outcome.first_token is None:
            outcome.first_token = now
        elif count:
            outcome.gaps += [(now - before) / count] * count
        outcome.tokens += count
        before, finished = now, delta.finish is not None
        if arrival.cancel_after is not None and outcome.tokens > arrival.cancel_after:
            return CANCELLED
    return OK if finished else "NO_FINISH"
