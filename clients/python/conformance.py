"""The conformance program of the Python client: requests as JSON lines in, results as JSON lines out."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from hsrpc.client import CallError, Client
from hsrpc.prompt import Chat, Prompt
from hsrpc.request import Delta
from hsrpc.v1.generation_pb2 import GenerateRequest

Json = dict[str, Any]
_POLL_SECONDS = 0.01


def main() -> None:
    """Answer each line of the input."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"id": request["id"], "results": answer(request)}), flush=True)


def answer(request: Json) -> list[Json]:
    """Results of all streams and repeats, on one client."""
    tls = request["tls"] or {}
    ca, cert, key = (tls.get(name) for name in ("ca", "cert", "key"))
    with Client(request["target"], token=request["token"], tls_ca=ca, tls_cert=cert, tls_key=key) as client:
        results = []
        for repeat in range(request["repeat"]):
            if repeat and request["pause_file"]:
                pause(Path(request["pause_file"]))
            with ThreadPoolExecutor(request["streams"]) as threads:
                calls = [threads.submit(call, client, request) for _ in range(request["streams"])]
                results += [each.result() for each in calls]
        return results


def pause(file: Path) -> None:
    """Tell that the client waits, and wait."""
    file.with_name(f"{file.name}.waiting").touch()
    while not file.exists():
        time.sleep(_POLL_SECONDS)


def call(client: Client, request: Json) -> Json:
    """Result of one call."""
    prompt, settings = arguments(request["request"])
    if request["deadline_s"] is not None:
        settings["timeout"] = request["deadline_s"]
    result: Json = {"deltas": 0, "cancelled": False, "error": None}
    deltas: list[Delta] = []
    prompt_tokens = 0
    try:
        if request["call"].endswith("text"):
            whole = client.complete(prompt, **settings)
            deltas.append(Delta(whole.text, whole.token_ids, whole.logprobs, whole.finish))
        else:
            with client.generate(prompt, **settings) as stream:
                for delta in stream:
                    deltas.append(delta)
                    result["deltas"] += bool(delta.text or delta.token_ids)
                    if result["deltas"] == request["cancel_after"]:
                        result["cancelled"] = True
                        break
                prompt_tokens = stream.start.prompt_tokens if stream.start else 0
    except CallError as error:
        result["error"] = failure(error)
    return result | output(deltas, prompt_tokens)


def arguments(request: Json) -> tuple[Prompt, Json]:
    """The prompt and the settings that a message has, as the client takes them."""
    message = ParseDict(request, GenerateRequest())
    settings: Json = {}
    for home in (message.sampling, message.stopping, message.output):
        for field, value in home.ListFields():
            if field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
                settings[field.name] = value.ToTimedelta().total_seconds()
            else:
                settings[field.name] = value
    settings |= {name: getattr(message, name) for name in ("request_id", "model", "priority") if message.HasField(name)}
    return prompt_of(message), settings


def prompt_of(message: GenerateRequest) -> Prompt:
    """The prompt of a message."""
    if message.HasField("text"):
        return message.text
    if message.HasField("token_ids"):
        return list(message.token_ids.ids)
    entry = MessageToDict(message.chat, preserving_proto_field_name=True)
    return Chat(entry.pop("messages"), **entry)


def output(deltas: list[Delta], prompt_tokens: int) -> Json:
    """What a result has of the output."""
    finish = deltas[-1].finish if deltas else None
    matched = finish.matched_stop if finish else None
    return {
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [token_id for delta in deltas for token_id in delta.token_ids],
        "logprobs": [
            {
                "token_id": each.token_id,
                "logprob": each.logprob,
                "rank": each.rank,
                "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in each.top],
            }
            for delta in deltas
            for each in delta.logprobs
        ],
        "prompt_tokens": finish.usage.prompt_tokens if finish else prompt_tokens,
        "completion_tokens": finish.usage.completion_tokens if finish else 0,
        "finish_reason": f"FINISH_REASON_{finish.reason.value}" if finish else None,
        "stop_string": matched if isinstance(matched, str) else None,
    }


def failure(error: CallError) -> Json:
    """What a result has of an error."""
    return {
        "code": error.code.name,
        "message": error.message,
        "fields": [{"field": field, "description": text} for field, text in error.fields.items()],
        "retry_delay_s": error.retry_after,
        "reason": error.reason,
        "domain": error.domain,
        "metadata": error.metadata,
    }


if __name__ == "__main__":
    main()
