"""The kernels of mixtures of experts against a plain loop over them."""

from __future__ import annotations

import pytest
import torch

from hsrpc.device.device import CpuDevice
from hsrpc.engine.chosen_experts import ChosenExperts
from hsrpc.engine.tasks.experts import ExpertLoader
from hsrpc.engine.weights import HostExperts, OpenedLayer, PackedTensor, arrange
from hsrpc.model.experts import CORRECTION, ROUTER, Experts, Routing, Scoring, expert_in, expert_out
from hsrpc.model.families.decoder import Decoder
from hsrpc.model.family import Routes
from hsrpc.model.formats.plain import PlainPacking
from hsrpc.model.kernels import experts as kernels
from hsrpc.model.kernels.experts import FEW, MANY, SOME, Tiles, choose_tiles, route, sort_choices
from hsrpc.model.layers import Activation, ClampedGate, Gate
from hsrpc.plan.demand import Demand

SIZE = 80
SMALL_TILES = Tiles(16, 32, 32, 4, 1)
"""Many tiles of few rows: several for an expert, also in groups."""


def mixture(count: int, k: int, width: int, gate: Gate = Activation.SILU, bias: bool = False) -> Experts:
    return Experts(count=count, k=k, width=width, gate=gate, routing=Routing(), bias=bias)


def weights_of(experts: Experts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    w = {}
    for e in range(experts.count):
        w[expert_in(e)] = (torch.randn(2 * experts.width, SIZE) / SIZE**0.5).to(dtype)
        w[expert_out(e)] = (torch.randn(SIZE, experts.width) / experts.width**0.5).to(dtype)
    if experts.bias:
        w["experts_in_bias"] = torch.randn(experts.count, 2 * experts.width).to(dtype)
        w["experts_out_bias"] = torch.randn(experts.count, SIZE).to(dtype)
    return w | experts.tables(w)


def routes_of(chosen: torch.Tensor) -> Routes:
    return Routes(torch.rand(chosen.shape) + 0.1, chosen)


def choices(n: int, count: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(count)[:k] for _ in range(n)]) if n else torch.empty((0, k), dtype=torch.int64)


def check(experts: Experts, chosen: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Both ways give the same; x has rows with a stride."""
    w, routes = weights_of(experts, dtype), routes_of(chosen)
    x = torch.randn(len(chosen), 2 * SIZE).to(dtype)[:, :SIZE]
    found, wanted = experts.on_gpu(w, x, routes), experts.one_by_one(w, x, routes)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "count", "k"), [(1, 8, 2), (3, 16, 16), (40, 5, 2), (130, 3, 1), (0, 4, 2), (7, 1, 1)])
def test_products_equal_a_loop(n: int, count: int, k: int, dtype: torch.dtype) -> None:
    """More and fewer tokens than experts, all of them or one, sizes that end within a tile."""
    torch.manual_seed(n)
    check(mixture(count, k, 24), choices(n, count, k), dtype)


@pytest.mark.parametrize("slots", [0, 2, 6])
def test_experts_on_demand_are_found_by_their_tables(slots: int) -> None:
    """In slots and beyond them, step after step, while others take their places."""
    torch.manual_seed(3)
    experts, parts = mixture(6, 2, 24), dict[str, tuple[int, PackedTensor]]()
    w = weights_of(experts, torch.float32)
    for number, names in enumerate(experts.expert_names):
        placed, size = arrange((name, PlainPacking(tuple(w[name].shape), torch.float32)) for name in names)
        parts |= {part.name: (number, part) for part in placed}
    memory = torch.zeros((experts.count, size), dtype=torch.uint8)
    for name, (number, part) in parts.items():
        part.open(memory[number], memory[0, :0]).copy_(w[name])
    demand = Demand(
        slots=slots, counts=(experts.count,), k=2, expert_bytes=size, ready_bytes=size, num_tensors=2 * experts.count
    )
    layers = [HostExperts(memory, parts)]
    loader = ExpertLoader(layers, demand, CpuDevice(), Decoder.expert_tables, max_tokens=40)
    opened = loader.open(0, OpenedLayer({}, ()), memory[0, :0], None).tensors
    for n in (1, 3, 40, 2):
        routes, x = routes_of(choices(n, experts.count, experts.k)), torch.randn(n, SIZE)
        loader.expect(n).copy_(routes.chosen)
        loader.load(0)
        wanted = experts.one_by_one(w, x, routes)
        torch.testing.assert_close(experts.on_gpu(opened, x, routes), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(experts.one_by_one(opened, x, routes), wanted)


@pytest.mark.parametrize("count", [1, 6, 40])
def test_experts_are_marked_as_on_the_cpu(count: int) -> None:
    """Those that groups choose, one after the other, each once a step; steps of one token and of many."""
    tables, places = ChosenExperts(CpuDevice(), count), torch.randint(100, (count,))
    moves, decoded = torch.zeros_like(places), torch.zeros_like(places)
    k = min(2, count)
    for n, is_first in ((1, True), (3, False), (40, False), (1, True), (2, True)):
        chosen = choices(n, count, k)
        tables.mark(chosen, places, is_first=is_first)
        kernels.mark(chosen, places, moves, decoded, is_first=is_first)
        assert torch.equal(moves, tables.moves)
        assert ((moves < 0) | (moves == places)).all()


@pytest.mark.parametrize("tiles", [FEW, SOME, MANY, SMALL_TILES], ids=["few", "some", "many", "small"])
def test_all_tiles_compute_the_same(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an expert has more rows than a tile, and more tiles than a group."""
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    torch.manual_seed(1)
    check(mixture(6, 2, 72), choices(100, 6, 2))


@pytest.mark.parametrize("gate", [Activation.GELU, Activation.RELU2, ClampedGate(1.0, 1.702)])
def test_gates_and_biases(gate: Gate) -> None:
    """Each expert has its own, and so have experts that nobody chooses."""
    torch.manual_seed(2)
    check(mixture(6, 2, 24, gate, bias=True), choices(20, 6, 2))


@pytest.mark.parametrize("chosen", [[[3, 0]] * 20, [[0, 1], [4, 5]], [[5, 5], [5, 5]]])
def test_experts_that_nobody_chooses(chosen: list[list[int]]) -> None:
    """In front, between and behind the others."""
    check(mixture(6, 2, 24), torch.tensor(chosen))


def test_a_table_says_where_the_weights_lie() -> None:
    """Another address in it, and the same launch computes with other weights."""
    torch.manual_seed(3)
    experts, chosen = mixture(4, 2, 24), choices(9, 4, 2)
    w, routes, x = weights_of(experts, torch.float32), routes_of(chosen), torch.randn(9, SIZE)
    w["expert_in_table"][1] = w["expert_in_table"][2].clone()
    found = experts.on_gpu(w, x, routes)
    w[expert_in(1)] = w[expert_in(2)]
    torch.testing.assert_close(found, experts.one_by_one(w, x, routes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 700, 4100])
def test_choices_are_sorted(n: int) -> None:
    """By expert, then in order: as a stable sort of any number of them."""
    chosen = torch.randint(0, 5, (n, 2), generator=torch.Generator().manual_seed(n)) * 2
    rows, counts = sort_choices(chosen, 10)
    assert torch.equal(rows.long(), chosen.flatten().argsort(stable=True))
    assert torch.equal(counts.long(), chosen.flatten().bincount(minlength=10))


def test_tiles_are_chosen_by_the_rows_of_an_expert() -> None:
    """Experts of Qwen3-30B-A3B, with 128 experts of which 8 are taken: by tokens."""
    assert [choose_tiles(8 * n, 128) for n in (1, 256, 1024, 8192)] == [FEW, FEW, SOME, MANY]


ROUTINGS = [
    Routing(),
    Routing(renormalised=True, scale=2.5),
    Routing(scoring=Scoring.CHOSEN_SOFTMAX),
    Routing(scoring=Scoring.SIGMOID, renormalised=True, corrected=True, scale=0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "k"), [(8, 2), (60, 4), (5, 5), (3, 1)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routes_are_those_of_torch(routing: Routing, count: int, k: int, dtype: torch.dtype) -> None:
    """The same experts in the same order, and their weights, of any number of experts."""
    logits = torch.stack([torch.randperm(count) for _ in range(9)]).to(dtype) / 4 - 1
    w = {ROUTER.weight: torch.eye(count, dtype=dtype), CORRECTION: torch.randn(count) if routing.corrected else None}
    found, wanted = route(logits, w[CORRECTION], routing, k), routing.of(w, logits, k)
    assert torch.equal(found.chosen, wanted.chosen)
    torch.testing.assert_close(found.weights, wanted.weights, atol=1e-6, rtol=2e-3 if dtype is torch.float16 else 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_of_equal_experts_the_first_are_chosen() -> None:
    """And numbers that are none choose experts that there are."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [torch.nan] * 5])
    chosen = route(logits, None, Routing(), 2).chosen
    assert chosen[0].tolist() == [1, 2]
    assert ((chosen[1] >= 0) & (chosen[1] < 5)).all()
    assert route(logits[:0], None, Routing(), 2).chosen.shape == (0, 2)
