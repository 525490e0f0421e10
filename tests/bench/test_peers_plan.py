"""Which setups of the peers are measured: arithmetic of memory, time and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.peers.cases import GIB, MODELS, Budgets, Case, Setup, System, sizes_of
from benchmarks.peers.cells import ACCELERATE_STEPS, Cell, all_cells, estimated_seconds, host_batch, setups_of
from benchmarks.peers.flexgen_plan import (
    RELAY_BYTES,
    candidates,
    fits,
    footprint,
    predicted_step,
    predicted_throughput,
    resident_bytes,
    weight_groups,
)
from benchmarks.peers.limits import limit_seconds
from benchmarks.peers.record import Traffic
from hsrpc.plan.hardware import Hardware
from hsrpc.schedule.blocks import BlockKind

BUDGETS = Budgets()
HARDWARE = Hardware(load_bandwidth=50e9, store_bandwidth=50e9, gemm_rate=600e12, memory_bandwidth=3e12)


def flexgen(model: str = "opt-6.7b", batch: int = 24, percent=(0, 100, 0, 100, 100, 0), **more) -> Setup:
    settings = {"case": Case.BUDGET, "system": System.FLEXGEN, "budgets": BUDGETS, "percent": percent} | more
    return Setup(model=model, batch=batch, **settings)


@pytest.mark.parametrize(("percent", "of_twelfths"), [(0, 0), (20, 1), (30, 5), (55, 6), (70, 7), (80, 11), (100, 12)])
def test_tensors_are_placed_by_their_middle(percent: int, of_twelfths: int):
    """As many of a layer's twelve squares stay on the device as FlexGen's rule says, not as the percentage says."""
    _, attention, mlp, _ = weight_groups(sizes_of("opt-13b"))
    kept = resident_bytes(attention, percent) + resident_bytes(mlp, percent)
    assert 12 * kept / sum(attention + mlp) == pytest.approx(of_twelfths, abs=0.01)


def test_everything_on_the_host():
    """The device holds buffers only; the host holds weights, cache and the pinned relays."""
    setup, sizes = flexgen(batch=128), sizes_of("opt-6.7b")
    used = footprint(setup)
    cache = 128 * (512 + 127) * sizes.token_bytes(BlockKind.KV)
    assert used.host_cache == cache
    assert used.streamed_weights == pytest.approx(sizes.model_bytes, rel=0.05)
    assert used.host >= used.streamed_weights + cache + RELAY_BYTES
    assert used.device < sizes.model_bytes
    assert used.host_cache_per_token == sizes.token_bytes(BlockKind.KV)


def test_everything_on_the_device():
    """Nothing is streamed, and the device holds weights and cache."""
    setup, sizes = flexgen(percent=(100, 0, 100, 0, 100, 0)), sizes_of("opt-6.7b")
    used = footprint(setup)
    assert (used.streamed_weights, used.host_cache, used.host_cache_per_token) == (0, 0, 0)
    assert used.device > sizes.model_bytes + 24 * (512 + 127) * sizes.token_bytes(BlockKind.KV)


def test_gpu_batches_share_the_buffers():
    """Four GPU batches need less of the device at the same batch, and the same of the cache."""
    one, four = flexgen(batch=128), flexgen(batch=128, num_batches=4)
    assert footprint(four).device < footprint(one).device
    assert footprint(four).host_cache == footprint(one).host_cache


@pytest.mark.parametrize(
    ("setup", "decode_rate"),
    [
        (flexgen(batch=128), 84.5),
        (flexgen("opt-13b", 64), 42.6),
        (flexgen("opt-6.7b", 24, (100, 0, 100, 0, 100, 0)), 1256),
        (flexgen("opt-13b", 16, (50, 50, 100, 0, 100, 0)), 65),
        (flexgen("opt-30b", 32, (25, 75, 0, 100, 100, 0), output=32), 18),
    ],
)
def test_predicted_steps_are_near_what_was_once_measured(setup: Setup, decode_rate: float):
    """Within a fifth of the first figures of the design, from the host to the resident model."""
    assert setup.batch / predicted_step(setup) == pytest.approx(decode_rate, rel=0.2)


@pytest.mark.parametrize("model", MODELS)
def test_candidates_fit_and_leave_no_room(model: str):
    """Each is within both budgets, with a batch that cannot grow; the best comes first, no placement twice."""
    found = candidates(model, BUDGETS, 6)
    assert len({setup.percent for setup in found}) == len(found) == 6
    assert all(map(fits, found))
    assert not any(fits(replace(setup, batch=setup.batch + 4)) for setup in found)
    rates = [predicted_throughput(setup) for setup in found]
    assert rates == sorted(rates, reverse=True)
    assert all(setup.batch % setup.num_batches == 0 for setup in found)


def test_a_model_that_fits_is_kept_on_the_device():
    """FlexGen's best for OPT-6.7B in 24 GiB is resident; in 12 GiB nothing of the kind is offered."""
    assert candidates("opt-6.7b", BUDGETS, 1)[0].percent == (100, 0, 100, 0, 100, 0)
    small = candidates("opt-6.7b", replace(BUDGETS, device=12 * GIB), 10)
    assert small
    assert all(setup.percent[0] < 100 for setup in small)


def test_the_host_batch_is_the_same_for_all_and_fits():
    """The paper's batches, and for OPT-30B the largest multiple of eight."""
    assert [host_batch(model, BUDGETS) for model in MODELS[:2]] == [128, 64]
    largest = host_batch("opt-30b", BUDGETS)
    setup = flexgen("opt-30b", largest, num_batches=4, output=32)
    assert largest % 8 == 0
    assert fits(setup)
    assert not fits(replace(setup, batch=largest + 8))
    for system in (System.HSRPC, System.FLEXGEN):
        setups = setups_of(Cell(Case.HOST, "opt-30b", system), BUDGETS, 4)
        assert {setup.batch for setup in setups} == {largest}


def test_accelerate_runs_where_it_ends():
    """One cell with pageable weights and one with pinned, a few tokens, and they are said to be few."""
    cells = [cell for cell in all_cells(list(Case), MODELS, list(System)) if cell.system in ACCELERATE_STEPS]
    assert cells == [Cell(Case.HOST, "opt-6.7b", system) for system in (System.ACCELERATE, System.ACCELERATE_PINNED)]
    for cell, steps in zip(cells, (4, 8), strict=True):
        [setup] = setups_of(cell, BUDGETS, 4)
        assert setup.steps == steps
        assert f"{steps} of 128 tokens" in setup.key


def test_fewer_tokens_are_estimated_to_take_less():
    """The estimate covers loading and follows the tokens really made."""
    setup = flexgen(batch=128)
    short, full = estimated_seconds(replace(setup, steps=6)), estimated_seconds(setup)
    assert full - short == pytest.approx(122 * predicted_step(setup))
    assert short > sizes_of("opt-6.7b").model_bytes / 2.2e9


def test_the_limit_is_the_busier_of_bus_and_gpu():
    """Bytes over bandwidth where much is streamed, the device's memory where nothing is."""
    sizes = sizes_of("opt-6.7b")
    streamed = Traffic(batch=128, context=512, weights=10**10, cache=4 * 10**10)
    assert limit_seconds(streamed, sizes, HARDWARE) == pytest.approx(1.0)
    resident = Traffic(batch=24, context=512, weights=0, cache=0)
    expected = (sizes.layers_bytes + 24 * 513 * sizes.token_bytes(BlockKind.KV)) / 3e12
    assert limit_seconds(resident, sizes, HARDWARE) == pytest.approx(expected)
