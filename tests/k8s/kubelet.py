"""A kubelet for one pod on this machine: starts its containers, probes them, ends them, as Kubernetes documents it.

    async with start(pod) as running:
        await running.ready(60)
        ended = await running.delete()

Real time, real processes. A container that the kubelet would start again is a failure here: `PodError` tells why, with
the end of its log.
"""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.k8s.pod import ADDRESS, Container, Pod, UnknownError
from tests.k8s.rendering import Manifest

MIN_GRACE = 2.0
"""Seconds from SIGTERM to SIGKILL, even if the hook before took all of the grace period."""
_WATCH_INTERVAL = 0.2
"""Seconds between looks at a container's memory."""
_LOG_LINES = 30


class PodError(Exception):
    """The pod does not do what its manifest says."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended."""

    name: str
    code: int
    """Exit code; 128 + n after signal n."""
    seconds: float
    """From the deletion of the pod."""
    log: str


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe, with the defaults of Kubernetes; times in seconds."""

    spec: Manifest
    container: Container
    delay: float
    period: float
    timeout: float
    successes: int
    """In a row, after which it is taken to succeed."""
    failures: int
    """In a row, after which it is taken to fail."""

    @classmethod
    def of(cls, container: Container, kind: str) -> Probe | None:
        """The probe of a kind; None: the container has none."""
        spec = container.spec.get(f"{kind}Probe")
        if spec is None:
            return None
        return cls(
            spec,
            container,
            delay=spec.get("initialDelaySeconds", 0),
            period=spec.get("periodSeconds", 10),
            timeout=spec.get("timeoutSeconds", 1),
            successes=spec.get("successThreshold", 1),
            failures=spec.get("failureThreshold", 3),
        )

    async def succeeds(self) -> bool:
        """Ask once."""
        try:
            async with asyncio.timeout(self.timeout):
                return await _act(self.spec, self.container, self.timeout)
        except TimeoutError:
            return False


async def _act(spec: Manifest, container: Container, timeout: float) -> bool:  # noqa: ASYNC109 - the probe's own
    """Do what a probe or hook says; True: it succeeded."""
    if "grpc" in spec:
        return await _asks_grpc(container.port(spec["grpc"]["port"]), spec["grpc"].get("service", ""), timeout)
    if "httpGet" in spec:
        return await asyncio.to_thread(_gets, spec["httpGet"], container, timeout)
    if "tcpSocket" in spec:
        return await _connects(container.port(spec["tcpSocket"]["port"]))
    if "exec" in spec:
        command = container.place.arguments(spec["exec"]["command"])
        process = await asyncio.create_subprocess_exec(*command, cwd=container.folder, env=container.env)
        try:
            return await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
    if "sleep" in spec:
        await asyncio.sleep(spec["sleep"]["seconds"])
        return True
    raise UnknownError(f"probe or hook {sorted(spec)}")


async def _asks_grpc(port: int, service: str, seconds: float) -> bool:
    """Plain text, a connection of its own each time, and SERVING alone is well."""
    async with grpc.aio.insecure_channel(f"{ADDRESS}:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _gets(spec: Manifest, container: Container, seconds: float) -> bool:
    """Any answer from 200 to 399 is well; certificates are not looked at."""
    scheme, port = spec.get("scheme", "HTTP").lower(), container.port(spec["port"])
    headers = {each["name"]: each["value"] for each in spec.get("httpHeaders", [])}
    url = f"{scheme}://{ADDRESS}:{port}{spec.get('path', '/')}"
    context = ssl._create_unverified_context() if scheme == "https" else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds, context=context):
            return True
    except (OSError, HTTPException):
        return False


async def _connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(ADDRESS, port)
    except OSError:
        return False
    writer.close()
    return True


@dataclass(slots=True)
class _Running:
    """A container's process, and what its probes have found."""

    container: Container
    process: asyncio.subprocess.Process
    log: Path
    supervised: asyncio.Task[None] = field(init=False)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """The startup probe has succeeded, or there is none."""
    ready: bool = False
    deleted: bool = False
    terminated: asyncio.Event = field(default_factory=asyncio.Event)
    """SIGTERM has been sent."""
    peak_memory: int = 0
    """Bytes that cannot be reclaimed, at most so far."""

    def __post_init__(self) -> None:
        self.supervised = asyncio.create_task(self._supervise())

    def ended(self, began: float) -> Ended:
        """How the process ended; `began`: clock of what led to it."""
        code = self.process.returncode or 0
        return Ended(self.container.name, _exit_code(code), time.monotonic() - began, self._tail())

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def error(self, problem: str) -> PodError:
        return PodError(f"{self.container.name}: {problem}\n{' '.join(self.container.command)}\n{self._tail()}")

    async def _supervise(self) -> None:
        """Probe and watch until the process ends; nobody may have to start it again."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            code = await self.process.wait()
            watching.cancel()
        self.ready = False
        if not self.deleted and (code != 0 or self.container.restarts):
            raise self.error(f"exited with {_exit_code(code)}")

    async def _watch(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_memory())
            if startup := Probe.of(self.container, "startup"):
                await self._until_started(startup)
            self.started.set()
            if liveness := Probe.of(self.container, "liveness"):
                group.create_task(self._probe_liveness(liveness))
            if readiness := Probe.of(self.container, "readiness"):
                group.create_task(self._probe_readiness(readiness))
            self.ready = readiness is None

    async def _until_started(self, probe: Probe) -> None:
        async for succeeds in _outcomes(probe):
            if succeeds:
                return
            if not self.deleted:
                raise self.error(f"startup probe failed {probe.failures} times, {probe.period:g} s apart")

    async def _probe_readiness(self, probe: Probe) -> None:
        """Goes on while the pod is being deleted."""
        async for succeeds in _outcomes(probe):
            self.ready = succeeds

    async def _probe_liveness(self, probe: Probe) -> None:
        """Counts no more once the pod is being deleted."""
        async for succeeds in _outcomes(probe):
            if not succeeds and not self.deleted:
                raise self.error(f"liveness probe failed {probe.failures} times, {probe.period:g} s apart")

    async def _watch_memory(self) -> None:
        limit = self.container.memory
        while True:
            self.peak_memory = max(self.peak_memory, await asyncio.to_thread(_memory, self.process.pid))
            if limit is not None and self.peak_memory > limit:
                raise self.error(f"OOMKilled: {self.peak_memory} bytes, and the limit is {limit}")
            await asyncio.sleep(_WATCH_INTERVAL)

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self, deadline: float) -> None:
        """Run the hook, then SIGTERM, then SIGKILL once the grace period is over, unless the process has ended."""
        if self.process.returncode is not None:
            return
        before = self.container.spec.get("lifecycle", {}).get("preStop")
        if before is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await _act(before, self.container, deadline - asyncio.get_running_loop().time())
        self._terminate()
        try:
            async with asyncio.timeout_at(max(deadline, asyncio.get_running_loop().time() + MIN_GRACE)):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def _terminate(self) -> None:
        """Send SIGTERM: nothing comes of it where the first process of a container does not handle it."""
        if self.process.returncode is None and _handles(self.process.pid, signal.SIGTERM):
            self.process.send_signal(signal.SIGTERM)
        self.terminated.set()


async def _outcomes(probe: Probe) -> AsyncIterator[bool]:
    """What the probe is taken for, whenever it was asked often enough."""
    await asyncio.sleep(probe.delay)
    last, count = False, 0
    loop = asyncio.get_running_loop()
    while True:
        asked = loop.time()
        succeeds = await probe.succeeds()
        last, count = succeeds, count + 1 if succeeds is last else 1
        if count >= (probe.successes if succeeds else probe.failures):
            yield succeeds
        await asyncio.sleep(max(0.0, asked + probe.period - loop.time()))


@dataclass(slots=True)
class RunningPod:
    """A pod whose containers have been started."""

    pod: Pod
    _sidecars: list[_Running] = field(default_factory=list)
    _containers: list[_Running] = field(default_factory=list)

    @property
    def _all(self) -> list[_Running]:
        return [*self._sidecars, *self._containers]

    async def ready(self, seconds: float) -> None:
        """Wait until every container is ready.

        Raises:
            PodError: one failed before, or the time is over.
        """
        await self._until(lambda: all(each.ready for each in self._all), seconds, "is not ready")

    async def _until(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise self._all[-1].error(f"{problem} after {seconds:g} s")
            await asyncio.sleep(0.02)

    def check(self) -> None:
        """Raise what failed, if anything did."""
        for task in (each.supervised for each in self._all):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise _only(error)

    def address(self, port: int) -> str:
        """HOST:PORT on this machine of a port of the pod's first container."""
        return f"{ADDRESS}:{self.pod.containers[0].port(port)}"

    async def terminated(self) -> None:
        """Wait until SIGTERM has been sent to the containers."""
        for each in self._containers:
            await each.terminated.wait()

    async def unready(self, seconds: float) -> None:
        """Ask the readiness probes, out of turn, until one fails.

        Raises:
            PodError: none has within that time.
        """
        deadline = time.monotonic() + seconds
        while await self.answers_ready():
            if time.monotonic() > deadline:
                raise self._all[-1].error(f"is still ready after {seconds:g} s")

    async def answers_ready(self) -> bool:
        """Ask all readiness probes now, out of turn; whether all succeed."""
        probes = [Probe.of(each.container, "readiness") for each in self._all]
        return all([await probe.succeeds() for probe in probes if probe is not None])

    @property
    def peak_memory(self) -> dict[str, int]:
        """Bytes of each container that could not be reclaimed, at most so far."""
        return {each.container.name: each.peak_memory for each in self._all}

    async def delete(self) -> list[Ended]:
        """End the pod within its grace period: containers together, then sidecars from the last on.

        Raises:
            PodError: a container failed before.
        """
        self.check()
        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.pod.grace
        for each in self._all:
            each.deleted = True
        await asyncio.gather(*(each.end(deadline) for each in self._containers))
        ended = [each.ended(began) for each in self._containers]
        for each in reversed(self._sidecars):
            await each.end(deadline)
            ended.append(each.ended(began))
        return ended

    async def completion(self, seconds: float) -> list[Ended]:
        """Wait until the containers have ended by themselves, as those of a Job do; sidecars are ended then.

        Raises:
            PodError: one ended with another code than 0, or the time is over.
        """
        await self._until(lambda: all(each.supervised.done() for each in self._containers), seconds, "runs on")
        return await self.delete()


@asynccontextmanager
async def start(pod: Pod) -> AsyncIterator[RunningPod]:
    """Start a pod's containers: each sidecar once the one before it has started. Nothing of them stays behind."""
    running = RunningPod(pod)
    try:
        for container in pod.sidecars:
            running._sidecars.append(await _start(container))
            await running._until(running._sidecars[-1].started.is_set, 600, "has not started")
        for container in pod.containers:
            running._containers.append(await _start(container))
        yield running
    finally:
        for each in running._all:
            each.kill()
            each.supervised.cancel()
        await asyncio.gather(*(each.supervised for each in running._all), return_exceptions=True)
        await asyncio.gather(*(each.process.wait() for each in running._all))


async def _start(container: Container) -> _Running:
    log = container.folder / f"{container.name}.log"
    with log.open("wb") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *container.command,
                cwd=container.folder,
                env=container.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise PodError(f"{container.name}: {container.command[0]} is not in the image") from error
    return _Running(container, process, log)


def _exit_code(code: int) -> int:
    """As a container has it: 128 + n after signal n."""
    return code if code >= 0 else 128 - code


def _only(error: BaseException) -> BaseException:
    """The first error of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process handles a signal; the kernel keeps others from the first process of a container."""
    with suppress(OSError):
        [caught] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def _memory(pid: int) -> int:
    """Bytes of a process and those that it started, without what files give back."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    total, members = 0, [pid]
    for member in members:
        members += parents.get(member, [])
        with suppress(OSError):
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{member}/status").read_text().splitlines())
            total += sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)
    return total
