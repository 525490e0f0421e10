"""The log: records as text or JSON, and one line for each request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from enum import StrEnum

from hsrpc.server.failure import Outcome
from hsrpc.server.observation import ObservedCall
from hsrpc.server.ops.log_queue import LogQueue, write_to_stderr

_requests = logging.getLogger("hsrpc.request")
_FIELDS = "request"
"""Attribute of a record that has the request's fields."""


class LogFormat(StrEnum):
    """How a record is written."""

    TEXT = "text"
    JSON = "json"


def set_up_logs(
    form: LogFormat,
    level: str,
    count_dropped: Callable[[], None],
    write: Callable[[bytes], object] = write_to_stderr,
) -> None:
    """Have `write` called with hsrpc's records of `level` (such as INFO) and above, on a thread of its own.

    Libraries, which are not ours to explain, and warnings are heard from WARNING on, whatever lower level is asked for.
    `count_dropped` is called for each record that cannot be written in time.
    """
    handler = LogQueue(write, count_dropped)
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else TextFormatter())
    ours = logging.getLogger("hsrpc")
    ours.setLevel(level.upper())
    logging.basicConfig(level=max(ours.level, logging.WARNING), handlers=[handler])
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """A line for people; a request's fields as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        line = super().formatMessage(record)
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        return " ".join([line, *(f"{name}={_plain(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, _FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class RequestLog:
    """Writes one line when a call ends; prompts only if `prompts`."""

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts = prompts

    def started(self, call: ObservedCall) -> None:
        """Nothing is written yet."""

    def ended(self, call: ObservedCall) -> None:
        level = logging.ERROR if call.outcome is Outcome.INTERNAL else logging.INFO
        _requests.log(level, "request", extra={_FIELDS: self._fields(call)})

    def _fields(self, call: ObservedCall) -> dict[str, object]:
        finish, timings = call.finish, call.finish.timings if call.finish else None
        fields: dict[str, object | None] = {
            "request_id": call.request_id or None,
            "client": call.arrival.client,
            "model": call.model or None,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "status": call.outcome.value,
            "finish": finish.reason.value if finish else None,
            "queue_seconds": _rounded(timings.queue if timings else None),
            "ttft_seconds": _rounded(call.first_token_seconds),
            "total_seconds": _rounded(call.seconds),
            "preemptions": finish.usage.preemptions if finish else None,
            "error_id": call.error_id,
            "prompt": call.prompt if self._prompts else None,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _plain(value: object) -> str:
    """Text of a value: as it is where that is one word of printable characters, else quoted."""
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' ="\\') else json.dumps(text)
