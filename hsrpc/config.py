"""Engine settings: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from hsrpc.errors import ConfigError

BUNDLED_MODEL = str(Path(__file__).parent / "models" / "storyteller")

AUTO = "auto"
"""In place of a number: planned."""
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}


@dataclass(frozen=True, slots=True)
class Seconds:
    """A range of times that a setting may have; never NaN, never infinite."""

    low: float
    high: float = 1e6
    has_never: bool = False
    """0 is allowed beside the range, and means never."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or (self.has_never and value == 0)

    def __str__(self) -> str:
        return f"{'0 (never), or ' if self.has_never else ''}{self.low:g} to {self.high:.0f}"

    def check(self, name: str, value: float) -> None:
        """Let pass a value of the range.

        Raises:
            ConfigError: naming the setting, its value and the range.
        """
        if value not in self:
            raise ConfigError(name, value, "not a time that it may be", f"give seconds, {self}")


MAX_STEP_TIME = Seconds(1e-6)
ALL_GPUS = "all"
"""As many as there are."""
MAX_GPUS = 16
"""GPUs of one host, at most."""
_MAX_DRAFT = 64
"""Drafted tokens of a request in a step: more are hardly ever all accepted."""


class DeviceKind(StrEnum):
    """Where the engine computes."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class DType(StrEnum):
    """Element type of weights and caches; `auto` takes the checkpoint's (float32 on the CPU)."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class CachePolicy(StrEnum):
    """What is kept of the tokens a request has already seen."""

    AUTO = "auto"
    KV = "kv"
    ACTIVATION = "activation"
    HYBRID = "hybrid"
    RECOMPUTE = "recompute"


class Placement(StrEnum):
    """Where weights and caches may lie."""

    AUTO = "auto"
    """On the device as far as its budget goes, the rest on the host."""
    HOST = "host"
    """All layers' weights and all caches on the host: the setting of the paper, for measurements."""


class WeightCoding(StrEnum):
    """How weights cross the bus that stream."""

    AUTO = "auto"
    """On CUDA coded where the planner expects that it pays, unless they hardly get smaller; elsewhere as they are."""
    NONE = "none"
    """As they are."""
    LOSSLESS = "lossless"
    """float16 and bfloat16 in fewer bytes, decoded on the device to the same bits."""


class ResidentWeights(StrEnum):
    """How coded and quantised weights lie that stay on the device."""

    AUTO = "auto"
    """As the planner expects to be faster."""
    DECODED = "decoded"
    """As they are multiplied: decoded once, when they are loaded."""
    PACKED = "packed"
    """As they would cross the bus, so that more of them stay: decoded in every step."""


class CacheCoding(StrEnum):
    """How cached tokens are kept: the rows of blocks, on the device and on the host."""

    PLAIN = "plain"
    """As they are computed."""
    FP8 = "fp8"
    """In 8 bits, half of the bytes: K and V and activations as float8 (e4m3); [W_K W_V] is rounded alike."""
    INT8 = "int8"
    """In 8 bits, nearer to plain: K and V as whole numbers, activations as float8; weights as they are."""


class DraftMethod(StrEnum):
    """Where drafted tokens come from, without a model."""

    SUFFIX = "suffix"
    """What followed most often where a request's last tokens stood before: in itself, and in outputs of others."""
    NGRAM = "ngram"
    """What followed where most of a request's last tokens stood before in itself."""


class LatentAttention(StrEnum):
    """What single queries attend to where a model keeps latents."""

    AUTO = "auto"
    """What the planner expects to be faster."""
    REBUILD = "rebuild"
    """K and V, rebuilt of latents where these are cached."""
    ABSORB = "absorb"
    """Latents as they are stored; nothing else is cached."""


class ExpertLoading(StrEnum):
    """How the experts of a mixture come to the device that do not stay there."""

    AUTO = "auto"
    """As the planner expects to be faster."""
    STREAM = "stream"
    """All of them in every step, ahead of their use, as other weights."""
    DEMAND = "demand"
    """Those that a step's tokens take, once the router has chosen; the ones used last stay."""


class GenerationDefaults(StrEnum):
    """Where the sampling settings come from that a request leaves out."""

    AUTO = "auto"
    """The model's generation_config.json, as far as it says something."""
    NONE = "none"
    """hsrpc's own, whatever the model's file says."""


def parse_bytes(text: int | str, field: str) -> int:
    """Bytes in `text`: a number, or one with a unit such as 24GiB, 512MiB, 1.5G (binary) or 80GB (decimal).

    Raises:
        ConfigError: not a size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise ConfigError(field, text, "not a positive size in bytes", "write it like 24GiB, 512MiB or 1073741824")
    return size


def format_bytes(size: float) -> str:
    """`size` bytes as people read them, in binary units: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_rate(rate: float, unit: str) -> str:
    """`rate` as people read it, in decimal units: 1.5e9 of B/s is 1.50 GB/s."""
    for prefix in ("", "k", "M", "G", "T"):
        if rate < 999.5:
            return f"{rate:#.3g}".rstrip(".") + f" {prefix}{unit}"
        rate /= 1000
    return f"{rate:#.3g}".rstrip(".") + f" P{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine. `None` means: decided when the engine starts, from model and machine.

    Raises:
        ConfigError: on construction, naming the field, its value and the remedy.
    """

    model: str = BUNDLED_MODEL
    """Directory in Hugging Face format, or a hub id."""
    trust_links: bool = False
    """Whether files of the model's directory may be links out of it; whoever made them chooses what is read."""
    chat_template: str | None = None
    """File with a chat template in place of the model's own."""
    device: DeviceKind = DeviceKind.AUTO
    gpus: int | str = 1
    """GPUs of this host that share one stream of weights, each with requests and caches of its own; `all`: those there
    are. With several, each is a process of its own."""
    dtype: DType = DType.AUTO
    generation_config: GenerationDefaults = GenerationDefaults.AUTO
    """Where the sampling settings come from that a request leaves out."""
    gpu_memory: int | str | None = None
    """Hard budget of device memory, bytes, of each GPU; on the CPU it bounds the emulated device."""
    host_memory: int | str | None = None
    """Hard budget of (pinned) host memory for weights and caches, bytes; all GPUs share it."""
    cache_policy: CachePolicy = CachePolicy.AUTO
    activation_share: float | None = None
    """Share of cached tokens held as activations, in [0, 1]; only with the hybrid policy."""
    recompute_share: float | None = None
    """Most of the tokens in use that are cached nowhere and recomputed in each step, in [0, 1]; for measurements.
    None: planned under the policy `auto`, none under others."""
    placement: Placement = Placement.AUTO
    resident_share: float | None = None
    """Most of the layers' weights that stays on the device, in [0, 1]; for measurements. None: planned."""
    weight_coding: WeightCoding = WeightCoding.AUTO
    """How weights cross the bus that stream."""
    resident_weights: ResidentWeights = ResidentWeights.AUTO
    """How coded and quantised weights lie that stay on the device."""
    cache_format: CacheCoding = CacheCoding.PLAIN
    """How cached tokens are kept; in 8 bits they are rounded, so that tokens may differ."""
    latent_attention: LatentAttention = LatentAttention.AUTO
    """What single queries attend to where a model keeps latents; for measurements."""
    experts: ExpertLoading = ExpertLoading.AUTO
    """How the experts of a mixture come to the device that do not stay there."""
    prefix_cache: bool = True
    """Whether requests with equal first tokens share the blocks of these, and blocks that nobody holds are kept."""
    block_size: int = 16
    """Tokens a cache block holds."""
    min_batch: int = 1
    """Requests that run at once where so many fit, even where fewer would be faster. Equal to `max_batch`: so many."""
    max_batch: int | None = None
    """Most requests that run at once; of those up to it, as many as give the highest predicted throughput. Each of
    several GPUs takes its part of it, rounded up."""
    max_model_len: int | None = None
    """Most tokens of one request, prompt and output together. None: the model's own, as far as that fits the budgets at
    hardly less speed; else its half and so on, not below 4096."""
    max_prefill_tokens: int | None = None
    """Most prompt tokens that one step computes; longer prompts are computed in chunks."""
    expected_context: int | None = None
    """Tokens a running request holds on average: what the planner plans for."""
    expected_output: int | None = None
    """Tokens a request generates on average, from which the cost of prompts follows; None: a quarter of the context."""
    max_draft_tokens: int | str | None = None
    """Tokens that each request drafts in a step, at most, and that the same pass verifies; 0: none; `auto`: planned.
    None: `auto` where `drafter` or `draft_model` is given, else none."""
    drafter: DraftMethod | None = None
    """Where drafted tokens come from; None: from `draft_model`, else by suffixes."""
    draft_model: str | None = None
    """A small model with the same tokenizer that drafts: a directory, or a hub id; it lies on the device."""
    expected_acceptance: float = 0.5
    """Part of the drafted tokens that is accepted, of those before which all were, in [0, 1]: what the planner plans
    for."""
    expected_shared_prefix: int = 0
    """First tokens that running requests have in common, on average: what the planner plans for."""
    max_step_time: float | None = None
    """Bound on the predicted time of a step in which requests decode, with and without a prompt's chunk, seconds."""
    max_queued_requests: int = 1024
    """Most requests that wait to run."""
    max_queued_tokens: int = 1_048_576
    """Most prompt tokens of requests that wait to run; one request alone may have more."""
    seed: int | None = None
    """Makes the seeds of requests that bring none reproducible."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("device", DeviceKind),
            ("dtype", DType),
            ("generation_config", GenerationDefaults),
            ("cache_policy", CachePolicy),
            ("placement", Placement),
            ("weight_coding", WeightCoding),
            ("resident_weights", ResidentWeights),
            ("cache_format", CacheCoding),
            ("latent_attention", LatentAttention),
            ("experts", ExpertLoading),
        ):
            self._set(name, _member(kind, getattr(self, name), name))
        for name in ("gpu_memory", "host_memory"):
            if getattr(self, name) is not None:
                self._set(name, parse_bytes(getattr(self, name), name))
        for name in (
            "block_size",
            "min_batch",
            "max_batch",
            "max_model_len",
            "max_prefill_tokens",
            "expected_context",
            "expected_output",
            "max_queued_requests",
            "max_queued_tokens",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(name, value, "not a positive whole number", "give 1 or more")
        self._check_gpus()
        self._check_shared_prefix()
        self._check_drafts()
        if self.max_batch is not None and self.min_batch > self.max_batch:
            raise ConfigError("min_batch", self.min_batch, f"more than max_batch={self.max_batch}", "give at most that")
        if self.block_size > 1024:
            raise ConfigError("block_size", self.block_size, "more than 1024 tokens", "16 to 64 suit most machines")
        if self.max_step_time is not None:
            MAX_STEP_TIME.check("max_step_time", self.max_step_time)
        self._check_shares()

    def _check_gpus(self) -> None:
        name, text = "gpus", str(self.gpus)
        if text != ALL_GPUS:
            count = int(text) if re.fullmatch(r"[0-9]{1,3}", text) else 0
            if not 1 <= count <= MAX_GPUS:
                raise ConfigError(name, self.gpus, "not a number of GPUs", f"give 1 to {MAX_GPUS}, or all")
            self._set(name, count)
        if self.gpus != 1 and self.experts is ExpertLoading.DEMAND:
            problem = "does not go with experts=demand: each GPU's process would need all experts in host memory"
            raise ConfigError(name, self.gpus, problem, "use experts=auto, or gpus=1, which is faster for few requests")

    @property
    def num_gpus(self) -> int:
        """GPUs to plan for.

        Raises:
            ConfigError: all of them, and nobody has counted them.
        """
        if self.gpus == ALL_GPUS:
            raise ConfigError("gpus", ALL_GPUS, "how many GPUs there are is not known here", "give their number")
        return int(self.gpus)

    @property
    def of_one_gpu(self) -> EngineConfig:
        """The settings of each of the GPUs: its part of the batch, and nothing of the others."""
        gpus = self.num_gpus
        max_batch = None if self.max_batch is None else -(-self.max_batch // gpus)
        return replace(self, gpus=1, min_batch=-(-self.min_batch // gpus), max_batch=max_batch)

    def _check_shared_prefix(self) -> None:
        name, value = "expected_shared_prefix", self.expected_shared_prefix
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(name, value, "not a number of tokens", "give 0 or more")
        if value and not self.prefix_cache:
            raise ConfigError(name, value, "has no meaning with prefix_cache=False", "leave one of them out")
        if value and self.cache_policy is CachePolicy.RECOMPUTE:
            raise ConfigError(
                name, value, "has no meaning with cache_policy=recompute", "leave it out: nothing is cached"
            )

    @property
    def draft_tokens(self) -> int | str:
        """What `max_draft_tokens` comes to: a number, or `auto`."""
        if self.max_draft_tokens is not None:
            return self.max_draft_tokens
        return 0 if self.drafter is None and self.draft_model is None else AUTO

    def _check_drafts(self) -> None:
        if self.drafter is not None:
            self._set("drafter", _member(DraftMethod, self.drafter, "drafter"))
        for name in ("drafter", "draft_model"):
            value = getattr(self, name)
            if value is not None and self.max_draft_tokens == 0:
                raise ConfigError(name, str(value), "has no meaning with max_draft_tokens=0", "leave one of them out")
        if self.drafter is not None and self.draft_model is not None:
            problem = f"has no meaning with draft_model={self.draft_model}"
            raise ConfigError("drafter", self.drafter.value, problem, "leave one of them out")
        given = self.draft_tokens
        is_number = isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= _MAX_DRAFT
        if not is_number and given != AUTO:
            problem, remedy = "not a number of tokens that it may be", f"give 0 to {_MAX_DRAFT}, or {AUTO}"
            raise ConfigError("max_draft_tokens", given, problem, remedy)

    def _check_shares(self) -> None:
        for name, whole in (
            ("resident_share", "weights"),
            ("recompute_share", "tokens"),
            ("activation_share", "tokens"),
            ("expected_acceptance", "drafted tokens"),
        ):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(name, share, "outside [0, 1]", f"give the share of {whole}, such as 0.5")
        meaningless = f"has no meaning with cache_policy={self.cache_policy}"
        if self.activation_share is not None and self.cache_policy is not CachePolicy.HYBRID:
            raise ConfigError("activation_share", self.activation_share, meaningless, "use cache_policy=hybrid with it")
        if self.recompute_share is not None and self.cache_policy is CachePolicy.RECOMPUTE:
            raise ConfigError("recompute_share", self.recompute_share, meaningless, "leave it out: nothing is cached")
        if self.cache_format is not CacheCoding.PLAIN and self.cache_policy is CachePolicy.RECOMPUTE:
            raise ConfigError("cache_format", self.cache_format.value, meaningless, "use plain: nothing is cached")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _member(kind: type[StrEnum], value: object, field: str) -> StrEnum:
    try:
        return kind(str(value))
    except ValueError:
        raise ConfigError(field, value, "unknown", "use one of " + ", ".join(kind)) from None
