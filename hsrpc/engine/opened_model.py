"""From a model and its plan to what computes its steps: weights where the plan wants them, pools, launches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hsrpc.device.device import Device
from hsrpc.device.group import ALONE, DeviceGroup
from hsrpc.engine.forward import Forward
from hsrpc.engine.graphs import DecodeGraphs, can_capture
from hsrpc.engine.loading import Progress, compile_formats, load_weights
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.model.attention import Attention, HeadShape
from hsrpc.model.family import Family
from hsrpc.model.formats.format import WeightSource
from hsrpc.model.formats.rows import Rows
from hsrpc.plan.device_memory import sampled_at_once, score_rows
from hsrpc.plan.plan import Plan
from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.sweep import Places


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is ready to compute."""

    cache: CacheManager
    prefetcher: WeightPrefetcher
    forward: Forward
    assembler: Assembler
    graphs: DecodeGraphs | None
    """For steps in place; None: there are no such steps."""
    score_rows: int
    """Rows of logits of prompts that there is room for at a time."""

    @classmethod
    def open(
        cls,
        family: Family,
        source: WeightSource,
        plan: Plan,
        device: Device,
        stop: threading.Event,
        *,
        group: DeviceGroup = ALONE,
        progress: Progress = lambda done, total: None,
    ) -> OpenedModel:
        """Load the weights, allocate what is planned, compile and capture what is launched.

        `group`: GPUs that load what streams for each other.

        Raises:
            CheckpointError, ConfigError, OverBoundError, EngineUnavailableError: as `load_weights` does.
        """
        torch_device, sampled = device.torch_device, int(sampled_at_once(plan.max_batch, plan.max_draft_tokens))
        attention = _attention(family, family.heads, family.kv_rows, plan, torch_device)
        absorbed = _absorbed_attention(family, plan, torch_device)
        with torch.inference_mode(), ThreadPoolExecutor(1, thread_name_prefix="compile") as compiler:
            compile_formats(family, plan, device)  # before the other thread compiles
            compiled = [compiler.submit(each.compile) for each in (attention, absorbed) if each is not None]
            compiled.append(compiler.submit(family.activations.compile, torch_device))
            weights = load_weights(family, source, plan, device, stop, group=group, progress=progress)
            device.release_cached()  # what packing used
            cache = CacheManager(family.sizes, plan, device, family.rows)
            prefetcher = WeightPrefetcher(weights, plan, device, family, group)
            forward = Forward(
                family,
                weights.fixed,
                device,
                prefetcher=prefetcher,
                cache=cache,
                attention=attention,
                absorbed=absorbed,
                sample_rows=sampled,
            )
            for each in compiled:
                each.result()
            device.drain()
            assembler = Assembler(
                layers=_places(prefetcher, plan),
                block_size=plan.block_size,
                windows=family.sizes.windows,
                max_queries=plan.buffers.queries,
                in_place=plan.in_place,
            )
            graphs = None
            if can_capture(plan):
                graphs = DecodeGraphs(forward, cache, prefetcher, device, layers=assembler.layers, plan=plan)
        rows = score_rows(family.sizes, sampled, plan.buffers.queries)
        return cls(cache, prefetcher, forward, assembler, graphs, rows)


def _absorbed_attention(family: Family, plan: Plan, device: torch.device) -> Attention | None:
    """Attention of single queries to activations as they are stored, where the plan has it."""
    absorption = family.absorption
    if not plan.absorbs or absorption is None:
        return None
    return _attention(family, absorption.heads, family.activation_rows, plan, device)


def _attention(family: Family, heads: HeadShape, rows: Rows, plan: Plan, device: torch.device) -> Attention:
    return Attention(
        heads,
        family.attention_scale,
        plan.block_size,
        device,
        family.spec.dtype,
        rows=rows,
        windows=family.sizes.windows.distinct,
        extras=family.attention_extras,
    )


def _places(prefetcher: WeightPrefetcher, plan: Plan) -> Places:
    """Placement of each layer's weights, and whether anything is rebuilt in it."""
    return tuple(place._replace(rebuilds=layer not in plan.kv_layers) for layer, place in enumerate(prefetcher.places))
