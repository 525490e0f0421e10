"""Cells of the comparison (a case, a model, a system), the setups that stand for each, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.peers import flexgen_plan
from benchmarks.peers.cases import (
    GIB,
    HOST_BATCH,
    MODELS,
    RESIDENT_BATCH,
    RESIDENT_MODEL,
    Budgets,
    Case,
    Setup,
    System,
    output_of,
    sizes_of,
)
from hsrpc.schedule.blocks import BlockKind

ACCELERATE_STEPS = {System.ACCELERATE: 4, System.ACCELERATE_PINNED: 8}
"""Steps that Accelerate measures: each takes seconds, and many more where it copies from pageable memory."""
_START_SECONDS = 25.0
"""Imports, calibrations, the end of the process."""
_PINNED_RATE = 2.2e9
_MAX_PLANNED = 512
_BUS_RATE = 50e9
_ACCELERATE_RATE = {System.ACCELERATE: 3e9, System.ACCELERATE_PINNED: 20e9}
"""Bytes/s of weights and cache together that explain 7.4 and 60 tokens/s of OPT-6.7B at batch 128."""
_GENERATE_STEP, _COMPILE_SECONDS = 0.05, 90.0
"""Seconds a step and to compile, of transformers with the model on the device: guesses on the safe side."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one comparison needs of one system."""

    case: Case
    model: str
    system: System


def all_cells(cases: Sequence[Case], models: Sequence[str], systems: Sequence[System]) -> list[Cell]:
    """Those of the chosen ones that there are."""
    chosen = [Cell(case, model, system) for case in cases for model in models for system in systems]
    return list(filter(_is_compared, chosen))


def _is_compared(cell: Cell) -> bool:
    """accelerate runs OPT-6.7B in the host case only, because it is slow."""
    if cell.case is Case.RESIDENT:
        return cell.model == RESIDENT_MODEL and cell.system in (System.HSRPC, System.TRANSFORMERS)
    if cell.system in ACCELERATE_STEPS:
        return cell.case is Case.HOST and cell.model == "opt-6.7b"
    return cell.model in MODELS and cell.system is not System.TRANSFORMERS


def setups_of(cell: Cell, budgets: Budgets, count: int) -> list[Setup]:
    """What to measure for a cell: of FlexGen `count` setups at most, the most promising ones, to choose the best of."""
    batch = _equal_batch(cell, budgets)
    if cell.system is System.FLEXGEN:
        if batch is None:
            return flexgen_plan.candidates(cell.model, budgets, count)
        return list(flexgen_plan.host_setups(cell.model, budgets, batch))[:count]
    setup = Setup(
        case=cell.case,
        model=cell.model,
        system=cell.system,
        budgets=budgets,
        batch=batch,
        output=output_of(cell.model),
    )
    if cell.system is System.TRANSFORMERS:
        return [setup, replace(setup, compiled=True)]
    return [replace(setup, steps=ACCELERATE_STEPS.get(cell.system))]


def _equal_batch(cell: Cell, budgets: Budgets) -> int | None:
    """None: each system's own."""
    if cell.case is Case.RESIDENT:
        return RESIDENT_BATCH
    return host_batch(cell.model, budgets) if cell.case is Case.HOST else None


def host_batch(model: str, budgets: Budgets) -> int:
    """Requests of the host case: what FlexGen's cache leaves room for where nothing else is set."""
    return HOST_BATCH.get(model) or flexgen_plan.largest_host_batch(model, budgets)


def estimated_seconds(setup: Setup) -> float:
    """About how long a setup takes, from the start of its process to its end."""
    sizes, steps = sizes_of(setup.model), setup.steps or setup.output
    if setup.system is System.FLEXGEN:
        decode = (steps - 1) * flexgen_plan.predicted_step(setup)
        return _START_SECONDS + sizes.model_bytes / _PINNED_RATE + flexgen_plan.predicted_prefill(setup) + decode
    if setup.system is System.TRANSFORMERS:  # the same steps twice: to warm up, and to count
        return _START_SECONDS + setup.compiled * _COMPILE_SECONDS + 2 * steps * _GENERATE_STEP
    if setup.system in _ACCELERATE_RATE:
        tokens = (setup.batch or 0) * setup.mean_context
        moved = sizes.model_bytes + tokens * sizes.token_bytes(BlockKind.KV)
        rate = _ACCELERATE_RATE[setup.system]
    else:
        resident = 0 if setup.case is Case.HOST else setup.budgets.device - 4 * GIB
        streamed, rate = max(0, sizes.model_bytes - resident), _BUS_RATE
        row = sizes.token_bytes(BlockKind.ACTIVATION)
        tokens = (setup.batch or _planned_batch(setup, streamed, row)) * setup.mean_context
        moved = streamed + tokens * row
    return _START_SECONDS + sizes.model_bytes / _PINNED_RATE + (steps + 5) * moved / rate


def _planned_batch(setup: Setup, streamed: int, row: int) -> int:
    """hsrpc's: none that moves anything where the model fits the device, else as many as the host holds."""
    room = (setup.budgets.host - streamed) // ((setup.prompt + setup.output) * row)
    return min(_MAX_PLANNED, max(1, room)) if streamed else 0
