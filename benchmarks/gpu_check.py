"""Holds the engine on a GPU against a plain forward pass of transformers with the same random weights.

For each shape and policy, greedy tokens of ragged prompts are compared, in float16. Where its rounding makes the two
differ for the first time, each side's token must be among the other's five most probable. Rounding may make a router
choose another expert, after which that does not hold: mixtures of experts are compared in float32.

    python benchmarks/gpu_check.py --shape opt-1.3b --shape opt-6.7b
    python benchmarks/gpu_check.py --shape qwen3-30b-a3b --layers 4 --dtype float32 --run "kv None"
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import CachePolicy, DeviceKind, DType, Placement, WeightCoding
from hsrpc.model.attention import PLAIN
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import DTYPES, named_spec
from hsrpc.model.tensor import RowOrder, TensorSpec
from hsrpc.model.tensor_names import TensorNames

LENGTHS = (1, 7, 33, 64, 100, 190, 301, 420)
NEW_TOKENS = 16


class Run(NamedTuple):
    """How the engine is set up."""

    policy: CachePolicy
    share: float | None
    placement: Placement
    recompute: float | None = None
    coding: WeightCoding = WeightCoding.NONE

    @property
    def name(self) -> str:
        """Name as it is printed."""
        recomputed = "" if self.recompute is None else f", {self.recompute} recomputed"
        coded = "" if self.coding is WeightCoding.NONE else ", coded weights"
        return f"{self.policy} {self.share} {self.placement}{recomputed}{coded}"


RUNS = (
    Run(CachePolicy.KV, None, Placement.HOST),
    Run(CachePolicy.ACTIVATION, None, Placement.HOST),
    Run(CachePolicy.HYBRID, 0.5, Placement.HOST),
    Run(CachePolicy.AUTO, None, Placement.HOST),
    Run(CachePolicy.RECOMPUTE, None, Placement.HOST),
    Run(CachePolicy.HYBRID, 0.5, Placement.HOST, 0.5),
    Run(CachePolicy.HYBRID, 0.5, Placement.HOST, coding=WeightCoding.LOSSLESS),
    Run(CachePolicy.HYBRID, 0.5, Placement.AUTO),
    Run(CachePolicy.KV, None, Placement.AUTO),
)
Found = list[tuple[int, list[int]]]
"""New tokens of a prompt, and the five most probable ones at each."""


def configuration(shape: str, num_layers: int | None) -> dict[str, Any]:
    """The shape's config.json; with its first `num_layers` layers alone, where that is given."""
    fewer = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return {**SHAPES[shape], **fewer}


def reference_model(config: dict[str, Any], file: Path, device: DeviceKind, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a config.json on the device, with the weights that `random:FILE` has."""
    settings = CONFIG_MAPPING[str(config["model_type"])](**config)
    family, source = create_family(named_spec(str(file), dtype)), RandomWeights(0)
    attention = "sdpa" if family.attention_extras == PLAIN else "eager"  # the other one has neither caps nor sinks
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            settings,
            dtype=dtype,  # the configuration names that of its checkpoint
            attn_implementation=attention,
            experts_implementation="eager",  # products that are as exact as the element type
        ).eval()
    tensors = model.state_dict()  # whose memory is that of the model
    names = TensorNames(tensors)
    for tensor in family.all_tensors():
        packed = torch.empty(tensor.shape, dtype=tensor.dtype(dtype), device=model.device)
        source.read(tensor, packed)
        _fill(tensors, names, tensor, packed)
    return model


def _fill(tensors: Mapping[str, torch.Tensor], names: TensorNames, tensor: TensorSpec, packed: torch.Tensor) -> None:
    """Copy a packed tensor to where transformers has it, in the order of its rows there."""
    stacked = tensor.stacked
    if stacked is not None and (name := names.find(stacked.source)) is not None:
        rows = _unordered(packed, stacked.order)
        tensors[name][stacked.index].copy_(rows.t() if stacked.transposed else rows)
        return
    sizes = [shape[0] for shape in tensor.source_shapes]
    for source, part in zip(tensor.sources, _unordered(packed, tensor.order).split(sizes), strict=True):
        tensors[names.find(source) or source].copy_(part)


def _unordered(packed: torch.Tensor, order: RowOrder | None) -> torch.Tensor:
    if order is None:
        return packed
    index = order.index().to(packed.device)
    pieces = packed.view(len(index), -1)
    pieces[index] = pieces.clone()
    return packed


async def generate(file: Path, device: DeviceKind, dtype: DType, run: Run, prompts: list[list[int]]) -> list[Found]:
    """What the engine makes of each prompt, with random weights for a config.json."""
    config = EngineConfig(
        model=f"random:{file}",
        device=device,
        dtype=dtype,
        gpu_memory="24GiB",
        host_memory="60GiB",
        cache_policy=run.policy,
        activation_share=run.share,
        recompute_share=run.recompute,
        weight_coding=run.coding,
        placement=run.placement,
        min_batch=len(LENGTHS),
        max_batch=len(LENGTHS),
        max_model_len=512,
        expected_context=sum(LENGTHS) // len(LENGTHS) + NEW_TOKENS,  # a recomputed part is a part of these
        max_prefill_tokens=256,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5)
    async with Engine(config) as engine:

        async def one(prompt: list[int]) -> Found:
            found = [item async for delta in engine.generate(prompt, params) for item in delta.logprobs]
            return [(item.token_id, [token for token, _ in item.top]) for item in found]

        results = await asyncio.gather(*map(one, prompts))
        stats, plan = engine.stats(), engine.plan
        peak, budget = stats.peak_device_bytes, plan.budgets.device
        print(
            f"{file.stem:10} {plan.policy:10} share {plan.activation_share:.2f} resident {plan.resident_share:.2f} "
            f"streamed {stats.weights_streamed_bytes / 1e9:7.1f} GB regenerated {stats.regenerated_tokens:9,d} "
            f"recomputed {stats.recomputed_tokens:7,d} "
            f"peak {peak / 2**30:5.2f} of {budget / 2**30:.0f} GiB"
        )
        assert peak <= budget, "the allocator's peak is over the budget"
        max_recomputed = 0.75 * NEW_TOKENS * sum(LENGTHS)
        assert not run.recompute or 0 < stats.recomputed_tokens < max_recomputed, "not some cached, some recomputed"
        return results


@torch.inference_mode()
def compare(model: PreTrainedModel, prompts: list[list[int]], results: list[Found]) -> int:
    """Number of prompts without any difference.

    Raises:
        AssertionError: at a first difference a side's token is not in the other's top 5.
    """
    equal = 0
    for prompt, result in zip(prompts, results, strict=True):
        tokens = [token for token, _ in result]
        logits = model(torch.tensor([prompt + tokens[:-1]], device=model.device)).logits[0, len(prompt) - 1 :]
        top = logits.topk(5).indices.tolist()
        differences = [i for i, token in enumerate(tokens) if token != top[i][0]]
        equal += not differences
        for i in differences[:1]:
            assert tokens[i] in top[i], f"length {len(prompt)}, token {i}: {tokens[i]} not in {top[i]}"
            assert top[i][0] in result[i][1], f"length {len(prompt)}, token {i}: {top[i][0]} not in {result[i][1]}"
    return equal


def main(arguments: Sequence[str] | None = None) -> None:
    """Check each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", required=True, choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, metavar="N", help="of each shape the first N alone (default: all)")
    parser.add_argument("--device", type=DeviceKind, default=DeviceKind.CUDA, choices=(DeviceKind.CUDA, DeviceKind.CPU))
    parser.add_argument("--dtype", type=DType, default=DType.FLOAT16, choices=tuple(map(DType, DTYPES)))
    parser.add_argument("--run", action="append", metavar="WORDS", help="runs whose names have these (default: all)")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")  # an environment variable of some images says otherwise
    wanted = options.run or [""]
    runs = [run for run in RUNS if any(words in run.name for words in wanted)]
    with TemporaryDirectory() as directory:
        for shape in options.shape:
            file = Path(directory, f"{shape}.json")
            check(configuration(shape, options.layers), file, options.device, options.dtype, runs)


def check(config: dict[str, Any], file: Path, device: DeviceKind, dtype: DType, runs: Sequence[Run]) -> None:
    """Check a configuration, which is written to `file`, in some runs."""
    file.write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(3)
    vocab = named_spec(str(file), torch.float16).vocab_size
    prompts = [torch.randint(4, vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    outputs = [asyncio.run(generate(file, device, dtype, run, prompts)) for run in runs]
    model = reference_model(config, file, device, DTYPES[dtype])
    for run, output in zip(runs, outputs, strict=True):
        equal = compare(model, prompts, output)
        print(f"{file.stem} {run.name}: {equal} of {len(prompts)} prompts equal throughout", flush=True)
    del model
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
