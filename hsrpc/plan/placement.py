"""Choices of the weights that stay on the device, and the bytes that follow from each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsrpc.config import ResidentWeights
from hsrpc.plan.demand import AlikeExperts, Demand, choice_table_bytes
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.sizes import Floats, ModelSizes, PlacedSizes, Stays, TensorSizes, WeightBuffers
from hsrpc.schedule.sweep import BUFFERS

_PACKED_WORTH = 0.98
"""What stays is decoded in every step only where that gains more than 2 %: a smaller gain is within what predictions do
not tell apart."""
_ALL = 0.98
"""Where so much of what does not stay is spread, all is: tensors that just do not fit are no reason to use the bus."""
_FINE, _COARSE_STEP = 17, 4
"""With several GPUs so many of the smallest shares are tried, and every so many of the larger ones: each in three ways,
and a share of what they hold together goes further."""
_OPENED_STEP = 4
"""Every so many of the shares that are tried are for weights that are ready while all others stay packed."""
Resident = tuple[Stays, ...]
"""The weight tensors that stay on the device, for each layer."""


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """What stays of the layers' weights, and how the others come."""

    resident: Resident
    demand: Demand | None = None
    """Experts come on demand, and are not among the resident weights; None: all that does not stay streams."""

    @property
    def keeps_packed(self) -> bool:
        """Whether some weights that stay are decoded in every step."""
        return any(stays.packed for stays in self.resident)

    def keeps_all(self, sizes: ModelSizes) -> bool:
        """Whether nothing comes to a buffer."""
        both = zip(sizes.layers, self.resident, strict=True)
        return self.demand is None and all(layer.names == stays.names for layer, stays in both)

    @property
    def way(self) -> int:
        """How the weights lie: choices of one way differ in how many stay."""
        is_spread = any(stays.spread for stays in self.resident)
        return 4 * (self.demand is not None) + 2 * is_spread + self.keeps_packed

    def in_sizes(self, sizes: ModelSizes) -> ModelSizes:
        """The model with the weights that stay or stream."""
        return sizes if self.demand is None else sizes.without_experts


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    choices: tuple[WeightChoice, ...]
    way: npt.NDArray[np.int64]
    """`WeightChoice.way`."""
    resident: Floats
    """Bytes that stay, all layers, at most: a tensor that is ready is allocated by itself, without padding."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    spread: Floats
    """Bytes on each of several GPUs that are its pieces of what they hold together."""
    from_buses: Floats
    """Bytes that a GPU gets in every step of what the others have loaded."""
    from_devices: Floats
    """Bytes that it gets of what they hold."""
    on_bus_at_most: Floats
    """Bytes that cross it in a step that needs every expert."""
    decode_traffic: Floats
    """Bytes of device memory that decoding reads and writes in every step, but for experts."""
    expert_traffic: Floats
    """The same for all experts; a step decodes those that its tokens take."""
    spared_traffic: Floats
    """What a step of few rows saves of both."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them, and for what is decoded."""
    experts: Floats
    """Bytes on the device for experts that come on demand."""
    tables: Floats
    """Bytes on the device that say where experts lie, and which are decoded."""
    on_demand: Floats
    """1: experts come on demand; 0: they stay or stream."""
    missed: Floats
    """Part of the experts that have no slot, where they come on demand; else 0."""
    worth: Floats
    """Factor on the speed that is predicted, where choices are compared."""
    num_segments: Floats
    """Graphs of a decode step, where no weights stream."""

    @property
    def streams(self) -> npt.NDArray[np.bool_]:
        """Whether some weights come to a buffer in every step, over the bus or from devices that hold them."""
        found: npt.NDArray[np.bool_] = self.on_bus + self.spread > 0
        return found

    @classmethod
    def of(cls, sizes: ModelSizes, choices: Sequence[WeightChoice]) -> ResidentChoices:
        """What follows from each of the choices."""
        found = [_numbers(sizes, choice) for choice in choices]
        way = np.array([choice.way for choice in choices])
        return cls(tuple(choices), way, **{name: floats(each[name] for each in found) for name in found[0]})


def _numbers(sizes: ModelSizes, choice: WeightChoice) -> dict[str, float]:
    """What follows from one choice, as `ResidentChoices` has it of all."""
    placed, demand = count_placed(choice.in_sizes(sizes), choice.resident), choice.demand
    buffers = WeightBuffers.of(placed)
    bus = sum(n * each.bus_bytes for each, n in placed.items())
    expert_traffic = sum(n * each.expert_traffic for each, n in placed.items())
    found = {
        "resident": _at_most(placed, lambda each: each.resident_bytes),
        "on_bus": bus,
        "spread": float(sum(n * each.spread_bytes for each, n in placed.items())),
        "from_buses": sum(n * each.num_others * each.bus_bytes for each, n in placed.items()),
        "from_devices": float(sum(n * each.num_others * each.spread_bytes for each, n in placed.items())),
        "on_bus_at_most": bus,
        "decode_traffic": sum(n * each.decode_traffic for each, n in placed.items()),
        "expert_traffic": expert_traffic,
        "spared_traffic": sum(n * each.spared_traffic for each, n in placed.items()),
        "on_host": _at_most(placed, lambda each: each.host_bytes),
        "buffers": BUFFERS * buffers.packed + buffers.decoded,
        "experts": 0.0,
        "tables": choice_table_bytes(sizes) if expert_traffic else 0.0,
        "on_demand": 0.0,
        "missed": 0.0,
        "worth": _PACKED_WORTH if choice.keeps_packed else 1.0,
        "num_segments": 1.0,
    }
    if demand is None:
        return found
    return found | {
        "on_bus_at_most": bus + demand.missed * demand.host_bytes,
        "expert_traffic": demand.traffic,
        "on_host": found["on_host"] + demand.host_bytes,
        "buffers": found["buffers"] + demand.decoded_bytes,
        "experts": demand.device_bytes,
        "tables": demand.table_bytes + (choice_table_bytes(sizes) if demand.is_coded else 0),
        "on_demand": 1.0,
        "missed": demand.missed,
        "num_segments": demand.num_segments,
    }


def floats(values: Iterable[float]) -> Floats:
    """One number for each choice."""
    return np.array(list(values), dtype=np.float64)


def streaming_choices(
    sizes: ModelSizes, shares: Sequence[float], residence: ResidentWeights = ResidentWeights.AUTO
) -> list[WeightChoice]:
    """The weights that stay for each of the given shares of all layers' bytes, at most; all others stream.

    Those stay packed, or ready. Where all may stay, there is between both: some are ready, and the others packed.
    """
    found: list[Resident] = []
    for way in _ways(sizes, residence):
        found += (way.resident(sizes, int(share * way.total(sizes))) for share in sorted(shares))
        if way is _PACKED and residence is ResidentWeights.AUTO and 1.0 in shares:
            found += (all_stay(sizes, share) for share in sorted(shares)[::_OPENED_STEP])
    last = dict.fromkeys(reversed(found))  # of equal ones
    return [WeightChoice(resident) for resident in reversed(last)]


def spread_choices(
    sizes: ModelSizes, shares: Sequence[float], residence: ResidentWeights, hardware: Hardware
) -> list[WeightChoice]:
    """As `streaming_choices`, on several GPUs, which may hold weights together, a piece each.

    A byte of a device's memory keeps one byte from crossing the bus and coming from other GPUs, or as many as there are
    GPUs from crossing the bus. So for each share there are up to three divisions: spread is as much as makes the bus as
    quick as the gathering, as much as there is, or half way between. Which is best depends on what else a step does.
    """
    found = dict[WeightChoice, int]()
    """The number of each choice's division. Choices of one are neighbours."""
    for way in _ways(sizes, residence):
        total = way.total(sizes)
        for share in [*sorted(shares)[:_FINE], *sorted(shares)[_FINE::_COARSE_STEP]]:
            budget = int(share * total)
            for number, piece in enumerate(_pieces(sizes, way, budget, hardware)):
                found[_with_pieces(sizes, way.resident(sizes, budget - piece), piece)] = number
    staying = (choice for choice in streaming_choices(sizes, shares, residence) if choice.keeps_all(sizes))
    return list(dict.fromkeys((*sorted(found, key=found.__getitem__), *staying)))


def _pieces(sizes: ModelSizes, way: _Way, budget: int, hardware: Hardware) -> list[int]:
    """Bytes of the budget to try for pieces of what is spread, descending; what is left is for weights that stay."""
    gpus, total = sizes.num_gpus, way.total(sizes)
    packed = _PACKED.total(sizes) / total
    """Bytes of what comes to a buffer over those that it takes where it stays."""
    rest = packed * (total - budget)
    most = min(budget, int(rest / (gpus - packed)))
    load, gather = 1 / hardware.load_bandwidth, (gpus - 1) / hardware.gather_bandwidth
    even = rest * (load - gather) / ((gpus - packed) * load + packed * gather)
    least = min(most, max(0, int(even)))
    return sorted({least, (least + most) // 2, most}, reverse=True)


def _with_pieces(sizes: ModelSizes, resident: Resident, piece: int) -> WeightChoice:
    """The choice of weights that stay, and of a piece of `piece` bytes on each GPU of the others."""
    rest = sum(count * each.host_bytes for each, count in count_placed(sizes, resident).items())
    spread = min(1.0, piece / rest) if rest else 0.0
    return WeightChoice(tuple(stays._replace(spread=1.0 if spread > _ALL else spread) for stays in resident))


def demand_choices(
    sizes: ModelSizes, shares: Sequence[float], residence: ResidentWeights = ResidentWeights.AUTO
) -> list[WeightChoice]:
    """The same where experts come on demand; empty where they cannot.

    The other weights stay first, since every step needs them; then experts have slots, in which they lie packed.
    """
    experts = AlikeExperts.of(sizes)
    if experts is None:
        return []
    others, found = sizes.without_experts, dict[WeightChoice, None]()
    for way in _ways(others, residence):
        total = way.total(others)
        for share in sorted(shares):
            budget = int(share * (total + experts.num_bytes))
            found[WeightChoice(way.resident(others, min(budget, total)), experts.within(budget - total))] = None
    return list(found)


def count_placed(sizes: ModelSizes, resident: Resident) -> Counter[PlacedSizes]:
    """What the tensors of each layer take, and in how many layers they take the same."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    found: Counter[PlacedSizes] = Counter()
    for (kind, stays), count in alike.items():
        found[sizes.distinct[kind][0].placed(stays)] += count
    return found


def _at_most(placed: Counter[PlacedSizes], size: Callable[[PlacedSizes], float]) -> int:
    """Bytes of all layers, at most."""
    exact = sum(count * size(each) for each, count in placed.items())
    return math.ceil(round(exact, 3))  # what is rounded in the last place adds no byte


def even_resident(sizes: ModelSizes, budget: int) -> Resident:
    """Tensors that stay ready in each layer: at most `budget` bytes in all, the same part of each layer."""
    return tuple(map(Stays, _evenly(sizes, budget, _ready_bytes)))


def even_packed(sizes: ModelSizes, budget: int) -> Resident:
    """The same of tensors that stay packed, those that are coded."""
    both = zip(_evenly(sizes, budget, _packed_bytes), sizes.layers, strict=True)
    return tuple(Stays(ready=each - layer.coded, packed=each & layer.coded) for each, layer in both)


def all_stay(sizes: ModelSizes, share: float) -> Resident:
    """All tensors; ready are those that are not coded, and of the others at most that share of the room it takes."""
    opened = _evenly(sizes, int(share * _total(sizes, _room)), _room)
    both = zip(opened, sizes.layers, strict=True)
    return tuple(Stays(ready=layer.names - (layer.coded - each), packed=layer.coded - each) for each, layer in both)


def _ready_bytes(tensor: TensorSizes) -> int:
    return tensor.device_bytes


def _packed_bytes(tensor: TensorSizes) -> int:
    return math.ceil(tensor.host_bytes)


def _room(tensor: TensorSizes) -> int:
    """Bytes more that it takes ready."""
    return max(0, _ready_bytes(tensor) - _packed_bytes(tensor))


def _total(sizes: ModelSizes, cost: Callable[[TensorSizes], int]) -> int:
    return sum(count * sum(map(cost, layer.tensors)) for layer, count in sizes.distinct)


class _Way(NamedTuple):
    """How weights lie that stay."""

    resident: Callable[[ModelSizes, int], Resident]
    """Those that stay within a budget."""
    num_bytes: Callable[[TensorSizes], int]

    def total(self, sizes: ModelSizes) -> int:
        """Bytes of all layers."""
        return _total(sizes, self.num_bytes)


_READY, _PACKED = _Way(even_resident, _ready_bytes), _Way(even_packed, _packed_bytes)


def _ways(sizes: ModelSizes, residence: ResidentWeights) -> list[_Way]:
    """Those to try; of two that are equal the later one is taken."""
    if not any(layer.coded for layer, _ in sizes.distinct) or residence is ResidentWeights.DECODED:
        return [_READY]
    return [_PACKED] if residence is ResidentWeights.PACKED else [_PACKED, _READY]


def _evenly(sizes: ModelSizes, budget: int, cost: Callable[[TensorSizes], int]) -> list[frozenset[str]]:
    """Tensors of each layer that cost at most `budget` in all, the same part in each layer.

    Layer by layer, largest first, the tensors are taken that keep the running total within the budget's part so far.
    """
    costs = [[(tensor.name, cost(tensor)) for tensor in layer.largest_first] for layer, _ in sizes.distinct]
    wholes = [sum(each for _, each in layer) for layer in costs]
    total = sum(wholes[kind] for kind in sizes.kinds)
    chosen: list[frozenset[str]] = []
    spent = passed = 0
    for kind in sizes.kinds:
        names = []
        passed += wholes[kind]
        limit = budget * passed // max(1, total)
        for name, each in costs[kind]:
            if spent + each <= limit:
                names.append(name)
                spent += each
        chosen.append(frozenset(names))
    return chosen
