"""The loader of experts: where the tables say that experts lie, there they lie."""

from __future__ import annotations

import pytest
import torch

from hsrpc.device.device import CpuDevice
from hsrpc.engine.tasks.experts import ExpertCounts, ExpertLoader
from hsrpc.engine.weights import HostExperts, PackedTensor, arrange
from hsrpc.model.formats.plain import PlainPacking
from hsrpc.plan.demand import Demand
from hsrpc.plan.memory_use import DeviceUse

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
    demand = Demand(slots=slots, counts=(NUM_EXPERTS, 0, NUM_EXPERTS), k=2, expert_bytes=size, num_tensors=20)
    return ExpertLoader(layers, demand, device, TABLES, max_tokens=3)


@pytest.mark.parametrize("slots", range(NUM_EXPERTS + 1))
def test_tables_and_weights_are_those_of_the_chosen(slots: int, device: CpuDevice) -> None:
    """At every number of slots, layer after layer, also those that found none."""
    loader = loader_of(device, slots)
    opened = {layer: loader.with_experts(layer, {"norm": torch.ones(1)}) for layer in (0, 2)}
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
    w = loader.with_experts(0, {})
    assert len(set(w["ins"].tolist())) == len(set(w["outs"].tolist())) == 1
    assert w["outs"][0] - w["ins"][0] == 256  # the second tensor's place in an expert's piece
    assert loader.counts == ExpertCounts()
