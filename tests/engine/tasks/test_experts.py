"""The loader of experts: where the tables say that experts lie, there they lie."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from hsrpc.device.device import CpuDevice
from hsrpc.engine.chosen_experts import ChosenExperts
from hsrpc.engine.tasks.experts import ExpertCounts, ExpertLoader
from hsrpc.engine.weights import HostExperts, OpenedLayer, PackedTensor, arrange
from hsrpc.model.formats.codes import Code, CodedMatrix
from hsrpc.model.formats.plain import PlainPacking
from hsrpc.model.formats.scaled import ScaledPacking
from hsrpc.plan.demand import Demand
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.sizes import align

NUM_EXPERTS, SHAPES = 5, ((6, 4), (4, 3))
TABLES = ("ins", "outs")


def host_experts(layer: int) -> HostExperts:
    """Each expert's values are its number, in the second tensor's negative."""
    parts: dict[str, tuple[int, PackedTensor]] = {}
    for expert in range(NUM_EXPERTS):
        placed, size = arrange((f"{expert} {i}", PlainPacking(shape, torch.float32)) for i, shape in enumerate(SHAPES))
        parts |= {part.name: (expert, part) for part in placed}
    memory = torch.empty((NUM_EXPERTS, size), dtype=torch.uint8)
    for name, (expert, part) in parts.items():
        sign = -1 if name.endswith("1") else 1
        part.open(memory[expert], memory[0, :0]).fill_(sign * (10 * layer + expert))
    return HostExperts(memory, parts)


@pytest.fixture
def device() -> CpuDevice:
    return CpuDevice()


def loader_of(device: CpuDevice, slots: int) -> ExpertLoader:
    """Two layers with experts, and one without between them."""
    layers = [host_experts(0), None, host_experts(2)]
    size = layers[0].memory.shape[1]
    counts = (NUM_EXPERTS, 0, NUM_EXPERTS)
    demand = Demand(slots=slots, counts=counts, k=2, expert_bytes=size, ready_bytes=size, num_tensors=20)
    return ExpertLoader(layers, demand, device, TABLES, max_tokens=3)


def opened_by(loader: ExpertLoader, layer: int, **others: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Experts that lie ready in their rows."""
    return loader.open(layer, OpenedLayer(others, ()), torch.empty(0, dtype=torch.uint8), None).tensors


@pytest.mark.parametrize("slots", range(NUM_EXPERTS + 1))
def test_tables_and_weights_are_those_of_the_chosen(slots: int, device: CpuDevice) -> None:
    """At every number of slots, layer after layer, also those that found none."""
    loader = loader_of(device, slots)
    opened = {layer: opened_by(loader, layer, norm=torch.ones(1)) for layer in (0, 2)}
    base, loads = device.allocated[DeviceUse.EXPERTS], 0
    for chosen in ([[0, 1]], [[1, 2], [1, 4]], [[0, 1], [2, 3], [4, 0]], [[3, 3]], [[2, 0]]):
        for layer, w in opened.items():
            loader.expect(len(chosen)).copy_(torch.tensor(chosen))
            loads += loader.load(layer) // 512
            for expert in {each for row in chosen for each in row}:
                for i, table in enumerate(TABLES):
                    weight = w[f"{expert} {i}"]
                    assert weight.shape == SHAPES[i]
                    assert (weight == (1 - 2 * i) * (10 * layer + expert)).all()
                    assert w[table][expert] == weight.data_ptr()
    assert loader.counts.loads == loads
    assert loader.counts.hits == 2 * (2 + 3 + 5 + 1 + 2) - loads
    assert loader.counts.loaded_bytes == 512 * loads
    assert base == (2 * slots + NUM_EXPERTS - slots) * 512
    assert w["norm"] == 1
    with pytest.raises(KeyError):
        w["no such weight"]


def test_every_address_can_be_read_before_anything_is_loaded(device: CpuDevice) -> None:
    """Kernels are compiled by running them on what is there."""
    loader = loader_of(device, 1)
    w = opened_by(loader, 0)
    assert len(set(w["ins"].tolist())) == len(set(w["outs"].tolist())) == 1
    assert w["outs"][0] - w["ins"][0] == 256  # the second tensor's place in an expert's piece
    assert loader.counts == ExpertCounts()


MATRIX = CodedMatrix(rows=6, columns=8, code=Code.UINT4, block=(1, 4))
PACKING = ScaledPacking(MATRIX.shape, torch.float32, (MATRIX,))


def coded_experts(values: torch.Tensor) -> HostExperts:
    """Each expert has one tensor, whose scales [E] are its value, and whose codes are 1."""
    parts: dict[str, tuple[int, PackedTensor]] = {}
    for expert in range(len(values)):
        (part,), size = arrange([(str(expert), PACKING)])
        parts[part.name] = (expert, part)
    memory = torch.zeros((len(values), size), dtype=torch.uint8)
    for name, (expert, part) in parts.items():
        [found] = PACKING.parts(part.data(memory[expert]))
        found.codes.fill_(0x11)
        found.scales.fill_(values[int(name)])
    return HostExperts(memory, parts)


@pytest.mark.parametrize("slots", range(NUM_EXPERTS + 1))
def test_chosen_experts_are_decoded_once_from_where_they_lie(slots: int, device: CpuDevice) -> None:
    """At every number of slots, layer after layer; those that are not chosen are not touched."""
    values = torch.randn(2, NUM_EXPERTS)
    layers = [coded_experts(each) for each in values]
    size, ready = layers[0].memory.shape[1], align(PACKING.decoded_bytes)
    demand = Demand(
        slots=slots,
        counts=(NUM_EXPERTS, NUM_EXPERTS),
        k=2,
        expert_bytes=size,
        ready_bytes=ready,
        decode_traffic=1.0,
        num_tensors=2 * NUM_EXPERTS,
    )
    loader, chosen = ExpertLoader(layers, demand, device, TABLES, max_tokens=2), ChosenExperts(device, NUM_EXPERTS)
    decoded = torch.empty(demand.decoded_bytes, dtype=torch.uint8)
    opened = [loader.open(layer, OpenedLayer({}, ()), decoded, chosen) for layer in (0, 1)]
    groups = [[[0, 1]], [[1, 2], [1, 4]], [[3, 3]]]
    for number in range(6):
        layer = opened[number % 2]
        decoded.fill_(255)
        seen: set[int] = set()
        for group in groups:
            routes, is_first = torch.tensor(group), not seen
            loader.expect(len(routes)).copy_(routes)
            loader.load(number % 2)
            for expert in seen:
                layer.tensors[str(expert)].fill_(5.0)  # a second time is seen
            layer.experts.run(routes, is_first=is_first)
            for expert in range(NUM_EXPERTS):
                weight = layer.tensors[str(expert)]
                if expert in seen:
                    assert (weight == 5.0).all()
                elif expert in routes:
                    assert (weight == values[number % 2, expert]).all()
                else:
                    assert weight.isnan().all()
            seen |= set(routes.unique().tolist())
    assert device.allocated[DeviceUse.EXPERTS] == demand.device_bytes
