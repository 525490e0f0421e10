"""Cells of the comparison (a case, a model, a system), the setups that stand for each, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.peers import flexgen_plan, vllm_plan
from benchmarks.peers.cases import (
    GIB,
    GPT_OSS,
    HOST_BATCH,
    LLAMA,
    MODELS,
    ONE_ENGINE,
    RESIDENT_BATCH,
    RESIDENT_MODEL,
    SHARED_PREFIX,
    Budgets,
    Case,
    Setup,
    System,
    output_of,
    sizes_of,
    stored_bytes,
)
from hsrpc.schedule.blocks import BlockKind

ACCELERATE_STEPS = {System.ACCELERATE: 4, System.ACCELERATE_PINNED: 8}
"""Steps that Accelerate measures: each takes seconds, and many more where it copies from pageable memory."""
_START_SECONDS = 25.0
"""Imports, calibrations, the end of the process."""
_PINNED_RATE = 2.2e9
_MAX_PLANNED = 512
_BUS_RATE = 50e9
_HOST_RATE = {System.ACCELERATE: 3e9, System.ACCELERATE_PINNED: 20e9, System.LLAMA_CPP: 30e9}
"""Bytes/s of weights and cache together: what explains 7.4 and 60 tokens/s of OPT-6.7B at batch 128, and a guess."""
_VLLM_SECONDS, _FILE_RATE = 25.0, 1e9
"""Imports of vLLM; bytes/s of a file that is written or read."""
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
    """accelerate runs OPT-6.7B in the host case only, because it is slow; two models have peers of their own."""
    if cell.model == LLAMA:
        return cell.case in (Case.BUDGET, Case.SHARED) and cell.system in (System.HSRPC, System.VLLM)
    if cell.model == GPT_OSS:
        return cell.case in (Case.HOST, Case.ALONE) and cell.system in (System.HSRPC, System.LLAMA_CPP)
    if cell.case is Case.RESIDENT:
        return cell.model == RESIDENT_MODEL and cell.system in (System.HSRPC, System.TRANSFORMERS)
    if cell.system in ACCELERATE_STEPS:
        return cell.case is Case.HOST and cell.model == "opt-6.7b"
    is_streamed = cell.model in MODELS and cell.case in (Case.HOST, Case.BUDGET)
    return is_streamed and cell.system in (System.HSRPC, System.FLEXGEN)


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
        shared=SHARED_PREFIX if cell.case is Case.SHARED else 0,
    )
    if cell.system is System.TRANSFORMERS:
        return [setup, replace(setup, compiled=True)]
    return [replace(setup, steps=ACCELERATE_STEPS.get(cell.system))]


def engines(setups: Sequence[Setup]) -> list[list[Setup]]:
    """Setups in groups that one process measures: those that one engine can run, of the systems that share one."""
    groups: dict[Setup, list[Setup]] = {}
    for setup in setups:
        groups.setdefault(setup.engine if setup.system in ONE_ENGINE else setup, []).append(setup)
    return list(groups.values())


def _equal_batch(cell: Cell, budgets: Budgets) -> int | None:
    """None: each system's own."""
    if cell.case is Case.RESIDENT:
        return RESIDENT_BATCH
    if cell.case is Case.ALONE:
        return 1
    return host_batch(cell.model, budgets) if cell.case is Case.HOST else None


def host_batch(model: str, budgets: Budgets) -> int:
    """Requests of the host case: what FlexGen's cache leaves room for where nothing else is set."""
    return HOST_BATCH.get(model) or flexgen_plan.largest_host_batch(model, budgets)


def estimated_seconds(*setups: Setup) -> float:
    """About how long setups of one engine take, from the start of its process to its end."""
    return _seconds_to_start(setups[0]) + sum(map(_seconds_to_run, setups))


def _seconds_to_start(setup: Setup) -> float:
    if setup.system is System.TRANSFORMERS:
        return _START_SECONDS + setup.compiled * _COMPILE_SECONDS
    if setup.system is System.VLLM:
        return _START_SECONDS + _VLLM_SECONDS + stored_bytes(setup.model) / _PINNED_RATE
    if setup.system is System.LLAMA_CPP:  # written, then read
        return _START_SECONDS + 2 * stored_bytes(setup.model) / _FILE_RATE
    return _START_SECONDS + stored_bytes(setup.model) / _PINNED_RATE


def _seconds_to_run(setup: Setup) -> float:
    sizes, steps = sizes_of(setup.model), setup.steps or setup.output
    if setup.system is System.FLEXGEN:
        return flexgen_plan.predicted_prefill(setup) + (steps - 1) * flexgen_plan.predicted_step(setup)
    if setup.system is System.TRANSFORMERS:  # the same steps twice: to warm up, and to count
        return 2 * steps * _GENERATE_STEP
    if setup.system is System.VLLM:
        waves = max(1.0, (setup.batch or 0) / vllm_plan.room(setup))
        return (waves * steps + 5) * vllm_plan.streamed_bytes(setup) / _BUS_RATE
    if setup.system in _HOST_RATE:
        tokens = (setup.batch or 0) * setup.mean_context
        moved = stored_bytes(setup.model) + tokens * sizes.token_bytes(BlockKind.KV)
        return (steps + 5) * moved / _HOST_RATE[setup.system]
    resident = 0 if setup.case in (Case.HOST, Case.ALONE) else setup.budgets.device - 4 * GIB
    streamed = max(0, stored_bytes(setup.model) - resident)
    row = sizes.token_bytes(BlockKind.ACTIVATION)
    tokens = (setup.batch or _planned_batch(setup, streamed, row)) * (setup.mean_context - setup.shared)
    return (steps + 5) * (streamed + tokens * row) / _BUS_RATE


def _planned_batch(setup: Setup, streamed: int, row: int) -> int:
    """hsrpc's: none that moves anything where the model fits the device, else as many as the host holds."""
    room = (setup.budgets.host - streamed) // ((setup.prompt + setup.output - setup.shared) * row)
    return min(_MAX_PLANNED, max(1, room)) if streamed else 0
