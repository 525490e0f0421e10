"""Between messages of vllm.grpc.engine and what the service takes and gives.

Its scalars have no presence, as a rule: 0 says that nothing is set, and then the setting does nothing, whatever the
model's own defaults are. Gateways are told of those, and fill them in where a client sets nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from smg_grpc_proto import vllm_engine_pb2 as vllm

from hsrpc import __version__
from hsrpc.constraint import MAX_CHOICES, Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Text, check_count
from hsrpc.request import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Delta,
    Finish,
    FinishReason,
    SamplingParams,
    TokenLogprob,
)
from hsrpc.server.config import ServerConfig
from hsrpc.server.engine_protocol import Engine, Stats
from hsrpc.server.errors import NotSupportedError
from hsrpc.server.grpc.field_paths import named_by
from hsrpc.server.pacing import choose_pace
from hsrpc.server.service import Submission

_ALL_TOKENS = 2**32 - 1
"""What `top_k` of -1, which is all tokens, becomes in an unsigned field."""
_MAX_COUNT = 2**31 - 1
TAKEN = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"})
"""Fields of a request that mean something here."""
TAKEN_PARAMS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("seed", "logit_bias", "n", "logprobs", "prompt_logprobs"),
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
        # Of text, which answers here have none of: the first only tells in what text stop strings are looked for.
        *("skip_special_tokens", "spaces_between_special_tokens"),
        # A constraint begins with the first token anyway.
        *("json_schema", "json_object", "regex", "grammar", "choice", "grammar_from_first_token"),
    }
)
"""Settings that mean something here."""
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of which models have defaults of their own."""
_PATHS = {
    "token_ids": "tokenized.input_ids",
    "include_stop": "sampling_params.include_stop_str_in_output",
    **{field.name: f"sampling_params.{field.name}" for field in vllm.SamplingParams.DESCRIPTOR.fields},
    "choice": "sampling_params.choice.choices",
}
"""Where a request has what the engine calls by a name of its own."""
_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.MAX_TOKENS: "length",
    FinishReason.CONTEXT_LENGTH: "length",
    FinishReason.TIME_LIMIT: "length",
    FinishReason.ABORTED: "abort",
}


def field_paths() -> AbstractContextManager[None]:
    """Errors that leave the block name fields by their path in the message: stop is sampling_params.stop."""
    return named_by(_PATHS)


def read_submission(request: vllm.GenerateRequest, config: ServerConfig) -> Submission:
    """What is asked for.

    Raises:
        InvalidRequestError: naming the field by its path in the message.
        NotSupportedError: a field is set that means nothing here.
    """
    _refuse_others(request, TAKEN, "")
    _refuse_others(request.sampling_params, TAKEN_PARAMS, "sampling_params.")
    if request.data_parallel_rank:
        raise InvalidRequestError("data_parallel_rank", f"{request.data_parallel_rank} is no rank here; give 0 or none")
    with field_paths():
        params = read_params(request.sampling_params)
    return Submission(_read_prompt(request), params, choose_pace(config, None, None), request.request_id or None)


def _refuse_others(message: Message, taken: frozenset[str], path: str) -> None:
    for field, _ in message.ListFields():
        if field.name not in taken:
            raise NotSupportedError(path + field.name)


def _read_prompt(request: vllm.GenerateRequest) -> Text | Sequence[int]:
    """The prompt; token ids are not copied: their number has not been checked."""
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidRequestError("input", "no prompt; set tokenized or text")
    if not (request.text if given == "text" else request.tokenized.input_ids):
        path = "text" if given == "text" else "tokenized.input_ids"
        raise InvalidRequestError(path, "empty; give at least one token")
    return Text(request.text) if given == "text" else request.tokenized.input_ids


def read_params(given: vllm.SamplingParams) -> SamplingParams:
    """The settings.

    Raises:
        InvalidRequestError: naming the field by the engine's name.
        NotSupportedError: several outputs of one prompt are asked for.
    """
    if given.n > 1:
        raise NotSupportedError(f"sampling_params.n of {given.n}")
    check_count("stop", len(given.stop), MAX_STOP_STRINGS)
    check_count("stop_token_ids", len(given.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_count("logit_bias", len(given.logit_bias), MAX_LOGIT_BIAS)
    optional: dict[str, Any] = {name: getattr(given, name) for name in _OPTIONAL if given.HasField(name)}
    return SamplingParams(
        temperature=_decimal(given.temperature) if given.HasField("temperature") else 1.0,
        top_p=_decimal(given.top_p) or 1.0,
        top_k=0 if given.top_k == _ALL_TOKENS else given.top_k,
        min_p=_decimal(given.min_p),
        repetition_penalty=_decimal(given.repetition_penalty) or 1.0,
        presence_penalty=_decimal(given.presence_penalty),
        frequency_penalty=_decimal(given.frequency_penalty),
        logit_bias={token_id: _decimal(bias) for token_id, bias in given.logit_bias.items()},
        min_tokens=given.min_tokens,
        stop=tuple(given.stop),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        include_stop=given.include_stop_str_in_output,
        skip_special_tokens=given.skip_special_tokens,
        constraint=_read_constraint(given),
        **optional,
    )


def _read_constraint(given: vllm.SamplingParams) -> Constraint | None:
    match given.WhichOneof("constraint"):
        case "json_schema":
            return JsonSchema(given.json_schema)
        case "json_object":
            return JsonObject() if given.json_object else None
        case "regex":
            return Regex(given.regex)
        case "grammar":
            return Grammar(given.grammar)
        case "choice":
            check_count("choice", len(given.choice.choices), MAX_CHOICES)
            return Choice(tuple(given.choice.choices))
        case _:
            return None  # or one that is refused by its name


def _decimal(value: float) -> float:
    """The number that was meant by one of 32 bits: the shortest that becomes it, so that 0.7 is 0.7."""
    return float(str(np.float32(value)))


def chunk_message(delta: Delta, prompt_tokens: int, input_logprobs: vllm.InputLogProbs | None) -> vllm.GenerateResponse:
    """New tokens of a stream; the first chunk brings the prompt's logprobs, where they were asked for."""
    return vllm.GenerateResponse(
        chunk=vllm.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(delta.token_ids),
            output_logprobs=_logprobs_message(delta.logprobs),
            input_logprobs=input_logprobs,
        )
    )


def complete_message(
    finish: Finish,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob] = (),
    input_logprobs: vllm.InputLogProbs | None = None,
) -> vllm.GenerateResponse:
    """The end of an output of `token_ids`; `logprobs` and `input_logprobs` are those that no chunk has brought."""
    complete = vllm.GenerateComplete(
        output_ids=token_ids,
        finish_reason=_REASONS[finish.reason],
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        cached_tokens=finish.usage.cached_tokens,
        output_logprobs=_logprobs_message(logprobs),
        input_logprobs=input_logprobs,
    )
    if isinstance(finish.matched_stop, str):
        complete.matched_stop_str = finish.matched_stop
    elif finish.matched_stop is not None and finish.reason is FinishReason.STOP_TOKEN:
        complete.matched_token_id = finish.matched_stop
    return vllm.GenerateResponse(complete=complete)


def _logprobs_message(logprobs: Sequence[TokenLogprob]) -> vllm.OutputLogProbs | None:
    if not logprobs:
        return None
    return vllm.OutputLogProbs(
        token_logprobs=[each.logprob for each in logprobs],
        token_ids=[each.token_id for each in logprobs],
        top_logprobs=map(_top_message, logprobs),
    )


def input_logprobs_message(prompt: Sequence[int], logprobs: Sequence[TokenLogprob]) -> vllm.InputLogProbs:
    """Those of a prompt's tokens, as far as it is computed; the first has none."""
    values = (vllm.InputTokenLogProb(value=each.logprob) for each in logprobs)
    return vllm.InputLogProbs(
        token_logprobs=[vllm.InputTokenLogProb(), *values],
        token_ids=prompt[: 1 + len(logprobs)],
        top_logprobs=[vllm.TopLogProbs(), *map(_top_message, logprobs)],
    )


def _top_message(logprob: TokenLogprob) -> vllm.TopLogProbs:
    top = logprob.top
    return vllm.TopLogProbs(token_ids=[token_id for token_id, _ in top], values=[value for _, value in top])


def model_message(engine: Engine, name: str) -> vllm.GetModelInfoResponse:
    """The model, by the name that answers have for it: where its files lie is nobody's business."""
    spec = engine.spec
    return vllm.GetModelInfoResponse(
        model_path=name,
        is_generation=True,
        max_context_length=engine.max_model_len,
        vocab_size=spec.vocab_size,
        served_model_name=name,
        model_type=spec.family,
        architectures=spec.architectures,
        eos_token_ids=spec.eos_token_ids,
        pad_token_id=spec.pad_token_id,
        bos_token_id=spec.bos_token_id,
        max_req_input_len=engine.max_model_len - 1,
        default_sampling_params_json=_defaults_json(engine.default_params),
    )


def _defaults_json(defaults: SamplingParams) -> str:
    """The model's own settings, where they are others than everybody's; empty where none is."""
    plain = SamplingParams()
    own = {name: value for name in _DEFAULTED if (value := getattr(defaults, name)) != getattr(plain, name)}
    return json.dumps(own) if own else ""


def server_message(engine: Engine, uptime: float, *, is_draining: bool) -> vllm.GetServerInfoResponse:
    """The server, and what its scheduler may do."""
    stats = engine.stats()
    return vllm.GetServerInfoResponse(
        active_requests=stats.running + stats.queued,
        is_paused=is_draining,
        uptime_seconds=uptime,
        server_type="vllm-grpc",
        data_parallel_size=1,
        block_size=engine.plan.block_size,
        max_num_seqs=engine.plan.num_gpus * engine.plan.max_batch,
    )


def loads_message(engine: Engine) -> vllm.GetLoadsResponse:
    """The load of the one rank that there is."""
    now = Timestamp()
    now.GetCurrentTime()
    load = _load_message(engine, engine.stats())
    return vllm.GetLoadsResponse(timestamp=now.ToJsonString(), version=__version__, dp_rank_count=1, loads=[load])


def _load_message(engine: Engine, stats: Stats) -> vllm.SchedulerLoad:
    """Tokens are those that blocks have room for, of every kind and tier."""
    plan = engine.plan
    used, blocks = sum(stats.used_blocks.values()), plan.num_gpus * sum(plan.num_blocks.values())
    return vllm.SchedulerLoad(
        num_running_reqs=stats.running,
        num_waiting_reqs=stats.queued,
        num_total_reqs=stats.running + stats.queued,
        num_used_tokens=min(_MAX_COUNT, used * plan.block_size),
        max_total_num_tokens=min(_MAX_COUNT, blocks * plan.block_size),
        token_usage=used / blocks if blocks else 0.0,
        gen_throughput=stats.generated_tokens / stats.step_seconds if stats.step_seconds else 0.0,
        utilization=stats.running / (plan.num_gpus * plan.max_batch),
        max_running_requests=plan.num_gpus * plan.max_batch,
        num_waiting_uncached_tokens=min(_MAX_COUNT, stats.queued_tokens),
    )
