"""transformers' OPT with random weights in float16, and its `generate`, timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from benchmarks.peers.cases import Setup, random_prompts
from benchmarks.peers.record import Timing
from hsrpc.model.shapes import SHAPES

_DEVIATION = 0.02
Maker = Callable[[torch.Size, float, float], torch.Tensor]
"""A tensor of a shape, normal with a mean and a deviation."""


def empty_model(name: str) -> Any:
    """A model without memory, which attends by torch's scaled_dot_product_attention and never ends a request early."""
    values = {key: value for key, value in SHAPES[name].items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(attn_implementation="sdpa", **values)).half().eval()
    model.generation_config.eos_token_id = None
    return model


def random_weights(model: Any, make: Maker) -> dict[str, torch.Tensor]:
    """A state for the model; head and embeddings are one tensor."""
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight":
            mean = 1.0 if key.endswith("layer_norm.weight") else 0.0
            weights[key] = make(tensor.shape, mean, _DEVIATION)
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights


def generate(
    model: Any,
    setup: Setup,
    device: torch.device,
    synchronize: Callable[[], object],
    *,
    warm_up: tuple[int, int],
    **settings: object,
) -> Timing:
    """One run that warms up, then the one that counts, each step timed when its tokens are there.

    `warm_up` has the tokens of its prompts, and how many it generates of each request; `settings` are `generate`'s.
    """
    prompts = torch.tensor(random_prompts(setup), device=device)
    length, output = warm_up
    _generate(model, prompts[:, :length], output, lambda: None, settings)
    times: list[float] = []

    def note() -> None:
        synchronize()
        times.append(time.perf_counter())

    note()
    _generate(model, prompts, setup.steps or setup.output, note, settings)
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(prefill=gaps[0], steps=gaps[1:])


def _generate(
    model: Any, prompts: torch.Tensor, output: int, note: Callable[[], None], settings: dict[str, object]
) -> None:
    def after_step(tokens: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        note()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    config = GenerationConfig(max_new_tokens=output, do_sample=False, pad_token_id=1, **settings)
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=config, stopping_criteria=[after_step]
    )
    if tokens.shape[1] != prompts.shape[1] + output:
        raise ValueError(f"{tokens.shape[1] - prompts.shape[1]} new tokens, not {output}: generation stopped early")
