"""Measures cells: each engine in a process of its own, with a time limit, and each record saved at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.peers.cases import Case, Setup, System
from benchmarks.peers.cells import estimated_seconds
from benchmarks.peers.record import Outcome, Record, add_record, read_records

Measure = Callable[[Sequence[Setup], float], Sequence[Record]]
"""Runs setups of one engine within a number of seconds."""
_ROOT = Path(__file__).parents[2]
_MAX_SAID = 30
"""Last lines of a process that failed which are printed."""
_MEMORY = "memory"
"""Word in the reason of every failure or excess that a smaller batch may cure."""
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Settings for the peers whose budget is tight: less of it is lost to fragments."""


@dataclass(kw_only=True)
class Driver:
    """Measures what the file does not have yet, while there is time."""

    file: Path
    measure: Measure
    say: Callable[[str], None]
    deadline: float
    """End of the time for all setups, by time.monotonic()."""
    limit: float = 400.0
    """Seconds that one setup may take."""

    def run(self, setup: Setup) -> Record | None:
        """The setup's record, from the file or measured now; None: there is no time left for it."""
        return self.run_engine([setup]).get(setup)

    def run_engine(self, setups: Sequence[Setup]) -> dict[Setup, Record]:
        """Records of setups that one engine runs, from the file or measured now; none of one that time is over for."""
        saved = {record.setup: record for record in read_records(self.file)}
        found = {setup: saved[setup] for setup in setups if setup in saved}
        for setup, record in found.items():
            self.say(f"{setup.name}: in {self.file.name} already: {_told(record)}")
        missing = [setup for setup in setups if setup not in found]
        return found | self._measured(missing) if missing else found

    def _measured(self, setups: Sequence[Setup]) -> dict[Setup, Record]:
        left, estimated = self.deadline - time.monotonic(), estimated_seconds(*setups)
        names = "; ".join(setup.name for setup in setups)
        if left < estimated:
            self.say(f"{names}: not started, {max(0.0, left):.0f} s are left; run again to go on")
            return {}
        self.say(f"{names}: started, {estimated:.0f} s estimated")
        found: dict[Setup, Record] = {}
        for record in self.measure(setups, min(self.limit, left)):
            if record.outcome is None and time.monotonic() > self.deadline:  # not its fault: there was no more time
                self.say(f"{record.setup.name}: stopped, the time is over; run again to measure it")
                continue
            add_record(self.file, record)
            self.say(f"{record.setup.name}: {_told(record)}")
            found[record.setup] = record
        return found

    def run_best(self, setups: Sequence[Setup], steps: int, final_steps: int | None) -> Record | None:
        """Try setups for `steps` tokens each, then measure the best of them for `final_steps`, or in full.

        One setup alone is measured at once.
        """
        if len(setups) == 1:
            return self.run(replace(setups[0], steps=final_steps))
        tried = [record for setup in setups if (record := self._try(replace(setup, steps=steps)))]
        best = max(tried, key=_throughput, default=None)
        if best is None or _throughput(best) == 0:
            return None
        return self.run(replace(self._grown(best).setup, steps=final_steps))

    def _grown(self, best: Record) -> Record:
        """Measure larger batches as long as that helps: the arithmetic may have promised too little."""
        while best.setup.case is Case.BUDGET and (larger := self.run(_resized(best.setup, 9 / 8))):
            if _throughput(larger) <= _throughput(best):
                break
            best = larger
        return best

    def _try(self, setup: Setup) -> Record | None:
        """Measure; where memory ran out, with a smaller batch, twice at most: the arithmetic promised too much."""
        record = self.run(setup)
        for _ in range(2):
            if record is None or _MEMORY not in (record.error or record.excess or "") or setup.case is Case.HOST:
                break
            setup = _resized(setup, 7 / 8)
            record = self.run(setup)
        return record


def run_child(setups: Sequence[Setup], seconds: float) -> list[Record]:
    """Measure setups of one engine in a process of its own.

    What goes wrong there is the error of all that it did not come to.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, messages = Path(folder, "outcomes.json"), Path(folder, "messages")
        wanted = json.dumps([asdict(setup) for setup in setups])
        command = [sys.executable, "-m", "benchmarks.peers", "one", wanted, str(file)]
        with messages.open("w") as stream:
            try:
                code = subprocess.run(
                    command,
                    cwd=_ROOT,
                    stdout=stream,
                    stderr=stream,
                    timeout=seconds,
                    check=False,
                    env=_environment(setups[0]),
                ).returncode
                said = messages.read_text(errors="replace")
                error = reason(code, said)
                if code:
                    print(*said.splitlines()[-_MAX_SAID:], sep="\n", file=sys.stderr)
            except subprocess.TimeoutExpired:
                error = f"took longer than {seconds:.0f} s"
        outcomes = [Outcome(**entry) for entry in json.loads(file.read_text())] if file.exists() else []
    measured = [Record(setup=setup, outcome=outcome) for setup, outcome in zip(setups, outcomes, strict=False)]
    return [*measured, *(Record(setup=setup, outcome=None, error=error) for setup in setups[len(measured) :])]


def reason(code: int, messages: str) -> str:
    """Why a child had no outcome, in a line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if any("out of memory" in line.lower() for line in lines):
        return f"out of {_MEMORY} on the device"
    if code == -9:
        return f"killed, probably for host {_MEMORY}"
    return f"exit status {code}: {lines[-1][:300] if lines else 'no message'}"


def _environment(setup: Setup) -> dict[str, str]:
    is_tight = setup.system in (System.FLEXGEN, System.ACCELERATE, System.ACCELERATE_PINNED, System.VLLM)
    return os.environ | _ENVIRONMENT if is_tight else dict(os.environ)


def _resized(setup: Setup, factor: float) -> Setup:
    """Setup whose batch is larger or smaller by at least one request for each GPU batch."""
    per_batch = (setup.batch or 0) // setup.num_batches
    changed = round(per_batch * factor)
    changed += (changed == per_batch) * (1 if factor > 1 else -1)
    return replace(setup, batch=max(1, changed) * setup.num_batches)


def _throughput(record: Record) -> float:
    """0 without an outcome, or with one that took more memory than it may."""
    return record.outcome.total_throughput if record.outcome and not record.excess else 0.0


def _told(record: Record) -> str:
    if record.outcome is None:
        return record.error or "no outcome"
    out = record.outcome
    rates = f"{out.total_throughput:.1f} tokens/s in all, {out.decode_throughput:.1f} in decode"
    return f"{rates}, {out.efficiency:.2f} of the limit" + (f", but {record.excess}" if record.excess else "")
