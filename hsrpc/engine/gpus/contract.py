"""What the engine asks of the GPUs that compute its steps, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from hsrpc.device.device import DeviceMemory
from hsrpc.model.sampler import Sampled
from hsrpc.plan.machine import Machine
from hsrpc.request import TokenLogprob
from hsrpc.schedule.step import Packed, Scheduled

Task: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
"""Runs until it is cancelled."""


class StepResult(NamedTuple):
    """What a step gives."""

    sampled: list[Sampled]
    """Tokens in the order of `Step.sampling`."""
    scored: list[TokenLogprob | None]
    """Log-probabilities of prompt tokens, in the order of each mini-batch's `scores`; None: the logits were not finite.
    """


class Moved(NamedTuple):
    """What was copied and rebuilt since the start."""

    weight_bytes: int = 0
    """Copied to the device, experts on demand among them."""
    cache_bytes: int = 0
    regenerated_tokens: int = 0
    """Rows rebuilt from activations, all layers."""
    expert_hits: int = 0
    """Experts that steps needed and that were in a slot, each layer and group counted."""
    expert_loads: int = 0
    """Those that crossed the bus."""
    expert_bytes: int = 0


class GpuFacts(NamedTuple):
    """Which GPU one is, and what was found there before the plan was made."""

    uuid: str
    """As `Device.uuid`."""
    machine: Machine


class GpuUse(NamedTuple):
    """What one GPU has done since the start, and what it holds."""

    moved: Moved = Moved()
    memory: DeviceMemory = DeviceMemory()
    busy_seconds: float = 0.0
    """Time in which it did its parts of steps; in what is left of the steps' time it was done and others were not."""


S = TypeVar("S", bound=Packed)
"""A step as it is executed there."""


class Gpus(Protocol[S]):
    """One GPU or several, which hold a model's weights and caches and compute its steps."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def name(self) -> str:
        """Name for people, such as NVIDIA H100."""

    @property
    def tasks(self) -> Sequence[Task]:
        """What has to run while steps are executed; where one ends with an error, no step can be any more."""

    @property
    def warms_up(self) -> bool:
        """What is done for the first time takes long: kernels are compiled and loaded."""

    @property
    def runs_ahead(self) -> bool:
        """Steps in place can be launched before the tokens of the step before are known."""

    @property
    def num_queued(self) -> int:
        """Steps, and parts of them, that are handed to a task and not taken, and results not taken."""

    def assemble(self, scheduled: Scheduled) -> S:
        """The step, to be executed next; it takes milliseconds for a large batch."""

    async def execute(self, step: S, ahead: S | None = None) -> StepResult | None:
        """What the step gives; None where it was abandoned.

        `ahead` is launched before they are known; it is the next step to be executed.

        Raises:
            OutOfDeviceMemoryError: there are none; all is ready for the next step.
        """

    def moved(self) -> Moved:
        """Counters of all together at this moment."""

    def uses(self) -> Sequence[GpuUse]:
        """What each has done, and holds, at this moment."""

    def reset_counts(self) -> None:
        """Count from 0 again."""

    async def close(self) -> Callable[[], None]:
        """Give host memory back; the tasks have ended.

        What it returns gives device memory back: to be called once nobody refers to what was on it.
        """
