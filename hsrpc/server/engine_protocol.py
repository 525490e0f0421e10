"""What the server needs of an engine, as protocols: `hsrpc.engine.engine.Engine` has it, and so may a stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, TypedDict, Unpack

from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.plan.sizes import ModelSizes
from hsrpc.prompt import Chat, Prompt, Text
from hsrpc.request import Delta, SamplingParams
from hsrpc.schedule.blocks import PoolId


class Spec(Protocol):
    """The model that is loaded."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def sizes(self) -> ModelSizes: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def architectures(self) -> Sequence[str]: ...


class Tokenizer(Protocol):
    """Works off the event loop."""

    @property
    def has_chat_template(self) -> bool: ...

    async def decode(self, token_ids: Sequence[int], client: str = "", skip_special_tokens: bool = True) -> str:
        """Text of ids that the engine has taken already, such as a request's prompt."""
        ...

    def with_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of a text that was encoded without the special tokens of a prompt, with them."""
        ...

    async def files(self) -> Mapping[str, bytes]:
        """Files that make the same tokenizer elsewhere, by their names; none where there is no tokenizer."""
        ...


class Gpu(Protocol):
    """One of the GPUs that compute."""

    @property
    def uuid(self) -> str:
        """By which NVIDIA's tools know it; empty on the CPU."""
        ...

    @property
    def machine(self) -> Machine:
        """What was found there when the engine started."""
        ...


class GpuStats(Protocol):
    """What of an engine's counters is one GPU's."""

    @property
    def running(self) -> int: ...
    @property
    def used_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def kept_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def peak_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def weights_streamed_bytes(self) -> int: ...
    @property
    def cache_loaded_bytes(self) -> int: ...
    @property
    def regenerated_tokens(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def peak_device_bytes(self) -> int: ...
    @property
    def busy_seconds(self) -> float: ...


class Stats(Protocol):
    """Counters of an engine at one moment, since it started."""

    @property
    def gpus(self) -> Sequence[GpuStats]:
        """Each GPU by itself; all else is of all together."""
        ...

    @property
    def queued(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def used_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def kept_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def peak_blocks(self) -> Mapping[PoolId, int]: ...
    @property
    def regenerated_tokens(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def peak_device_bytes(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def weights_streamed_bytes(self) -> int: ...
    @property
    def cache_loaded_bytes(self) -> int: ...
    @property
    def expert_hits(self) -> int: ...
    @property
    def expert_loads(self) -> int: ...
    @property
    def expert_loaded_bytes(self) -> int: ...


class Generation(Protocol):
    """A request's output. Merges the deltas that the consumer has not taken yet."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def params(self) -> SamplingParams:
        """Settings in effect: `seed` and `max_tokens` filled in, and what exceeds context or vocabulary cut."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found and not computed, from the first output on."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    async def __anext__(self) -> Delta: ...

    async def gather(self, seconds: float, tokens: int | None, soonest: float | None = None) -> None:
        """Let output gather for `seconds`; return sooner with `tokens` of it, or once it has ended.

        Output that comes when `soonest` seconds have passed ends it too.
        """
        ...

    def close(self) -> None:
        """Abort if it is still live."""
        ...


class SubmitOptions(TypedDict, total=False):
    """What a submission may say beside the prompt and how to continue it."""

    request_id: str | None
    """None: one is made."""
    client: str
    """Clients with the same key share one fair share; empty where it is left out."""
    user: str
    """Users of one client with the same key share one part of its share; empty where it is left out."""
    max_wait: float | None
    """Seconds that the caller waits at most; None: for ever."""
    cache_salt: str
    """Those of equal salt share blocks; empty where it is left out."""


class Engine(Protocol):
    """An engine that has started."""

    @property
    def spec(self) -> Spec: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def gpus(self) -> Sequence[Gpu]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...

    async def submit(self, prompt: Prompt, params: SamplingParams, **options: Unpack[SubmitOptions]) -> Generation:
        """Queue a request, as `hsrpc.engine.engine.Engine.submit` does."""
        ...

    async def tokenize(self, prompt: str | Text | Chat, *, client: str = "") -> list[int]:
        """Token ids of a prompt, at `client`'s turn, as `hsrpc.engine.engine.Engine.tokenize` makes them."""
        ...

    async def render(self, chat: Chat, *, client: str = "") -> str:
        """Text of a conversation, at `client`'s turn, as `hsrpc.engine.engine.Engine.render` makes it."""
        ...

    async def detokenize(self, token_ids: Sequence[int], *, client: str = "", skip_special_tokens: bool = True) -> str:
        """Text of token ids, at `client`'s turn, as `hsrpc.engine.engine.Engine.detokenize` makes it."""
        ...

    def abort(self, request_id: str) -> bool: ...
    def stats(self) -> Stats: ...
    @property
    def default_params(self) -> SamplingParams: ...
    @property
    def failed_in_a_row(self) -> int: ...
    def heartbeat(self) -> float:
        """Seconds since a step last began while there is work; 0 when idle."""
        ...

    async def wait_failed(self) -> None: ...
