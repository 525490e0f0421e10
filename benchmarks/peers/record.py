"""What was measured of a setup, and the file that it is added to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.peers.cases import Budgets, Case, Setup, System
from hsrpc.config import format_bytes

_SETTLING_STEPS = 2
"""Left out of the mean that stands for steps that were not made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Seconds, bytes and tokens of one run; loading the model is in none of the rates."""

    device: str
    batch: int
    prefill_seconds: float
    """From the first request to the last first token."""
    step_seconds: float
    """Median of the decode steps."""
    decode_seconds: float
    """All decode steps, those projected included."""
    total_seconds: float
    """From the first request to the last token, projected steps included."""
    decode_tokens: int
    """New tokens after each request's first."""
    total_tokens: int
    """New tokens."""
    projected: bool
    """Some decode steps were not made, but taken to last as long as the mean of those made."""
    limit_step_seconds: float
    """The least time of a decode step with this placement on this machine, at the mean context."""
    efficiency: float
    """Limit of a step over the mean step."""
    peak_device_bytes: int
    """The allocator's peak, with what it reserved."""
    host_bytes: int
    """Weights, caches and pinned buffers on the host."""
    load_seconds: float
    load_bandwidth: float
    """Host to device, bytes/s, in the same process."""
    software: str = ""
    """Versions of the libraries that it ran on."""

    @property
    def total_throughput(self) -> float:
        """New tokens/s of prefill and decode together."""
        return self.total_tokens / self.total_seconds

    @property
    def decode_throughput(self) -> float:
        return self.decode_tokens / self.decode_seconds

    def excess(self, budgets: Budgets) -> str | None:
        """Which memory it took more of than it may, in a line; None: it kept to its budgets."""
        taken = {"device": (self.peak_device_bytes, budgets.device), "host": (self.host_bytes, budgets.host)}
        over = [
            f"{format_bytes(used)} of {format_bytes(budget)} {name} memory"
            for name, (used, budget) in taken.items()
            if used > budget
        ]
        return ", ".join(over) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds until the first tokens, and of each decode step made."""

    prefill: float
    steps: Sequence[float]
    """Those without prompts, where prompts come between them; `prefill` then has the others."""
    tokens: int | None = None
    """New tokens of these steps, which are all that there are; None: one of each request in each."""

    def num_steps(self, output: int) -> int:
        """Decode steps that `output` tokens take, made or not."""
        return output - 1 if self.tokens is None else len(self.steps)

    def decode_seconds(self, output: int) -> float:
        """Seconds of all steps that `output` tokens take; those that were not made count as the mean settled one."""
        settled = self.steps[_SETTLING_STEPS:] or self.steps
        missing = self.num_steps(output) - len(self.steps)
        return sum(self.steps) + (missing * fmean(settled) if missing > 0 else 0.0)

    @property
    def step_seconds(self) -> float:
        return median(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a decode step of `batch` requests with `context` cached tokens each copies to the device, bytes."""

    batch: int
    context: int
    weights: int
    cache: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRun:
    """What a peer's runner brings home; bytes and seconds as in `Outcome`."""

    timing: Timing
    traffic: Traffic
    peak_device_bytes: int
    host_bytes: int
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A setup and what came of it."""

    setup: Setup
    outcome: Outcome | None
    error: str | None = None
    """Why there is no outcome, in a line."""

    @property
    def excess(self) -> str | None:
        """Which memory was taken beyond the budgets; None: there is no outcome, or it kept to them."""
        return self.outcome.excess(self.setup.budgets) if self.outcome else None


def read_records(file: Path) -> list[Record]:
    """All records of a file; none if it is not there."""
    if not file.exists():
        return []
    return [record_from(entry) for entry in json.loads(file.read_text())]


def add_record(file: Path, record: Record) -> None:
    """Add to the file, which at every moment holds whole records only."""
    entries = [asdict(each) for each in [*read_records(file), record]]
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(fresh, file)


def record_from(entry: dict[str, Any]) -> Record:
    """The record that `asdict` was made from."""
    outcome = entry["outcome"]
    return Record(setup=setup_from(entry["setup"]), outcome=outcome and Outcome(**outcome), error=entry["error"])


def setup_from(entry: dict[str, Any]) -> Setup:
    """The setup that `asdict` was made from."""
    return Setup(
        **entry
        | {
            "case": Case(entry["case"]),
            "system": System(entry["system"]),
            "budgets": Budgets(**entry["budgets"]),
            "percent": tuple(entry["percent"]),
            "offload": tuple(entry.get("offload", ())),
        }
    )
