"""The reference of a kind of GPU, and how a measured case compares with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoding import Cell
from benchmarks.record import ROOT

DIRECTORY = ROOT / "benchmarks" / "results" / "guard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A case beside its reference."""

    cell: Cell
    efficiency: float | None
    """The case's efficiency over the reference's; None: there is nothing to compare."""
    step: float | None
    """Seconds of a step over the reference's."""
    remark: str | None
    """Why there is nothing to compare."""

    def has_lost(self, within: float) -> bool:
        """Whether more than the part `within` of the reference's speed is gone, or the case has no figures.

        Both must say so: on a slower bus the step takes longer with the same efficiency, and a calibration that was
        disturbed gives the same step another limit.
        """
        if self.efficiency is None or self.step is None:
            return "failure" in self.cell
        return self.efficiency < 1 - within and self.step > 1 + within


def gpu_kind(device: str) -> str:
    """The name of a device as the names of files have it: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def reference_file(kind: str) -> Path:
    return DIRECTORY / f"{kind}.json"


def read_reference(kind: str) -> dict[str, Cell]:
    """The cells of the reference by the names of their cases; empty where there is none."""
    file = reference_file(kind)
    return {cell["name"]: cell for cell in json.loads(file.read_text())["cases"]} if file.exists() else {}


def compare(cell: Cell, reference: dict[str, Cell]) -> Comparison:
    """A case with another setting than its reference has nothing to be compared with."""
    known, remark = reference.get(cell["name"]), None
    if "failure" in cell:
        remark = "not measured"
    elif known is None:
        remark = "no reference"
    elif known["setting"] != cell["setting"]:
        remark = "the reference has another setting"
    if known is None or remark is not None:
        return Comparison(cell=cell, efficiency=None, step=None, remark=remark)
    efficiency, step = (cell[name] / known[name] for name in ("efficiency", "step_seconds"))
    return Comparison(cell=cell, efficiency=efficiency, step=step, remark=None)


def best(cells: list[Cell]) -> Cell:
    """The one with the highest efficiency, with the `efficiencies` of all; a failure where none has figures."""
    measured = [cell for cell in cells if "failure" not in cell]
    if not measured:
        return cells[-1]
    found = max(measured, key=lambda cell: float(cell["efficiency"]))
    return found | {"efficiencies": [cell["efficiency"] for cell in measured]}
