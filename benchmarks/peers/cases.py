"""What is compared: the cases, the models, and one way to run one of the systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

from hsrpc.bench.workload import Lengths, Workload, make_workload
from hsrpc.config import WeightCoding
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.choice import with_scaled
from hsrpc.model.random_codes import split_format
from hsrpc.model.spec import DTYPES, in_formats, named_spec
from hsrpc.plan.sizes import ModelSizes

GIB = 1024**3
MODELS = ("opt-6.7b", "opt-13b", "opt-30b")
"""Models of the cases in which they may be larger than the device."""
RESIDENT_MODEL = "opt-1.3b"
LLAMA = "llama-2-13b"
"""Runs beside vLLM, in bfloat16."""
GPT_OSS = "gpt-oss-20b:mxfp4"
"""Runs beside llama.cpp, its experts in 4 bits."""
ALL_MODELS = (RESIDENT_MODEL, *MODELS, LLAMA, GPT_OSS)
PROMPT = 512
SHARED_PREFIX = 400
"""First tokens that all prompts of the shared case have in common."""
OUTPUT = {"opt-30b": 32, LLAMA: 64, GPT_OSS: 64}
"""New tokens of a request where they are not `DEFAULT_OUTPUT`, for all systems alike."""
DEFAULT_OUTPUT = 128
HOST_BATCH = {"opt-6.7b": 128, "opt-13b": 64, GPT_OSS: 64}
"""Equal batches of the host case; for other models the largest that fits."""
RESIDENT_BATCH = 64


class Case(StrEnum):
    """The settings that are compared."""

    HOST = "host"
    """All layers' weights and the whole cache on the host, equal batch: the setting of the papers."""
    ALONE = "alone"
    """The same with one request."""
    BUDGET = "budget"
    """Equal budgets of device and host memory, each system tuned freely."""
    SHARED = "shared"
    """The same, and all prompts begin with the same tokens."""
    RESIDENT = "resident"
    """All weights and the whole cache on the device, equal batch."""


class System(StrEnum):
    """Who runs."""

    HSRPC = "hsrpc"
    FLEXGEN = "flexgen"
    ACCELERATE = "accelerate"
    """transformers `generate`, accelerate's CPU offload from pageable weights, as it comes, the offloaded cache."""
    ACCELERATE_PINNED = "accelerate-pinned"
    """The same, from weights that are pinned for it."""
    TRANSFORMERS = "transformers"
    """transformers `generate`, the model on the device, the static cache."""
    VLLM = "vllm"
    """vLLM with its prefetch offloader: some layers' weights on the host, the whole cache on the device."""
    LLAMA_CPP = "llama.cpp"
    """llama.cpp's `llama-batched-bench`: experts on the host, computed there or copied, all else on the device."""


ONE_ENGINE = (System.VLLM, System.LLAMA_CPP)
"""Those whose process measures all setups of one engine: starting it takes longer than they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that a system may take."""

    device: int = 24 * GIB
    host: int = 108 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to run one system, complete: what a child process needs to know."""

    case: Case
    model: str
    system: System
    budgets: Budgets
    batch: int | None
    """None: hsrpc's planner decides."""
    prompt: int = PROMPT
    output: int = DEFAULT_OUTPUT
    steps: int | None = None
    """Tokens really generated of each request, the rest is projected; None: all."""
    percent: Sequence[int] = ()
    """FlexGen: weights on GPU and CPU, cache on GPU and CPU, activations on GPU and CPU."""
    num_batches: int = 1
    """FlexGen: GPU batches that share one sweep over the weights."""
    cpu_attention: bool = False
    """FlexGen: attention to the cache on the host is computed there."""
    policy: str = "auto"
    """hsrpc: what is cached."""
    shared: int = 0
    """First tokens that all prompts have in common."""
    offload: Sequence[int] = ()
    """vLLM: layers of a group, those of them that are on the host, layers that are loaded ahead."""
    drafts: int = 0
    """vLLM: tokens of a draft that n-grams of the request itself give; 0: none."""
    workspace: int = 2 * GIB
    """vLLM: device bytes left to a step, and to what the allocator loses; the cache has the others."""
    compiled: bool = False
    """transformers: decode is compiled, which it does by itself for a static cache on a GPU unless told not to."""

    @property
    def mean_context(self) -> int:
        """Tokens that a request holds in the middle of the run."""
        return self.prompt + self.output // 2

    @property
    def engine(self) -> Setup:
        """Equal for setups that one engine of their system can run one after the other."""
        return replace(self, case=Case.HOST, batch=None, shared=0)

    @property
    def name(self) -> str:
        """Tells the setup from all others."""
        return f"{self.case} {self.model} {self.system}, {self.key}"

    @property
    def key(self) -> str:
        """Names the setup in tables, and tells it from all others of its system, model and case."""
        parts = [f"batch {self.batch or 'planned'}"]
        if self.system is System.FLEXGEN:
            parts += [f"{self.num_batches} GPU batches", "percent " + " ".join(map(str, self.percent))]
            parts += ["CPU attention"] * self.cpu_attention
        if self.system is System.HSRPC:
            parts.append(self.policy)
        if self.system is System.VLLM:
            parts.append("offload " + " ".join(map(str, self.offload)))
            parts += [f"drafts of {self.drafts}"] * bool(self.drafts)
        if self.system is System.TRANSFORMERS:
            parts.append("compiled decode" if self.compiled else "not compiled")
        if self.steps is not None:
            parts.append(f"{self.steps} of {self.output} tokens")
        return ", ".join(parts)


@cache
def sizes_of(model: str) -> ModelSizes:
    """Sizes of a shape in float16, or of one whose weights have a format, as in gpt-oss-20b:mxfp4."""
    shape, form = split_format(model)
    spec = named_spec(shape, DTYPES["float16"])
    if form is None:
        return spec.sizes
    [formats] = with_scaled([spec.formats], form.formats(create_family(spec)), WeightCoding.AUTO)
    return in_formats(spec, formats).sizes


def stored_bytes(model: str) -> int:
    """Weight bytes in their own format, as they lie on the host."""
    sizes = sizes_of(model)
    return int(sizes.fixed_bytes + sum(tensor.host_bytes for layer in sizes.layers for tensor in layer.tensors))


def output_of(model: str) -> int:
    """New tokens of a request."""
    return OUTPUT.get(model, DEFAULT_OUTPUT)


def workload_of(setup: Setup, batch: int) -> Workload:
    """The same prompts of random tokens for every system."""
    vocab_size = sizes_of(setup.model).vocab_size
    return make_workload(
        Lengths.UNIFORM,
        count=batch,
        prompt=setup.prompt,
        output=setup.output,
        vocab_size=vocab_size,
        shared=setup.shared,
    )


def random_prompts(setup: Setup) -> list[list[int]]:
    """Those of a setup that names its batch."""
    return [list(prompt) for prompt in workload_of(setup, setup.batch or 0).prompts]
