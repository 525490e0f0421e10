"""Metrics, log and spans of one server, put together from its settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry

from hsrpc.plan.roofline import StepRecord
from hsrpc.server.config import ServerConfig
from hsrpc.server.engine_protocol import Engine
from hsrpc.server.observation import CallObserver
from hsrpc.server.ops.exposition import exposed
from hsrpc.server.ops.logs import RequestLog
from hsrpc.server.ops.metrics import CallMetrics, EngineMetrics, LoopMetrics, MethodMetrics, ProcessMetrics
from hsrpc.server.ops.tracing import Tracing, open_tracing

_MIN_SPAN_SECONDS = 1.0
"""Seconds for the last spans, however late it is."""
_LAG_PERIOD = 0.05
"""Seconds between samples of the event loop's lag."""


class Telemetry:
    """Enter it to listen for scrapes; give `observe_step` to the engine, `observers` and `count_call` to the server."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self.registry = CollectorRegistry()
        self._engine_metrics = EngineMetrics(self.registry, lambda: self._engine)
        self._loop_metrics = LoopMetrics(self.registry)
        self.count_call = MethodMetrics(self.registry).count
        process = ProcessMetrics(self.registry)
        self.count_dropped_log_line: Callable[[], None] = process.dropped_log_lines.inc
        self.count_failed_reload: Callable[[], None] = process.failed_reloads.inc
        self.count_cut = process.count_cut
        self._tracing: Tracing | None = open_tracing(config.otel_endpoint)
        self.observers: list[CallObserver] = [CallMetrics(self.registry), RequestLog(prompts=config.log_prompts)]
        if self._tracing is not None:
            self.observers.append(self._tracing)
        self.port: int | None = None
        """Port of the metrics, while entered."""
        self._stack = AsyncExitStack()
        self._end = 0.0

    def attach(self, engine: Engine) -> None:
        """The engine has started."""
        self._engine = engine

    def end_within(self, seconds: float) -> None:
        """The end has begun: spans that are left have that time, or the rest of it once nothing else is to be done."""
        self._end = time.monotonic() + seconds

    def observe_step(self, record: StepRecord) -> None:
        """A step has ended."""
        self._engine_metrics.observe_step(record)

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            ConfigError: the metrics port cannot be bound.
        """
        if self._config.metrics_port is not None:
            self.port = await self._stack.enter_async_context(
                exposed(self.registry, self._config.metrics_host, self._config.metrics_port)
            )
            await self._stack.enter_async_context(_sampling(self._loop_metrics))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close, max(self._end - time.monotonic(), _MIN_SPAN_SECONDS))


@asynccontextmanager
async def _sampling(metrics: LoopMetrics) -> AsyncIterator[None]:
    """Samples the event loop's lag."""
    task = asyncio.create_task(_sample(metrics))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _sample(metrics: LoopMetrics) -> None:
    while True:
        due = time.monotonic() + _LAG_PERIOD
        await asyncio.sleep(_LAG_PERIOD)
        metrics.observe_lag(max(0.0, time.monotonic() - due))
