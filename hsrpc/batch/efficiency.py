"""How near a run of an engine came to the limit of its machine."""

from __future__ import annotations

from hsrpc.plan.hardware import Hardware
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.sizes import ModelSizes


class Efficiency:
    """Sums up the steps that it is told of, from `begin` on."""

    def __init__(self) -> None:
        self._model: tuple[ModelSizes, Hardware, bool, float] | None = None
        self.seconds = 0.0
        self._limit = 0.0
        self._requests = 0.0

    def begin(self, sizes: ModelSizes, hardware: Hardware, *, absorbs: bool, gathered_bytes: float = 0.0) -> None:
        """Steps count from now on, beside the limit of these rates."""
        self._model = sizes, hardware, absorbs, gathered_bytes

    def __call__(self, record: StepRecord) -> None:
        """Take a step that the engine has done."""
        if self._model is None:
            return
        sizes, hardware, absorbs, gathered = self._model
        self.seconds += record.seconds
        self._limit += roofline(record, sizes, hardware, absorbs=absorbs, gathered_bytes=gathered).seconds
        self._requests += record.num_requests * record.seconds

    @property
    def share(self) -> float | None:
        """Part of the steps' time that the limit would have taken; None: there were no steps."""
        return self._limit / self.seconds if self.seconds else None

    @property
    def mean_batch(self) -> float:
        """Requests that ran at once, on average over time."""
        return self._requests / self.seconds if self.seconds else 0.0
