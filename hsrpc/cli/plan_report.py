"""What hsrpc plan says of a plan: tables for people, and one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hsrpc.config import ExpertLoading, format_bytes, format_rate
from hsrpc.engine.startup import Planned
from hsrpc.plan.advice import Advice, best_advice
from hsrpc.plan.expert_outlook import ExpertOutlook, expert_outlook
from hsrpc.plan.forecast import FirstToken, first_token, rates_by_batch
from hsrpc.plan.layer_times import rebuild_rate
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan, StepPrediction
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import PoolId, Tier

_PACKED = "of those on the device, packed"
"""Weights that are decoded in every step; a row of plans in which there are some."""
_SPREAD = "of those on the device, pieces of what is spread"
"""Weights that several GPUs hold together; a row of plans in which there are some."""


@dataclass(frozen=True, slots=True)
class Report:
    """A plan, and what follows from it."""

    planned: Planned
    by_batch: list[StepPrediction]
    first_token: FirstToken
    experts: ExpertOutlook | None
    """None: the model has none."""

    @classmethod
    def of(cls, planned: Planned) -> Report:
        plan, sizes = planned.plan, planned.spec.sizes
        return cls(
            planned,
            rates_by_batch(plan, sizes),
            first_token(plan, sizes, planned.planner.traffic),
            expert_outlook(planned.question, sizes, plan),
        )

    def print(self) -> None:
        """All but the advice."""
        spec, plan, console = self.planned.spec, self.planned.plan, Console()
        weights = format_bytes(spec.sizes.model_bytes)
        name, machine = escape(spec.name), escape(self.planned.question.machine.name)
        console.print(f"[bold]{name}[/] ({spec.family}) on {machine}: {weights} of weights", highlight=False)
        if plan.num_gpus > 1:
            console.print(f"{plan.num_gpus} GPUs share one stream of weights: all but this table is of each of them")
            console.print(_gpus_table(_gpus(plan)))
        console.print(f"cache policy [bold]{plan.policy}[/]: {plan.reason}")
        if plan.drafts.reason:
            console.print(f"drafts: {plan.drafts.reason}")
        console.print(_places_table(plan))
        console.print(_memory_table("device memory", plan.device_bytes, plan.budgets.device))
        console.print(_memory_table("host memory", plan.host_bytes, plan.budgets.host))
        console.print(_blocks_table(plan))
        console.print(_prediction_table(plan, spec.sizes))
        if self.experts is not None:
            console.print(_experts_table(self.experts, plan.num_gpus))
        console.print(_batches_table(self.by_batch))
        console.print(_first_token_table(self.first_token))

    def print_advice(self, advice: Sequence[Advice]) -> None:
        """The changes that help most."""
        best = best_advice(advice)
        console = Console()
        if not best:
            console.print("nothing that was tried would help: " + ", ".join(each.name for each in advice))
            return
        table = _table("what would help most", "", "tokens/s, prompts coming in", "gain")
        for each in best:
            table.add_row(each.name, f"{each.tokens_per_second:.1f}", f"{each.gain:+.0%}")
        console.print(table)

    def as_json(self, advice: Sequence[Advice] | None) -> dict[str, object]:
        """All of it as one object; without `advice`, null in its place."""
        plan, machine = self.planned.plan, self.planned.question.machine
        return {
            "model": self.planned.spec.name,
            "machine": {
                "name": machine.name,
                "kind": machine.kind.value,
                "device_memory": machine.device_memory,
                "host_memory": machine.host_memory,
                "dtype": machine.dtype,
            },
            "gpus": plan.num_gpus,
            "each_gpu": [asdict(gpu) for gpu in _gpus(plan)],
            **_plan_json(plan),
            "places": {name: place.as_json() for name, place in _places(plan).items()},
            "prediction": _prediction_json(plan.prediction),
            "by_batch": [_prediction_json(step) for step in self.by_batch],
            "first_token": {
                "prompt_tokens": self.first_token.prompt,
                "idle_seconds": self.first_token.idle,
                "loaded_seconds": self.first_token.loaded,
            },
            "experts": self.experts and asdict(self.experts),
            "advice": None if advice is None else [asdict(each) for each in advice],
            "hardware": asdict(plan.hardware),
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """What of something lies on the device and on the host."""

    device_bytes: int
    host_bytes: int
    device_share: float
    """Part of it, by what it takes on the device; in [0, 1]."""

    def cells(self) -> list[str]:
        parts = (self.device_bytes, self.device_share), (self.host_bytes, 1 - self.device_share)
        return [f"{format_bytes(size)}, {share:.0%}" if share else "" for size, share in parts]

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def _places(plan: Plan) -> dict[str, _Place]:
    """Weights by their bytes, the cache by the tokens that its blocks hold."""
    blocks = {tier: sum(n for pool, n in plan.num_blocks.items() if pool.tier is tier) for tier in Tier}
    num_blocks = sum(blocks.values())
    device, host = plan.device_bytes, plan.host_bytes
    kept, spread = plan.kept_bytes, device.get(DeviceUse.SPREAD_WEIGHTS, 0)
    weights = device[DeviceUse.RESIDENT_WEIGHTS] + spread
    return {
        "embeddings and head": _Place(device[DeviceUse.FIXED], 0, 1.0),
        "layers' weights": _Place(weights, host[HostUse.STREAMED_WEIGHTS], plan.resident_share + plan.spread_share),
        **({_PACKED: _Place(kept, 0, kept / weights)} if kept else {}),
        **({_SPREAD: _Place(spread, 0, spread / weights)} if spread else {}),
        "cache": _Place(
            device[DeviceUse.CACHE_BLOCKS],
            host[HostUse.CACHE_BLOCKS],
            blocks[Tier.DEVICE] / num_blocks if num_blocks else 1.0,
        ),
    }


@dataclass(frozen=True, slots=True)
class _GpuShare:
    """What one of the GPUs holds and does; that of all is their sum."""

    device_bytes: int
    host_bytes: int
    requests: int
    """At once, at most."""
    blocks: int
    loaded_weight_bytes: int
    """Over its own bus in a step."""
    tokens_per_second: float


def _gpus(plan: Plan) -> list[_GpuShare]:
    """By number; all have one plan."""
    share = _GpuShare(
        device_bytes=sum(plan.device_bytes.values()),
        host_bytes=sum(plan.host_bytes.values()),
        requests=plan.max_batch,
        blocks=sum(plan.num_blocks.values()),
        loaded_weight_bytes=round(sum(layer.bus_bytes for layer in plan.placed)),
        tokens_per_second=plan.prediction.tokens_per_second,
    )
    return [share] * plan.num_gpus


def _gpus_table(shares: Sequence[_GpuShare]) -> Table:
    table = _table("the GPUs", "", "device", "host", "requests", "blocks", "weights a step", "tokens/s")
    whole = _GpuShare(*(sum(parts) for parts in zip(*map(astuple, shares), strict=True)))
    for name, share in (*((str(number), share) for number, share in enumerate(shares)), ("all", whole)):
        if share is whole:
            table.add_section()
        table.add_row(
            name,
            format_bytes(share.device_bytes),
            format_bytes(share.host_bytes),
            str(share.requests),
            str(share.blocks),
            format_bytes(share.loaded_weight_bytes),
            f"{share.tokens_per_second:.1f}",
        )
    return table


def _is_coded(plan: Plan) -> bool:
    """Whether weights cross the bus in fewer bytes than they have."""
    gpus = plan.num_gpus
    return any(round(gpus * (layer.bus_bytes + layer.spread_bytes)) < layer.streamed_bytes for layer in plan.placed)


def _places_table(plan: Plan) -> Table:
    table = _table("what lies where", "", "device", "host")
    for name, place in _places(plan).items():
        table.add_row(name, *place.cells())
    return table


def _memory_table(title: str, parts: Mapping[DeviceUse, int] | Mapping[HostUse, int], budget: int) -> Table:
    table = _table(title, "", "size")
    for use, size in parts.items():
        table.add_row(use.value, format_bytes(size))
    table.add_section()
    table.add_row("all", format_bytes(sum(parts.values())))
    table.add_row("budget", format_bytes(budget))
    return table


def _blocks_table(plan: Plan) -> Table:
    table = _table(f"cache blocks of {plan.block_size} tokens", "", "device", "host")
    counts = plan.num_blocks
    table.add_row("K and V", str(counts[PoolId.DEVICE_KV]), str(counts[PoolId.HOST_KV]))
    table.add_row("activations", str(counts[PoolId.DEVICE_ACTIVATION]), str(counts[PoolId.HOST_ACTIVATION]))
    return table


def _prediction_table(plan: Plan, sizes: ModelSizes) -> Table:
    step, hardware = plan.prediction, plan.hardware
    table = _table("a decode step, predicted", "", "")
    rows = {
        "longest request, tokens": str(plan.max_model_len),
        "requests, tokens of each": f"{step.batch}, {step.context}",
        "of these shared by all": str(plan.shared_prefix),
        "mini-batches": str(step.mini_batches),
        "activation share": f"{plan.activation_share:.2f}",
        "cached tokens": plan.cache_format.value,
        "tokens recomputed": str(plan.recompute.tokens),
        **_draft_rows(step),
        "weights resident": f"{plan.resident_share:.0%}",
        **({"weights spread over all GPUs": f"{plan.spread_share:.0%}"} if plan.spread_share else {}),
        "weights that stay": "packed, decoded in every step" if plan.kept_bytes else "as they are multiplied",
        "weights that stream": "coded" if _is_coded(plan) else "as they are",
        f"bus ({format_rate(hardware.load_bandwidth, 'B/s')})": _ms(step.bus),
        **(
            {f"from other GPUs ({format_rate(hardware.gather_bandwidth, 'B/s')})": _ms(step.peers)}
            if step.peers
            else {}
        ),
        "forward": _ms(step.forward),
        f"regeneration ({format_rate(rebuild_rate(sizes.commonest, hardware), 'FLOP/s')})": _ms(step.regenerate),
        "gathering activations": _ms(step.gather),
        f"attention ({format_rate(hardware.attention_bandwidth, 'B/s')})": _ms(step.attention),
        "logits": _ms(step.head),
        **({"experts on demand": _ms(step.experts)} if plan.demand else {}),
        "launching, on the host": _ms(step.launch),
        "between steps": _ms(step.boundary),
        "step": _ms(step.step),
        f"step beside {plan.max_prefill_tokens} prompt tokens": _ms(step.longest_step),
        "mean step, prompts coming in": _ms(step.mean_step),
        "throughput": f"{step.tokens_per_second:.1f} tokens/s",
        "throughput, prompts coming in": f"{step.mean_tokens_per_second:.1f} tokens/s",
    }
    if plan.num_gpus > 1:
        rows |= {
            "throughput of all GPUs": f"{plan.num_gpus * step.tokens_per_second:.1f} tokens/s",
            "the same, prompts coming in": f"{plan.num_gpus * step.mean_tokens_per_second:.1f} tokens/s",
        }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _draft_rows(step: StepPrediction) -> dict[str, str]:
    if not step.drafts:
        return {}
    return {
        "tokens drafted for each request": str(step.drafts),
        "tokens of a step for each request": f"{step.tokens_per_request:.2f}",
    }


def _experts_table(found: ExpertOutlook, num_gpus: int) -> Table:
    table = _table("experts", "", "")
    if found.loading is ExpertLoading.DEMAND:
        table.add_row("they come", "on demand")
        table.add_row("slots of a layer", f"{found.slots} for {found.count} experts")
        table.add_row("hits, if all are as likely", f"{found.hit_rate:.0%}")
    else:
        table.add_row("they come", "all in every step, but those resident")
    unknown = "any number: on demand does not fit" if found.loading is ExpertLoading.STREAM else "none that fits"
    before = "" if num_gpus == 1 else "; before, one GPU on demand is faster"
    pays = unknown if found.streaming_from is None else f"{found.streaming_from} requests at once on{before}"
    table.add_row("streaming all is as fast from", pays)
    return table


def _batches_table(steps: Sequence[StepPrediction]) -> Table:
    table = _table(
        f"decoding with {steps[0].context} tokens of each request, predicted", "requests at once", "tokens/s", "step"
    )
    for step in steps:
        table.add_row(str(step.batch), f"{step.tokens_per_second:.1f}", _ms(step.step))
    return table


def _first_token_table(found: FirstToken) -> Table:
    table = _table(f"time to first token of {found.prompt} prompt tokens, predicted", "", "")
    table.add_row("alone", _ms(found.idle))
    table.add_row("first in the queue, all places taken", _ms(found.loaded))
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=48, show_header=any(columns))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _plan_json(plan: Plan) -> dict[str, object]:
    return {
        "policy": plan.policy,
        "reason": plan.reason,
        "activation_share": plan.activation_share,
        "cache_format": plan.cache_format,
        "recomputed_tokens": plan.recompute.tokens,
        "resident_share": plan.resident_share,
        "spread_share": plan.spread_share,
        "max_batch": plan.max_batch,
        "shared_prefix": plan.shared_prefix,
        "max_model_len": plan.max_model_len,
        "device_bytes": {use.value: size for use, size in plan.device_bytes.items()},
        "host_bytes": {use.value: size for use, size in plan.host_bytes.items()},
        "budgets": {"device": plan.budgets.device, "host": plan.budgets.host},
        "num_blocks": {pool.name.lower(): count for pool, count in plan.num_blocks.items()},
        "max_prefill_tokens": plan.max_prefill_tokens,
        "spare_prefill_tokens": plan.spare_prefill_tokens,
        "max_idle_prefill_tokens": plan.max_idle_prefill_tokens,
        "drafts": {
            "max_tokens": plan.max_draft_tokens,
            "acceptance": plan.drafts.drafting.acceptance,
            "reason": plan.drafts.reason,
        },
    }


def _prediction_json(step: StepPrediction) -> dict[str, float]:
    """Counts and tokens as they are, times in seconds."""
    counts = {"batch", "context", "mini_batches", "drafts", "tokens_per_request"}
    parts = {name if name in counts else f"{name}_seconds": value for name, value in asdict(step).items()}
    return parts | {
        "gpu_seconds": step.gpu,
        "tokens_per_second": step.tokens_per_second,
        "mean_tokens_per_second": step.mean_tokens_per_second,
    }
