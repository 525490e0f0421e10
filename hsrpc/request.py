"""What a caller asks for (SamplingParams) and what it gets back (Delta)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from hsrpc.constraint import Constraint
from hsrpc.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024


class FinishReason(Enum):
    """Why a request ended; the names are those of the service."""

    EOS = "EOS"
    STOP_STRING = "STOP_STRING"
    STOP_TOKEN = "STOP_TOKEN"
    MAX_TOKENS = "MAX_TOKENS"
    CONTEXT_LENGTH = "CONTEXT_LENGTH"
    TIME_LIMIT = "TIME_LIMIT"
    ABORTED = "ABORTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    The next token is drawn from the logits after, in this order: logit bias, penalties, `constraint` (what it does not
    allow is excluded), `min_tokens` (end tokens are excluded until then), temperature, min-p, top-k, top-p. Temperature
    0 is greedy. Logprobs are of the model's own logits, before any of these.

    Raises:
        InvalidRequestError: on construction, naming the field.
    """

    temperature: float = 1.0
    """0 is greedy; at most 100."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]."""
    top_k: int = 0
    """Most probable tokens to choose from; 0 is all."""
    min_p: float = 0.0
    """Least probability relative to the most probable token's, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens in prompt and output; positive."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the output; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token is in the output; in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; in [-100, 100]."""
    seed: int | None = None
    """Same seed, same tokens; None draws one."""
    max_tokens: int | None = None
    """Most output tokens; None goes to the end of the context; 0, with `prompt_logprobs` only, generates nothing."""
    min_tokens: int = 0
    """End tokens are excluded before this many output tokens."""
    stop: Sequence[str] = ()
    """Output ends before the first of these strings; the text of a special token stops at that token, shown or not."""
    stop_token_ids: Sequence[int] = ()
    """Output ends at the first of these tokens."""
    ignore_eos: bool = False
    """Goes on past the model's end-of-text token; with a `constraint` only while that allows something else."""
    include_stop: bool = False
    """The text includes what ended it: the stop string, or the token where that has text."""
    skip_special_tokens: bool = True
    """The text leaves special tokens out; False shows them, the one that ends it with `include_stop` only."""
    time_limit: float | None = None
    """Seconds from arrival after which the output ends with what there is."""
    logprobs: int | None = None
    """None: no logprobs; n: the chosen token's and the n most probable ones'."""
    constraint: Constraint | None = None
    """What the output may be: `JsonSchema`, `JsonObject`, `Regex`, `Grammar` or `Choice`. Once nothing can follow, the
    end-of-text token does; `max_tokens` may cut the output off before."""
    prompt_logprobs: int | None = None
    """None: none of the prompt; n: those of each of its tokens but the first, and of the n most probable ones."""
    priority: int = 0
    """Smaller is admitted first; waiting makes up for it, and ties go to the client that was served least."""

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_range("priority", self.priority, -(2**31), 2**31 - 1)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
            if self.max_tokens == 0 and self.prompt_logprobs is None:
                problem = "0 is outside [1, 2147483647] without prompt_logprobs: nothing would come of it"
                raise InvalidRequestError("max_tokens", problem)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError("min_tokens", f"{self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.seed is not None:
            _check_range("seed", self.seed, 0, 2**63 - 1)
        if self.time_limit is not None:
            _check_range("time_limit", self.time_limit, 0.0, 86_400.0, low_open=True)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_collections()

    def _check_collections(self) -> None:
        if isinstance(self.stop, str):
            raise InvalidRequestError("stop", "one string; give a list of strings")
        _check_size("stop", self.stop, MAX_STOP_STRINGS)
        _check_size("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_size("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for text in self.stop:
            if not text or len(text) > MAX_STOP_LENGTH:
                raise InvalidRequestError(
                    "stop", f"each string must have 1 to {MAX_STOP_LENGTH} characters, found {len(text)}"
                )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def within(self, room: int) -> SamplingParams:
        """Settings in effect where the context has room for `room` tokens of output: no count asks for more."""
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        return replace(self, max_tokens=max_tokens, min_tokens=min(self.min_tokens, max_tokens))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def only_scores(self) -> bool:
        """The prompt is computed, and nothing generated."""
        return self.max_tokens == 0

    @property
    def has_penalties(self) -> bool:
        """Logits depend on the tokens that there are."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _check_range(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequestError(field, f"{value} is outside {bracket}{low}, {high}]")


def _check_size(field: str, values: Sequence[object] | Mapping[int, float], max_count: int) -> None:
    if len(values) > max_count:
        raise InvalidRequestError(field, f"{len(values)} entries, at most {max_count} are allowed")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the model, and the most probable alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most probable."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    preemptions: int = 0
    """Times its blocks were freed and recomputed."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in blocks of other requests, and not computed."""
    drafted_tokens: int = 0
    """Tokens that were drafted, and checked by its steps."""
    accepted_tokens: int = 0
    """Those of them that were the output's."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds."""

    queue: float
    """Arrival to first scheduled."""
    prefill: float
    """First scheduled to first token."""
    decode: float
    """First token to the end."""
    first_token: float
    """Arrival to first token."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | int | None = None
    """The stop string or stop token id that matched."""

    @property
    def is_nothing(self) -> bool:
        """The model ended its output with its first token."""
        return self.reason is FinishReason.EOS and self.usage.completion_tokens == 1


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a request's output. Deltas concatenated are the output; the last one alone has `finish`."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the prompt's next tokens, from its second on; all come before, or with, the first output."""
