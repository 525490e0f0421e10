"""A step's time by its list of operations: bus and GPU as the tasks will use them, buffer by buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.plan import Plan, StepPrediction
from hsrpc.plan.sizes import ModelSizes
from hsrpc.plan.step_time import multiplies_few
from hsrpc.schedule.simulate import steady
from hsrpc.schedule.sweep import BatchShape, LayerPlacement, Op, OpKind, OpList, Places, sweep


def simulated_step(plan: Plan, sizes: ModelSizes, step: StepPrediction, *, recomputes: bool) -> float:
    """Seconds of bus and GPU for a step in the middle of many, whose parts take as long as `step` says.

    Each mini-batch has an equal part of all that is not the weights', also of the tokens that it `recomputes`; of the
    cached tokens' part a layer has as much as its window shows. The step's own time is not looked at.
    """
    places = placements(plan, sizes)
    # Mini-batches of a decode step go through the weights together; those with whole requests that recompute cannot.
    num_groups = step.mini_batches if recomputes else 1
    shapes = (BatchShape(number % num_groups, True, step.regenerate > 0, True) for number in range(step.mini_batches))
    batches = tuple(shapes)
    seconds = _OpSeconds.of(plan, LayerTimes(sizes, plan.hardware), step, num_groups)

    def repeat(ops: OpList) -> OpList:
        return sweep(places, batches, ops.carries)

    return steady(sweep(places, batches), repeat, seconds).seconds


def placements(plan: Plan, sizes: ModelSizes) -> Places:
    """Where each layer's weights are, as planned."""
    counts = (0,) * len(plan.placed) if plan.demand is None else plan.demand.counts
    return tuple(
        LayerPlacement(
            bus_bytes=round(layer.bus_bytes),
            is_coded=layer.decode_traffic > 0 or sizes.layers[number].coded_weight_bytes > 0,
            has_coded_experts=plan.expert_traffic[number] > 0,
            rebuilds=number not in plan.kv_layers,
            on_demand=counts[number] > 0,
            is_gathered=plan.num_gpus > 1 and layer.bus_bytes > 0,
            spread_bytes=layer.spread_bytes,
        )
        for number, layer in enumerate(plan.placed)
    )


@dataclass(frozen=True, slots=True)
class _OpSeconds:
    """Seconds of each operation; those of a mini-batch are of one layer."""

    load_bandwidth: float
    gather: Mapping[OpKind, Sequence[float]]
    """For each layer."""
    decode: Sequence[float]
    """For each layer."""
    decode_experts: Sequence[float]
    """For each layer, of one group."""
    seen: Sequence[float]
    """For each layer, the cached tokens that it sees over those that layers see on average."""
    blocks: float
    """On average over the layers, as `rebuild`, `place` and `attend`."""
    rebuild: float
    place: float
    attend: float
    group: float
    """Projections and the rest of a layer, all but attention."""
    head: float
    experts: float
    """In a layer that has some."""

    @classmethod
    def of(cls, plan: Plan, layer: LayerTimes, step: StepPrediction, num_groups: int) -> _OpSeconds:
        """Parts of a step divided among its operations."""
        traffic = zip(plan.placed, layer.sizes.layers, strict=True)
        queries = step.batch * (1 + step.drafts)
        spared = float(multiplies_few(layer.sizes, queries, step.regenerate > 0 or num_groups > 1))
        decoded = ((max(0.0, one.decode_traffic - spared * one.spared_traffic), sizes) for one, sizes in traffic)
        decode = [float(layer.decode_weights(size + sizes.coding_traffic)) for size, sizes in decoded]
        tokens = queries if num_groups == 1 else step.batch * step.context  # recomputed ones
        experts = [float(layer.decode_experts(traffic, tokens)) for traffic in plan.expert_traffic]
        weights = float(layer.load(sum(each.bus_bytes for each in plan.placed)))
        each = len(plan.placed) * step.mini_batches
        layers = layer.sizes.layers
        parts = [sizes.seen_part(step.context) for sizes in layers]
        return cls(
            load_bandwidth=plan.hardware.load_bandwidth,
            gather={
                OpKind.GATHER: [float(layer.gather_weights(one.num_others * one.bus_bytes)) for one in plan.placed],
                OpKind.GATHER_SPREAD: [
                    float(layer.gather_weights(one.num_others * one.spread_bytes)) for one in plan.placed
                ],
            },
            decode=decode,
            decode_experts=[seconds / num_groups for seconds in experts],
            seen=[len(parts) * part / sum(parts) for part in parts],
            blocks=max(0.0, step.bus - weights) / each,
            rebuild=step.regenerate / each,
            place=step.gather / each,
            attend=step.attention / each,
            group=(step.forward - sum(decode) - sum(experts)) / (len(plan.placed) * num_groups),
            head=step.head,
            experts=step.experts / (num_groups * max(1, sum(layer.experts is not None for layer in layers))),
        )

    def __call__(self, op: Op) -> float:
        match op.kind:
            case OpKind.LOAD_WEIGHTS:
                return (op.part[1] - op.part[0]) / self.load_bandwidth
            case OpKind.GATHER | OpKind.GATHER_SPREAD:
                return self.gather[op.kind][op.layer]
            case OpKind.LOAD_BLOCKS:
                return self.blocks * self.seen[op.layer]
            case OpKind.LOAD_EXPERTS:
                return self.experts
            case OpKind.DECODE:
                return self.decode[op.layer]
            case OpKind.DECODE_EXPERTS:
                return self.decode_experts[op.layer]
            case OpKind.PLACE:
                return self.place * self.seen[op.layer]
            case OpKind.REBUILD:
                return self.rebuild * self.seen[op.layer]
            case OpKind.ATTEND:
                return self.attend * self.seen[op.layer]
            case OpKind.FINISH:
                return self.group
            case OpKind.HEAD:
                return self.head
            case _:
                return 0.0
