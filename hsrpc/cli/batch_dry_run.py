"""hsrpc batch --dry-run: what an input holds, how long it would take, and what to set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing

from hsrpc.batch.count import Count, count_tokens
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.progress import told_time
from hsrpc.batch.windows import Windows
from hsrpc.cli.batch_report import advice_rows, row
from hsrpc.cli.options import engine_config
from hsrpc.cli.source import running_source
from hsrpc.source import Remote


def dry_run(options: argparse.Namespace, names: Sequence[str], max_bytes: int) -> None:
    """Count, predict, print; nothing is read of what an output has already."""
    with closing(Ledger()) as ledger:
        windows = Windows(options.input, ledger, max_bytes, options.shard)
        lines = _embedded(options, names, windows) if options.target is None else _remote(options, windows)
    for line in lines:
        print(line)


def _embedded(options: argparse.Namespace, names: Sequence[str], windows: Windows) -> list[str]:
    from hsrpc.batch.outlook import load_of, outlook
    from hsrpc.cli.loop import run_loop
    from hsrpc.engine.startup import make_plan, open_tokenizer

    config = engine_config(options)
    planned = make_plan(config)
    served = names or (planned.spec.name,)

    async def serves(name: str) -> bool:
        return name in served

    with closing(open_tokenizer(planned, config)) as tokenizer:
        count = run_loop(count_tokens(windows, tokenizer.encode, serves, planned.planner.traffic.output))
    plan, sizes = planned.plan, planned.spec.sizes
    lines = [*_count_rows(count, planned.planner.traffic.output)]
    lines.append(row("plan", f"{plan.max_batch} requests at once, of at most {plan.max_model_len} tokens each"))
    lines += _context_rows(count, plan.max_model_len, sizes.context_length)
    if count.requests:
        found = outlook(planned.question, sizes, plan, load_of(count), with_advice=not options.no_advice)
        lines.append(row("time, as set", f"at most {told_time(found.seconds)}, predicted"))
        lines += advice_rows("would help", found)
    return lines


def _remote(options: argparse.Namespace, windows: Windows) -> list[str]:
    with running_source(options) as (run, source):
        assert isinstance(source, Remote)
        model, info = run(source.client.get_model()), run(source.client.get_server_info())
        output = max(1, info.plan.expected_context // 4)
        count: Count = run(count_tokens(windows, source.client.tokenize, source.serves, output))
    lines = [*_count_rows(count, output)]
    lines.append(row("server", f"{info.plan.max_batch} requests at once, of at most {model.max_model_len} tokens each"))
    lines += _context_rows(count, model.max_model_len, model.context_length)
    seconds = count.output_tokens / info.plan.predicted_tokens_per_second
    context = info.plan.expected_context
    lines.append(
        row("time", f"at most {told_time(seconds)}, as the server predicts with {context} tokens of each request")
    )
    return lines


def _count_rows(count: Count, output: int) -> Iterator[str]:
    yield row("lines", f"{count.lines:,}, {count.refused:,} of them to be refused")
    for problem in count.problems:
        yield row("", problem)
    yield row("requests", f"{count.requests:,}")
    mean = count.prompt_tokens / max(1, count.requests)
    yield row("prompt tokens", f"{count.prompt_tokens:,}: {mean:,.0f} each, {count.longest_prompt:,} at most")
    if count.shared_tokens:
        yield row("of these shared", f"{count.shared_tokens:,} with the prompt that runs before")
    assumed = f"; {output} each for {count.unbounded:,} without max_tokens" if count.unbounded else ""
    yield row("output tokens", f"at most {count.output_tokens:,}{assumed}")


def _context_rows(count: Count, max_model_len: int, context_length: int) -> Iterator[str]:
    """The longest request, and whether it fits."""
    if not count.requests:
        return
    yield row("longest request", f"{count.longest:,} tokens, line {count.longest_line}")
    if count.longest <= max_model_len:
        return
    if max_model_len < context_length:
        yield row("to set", f"--max-model-len {min(count.longest, context_length)}, or the longest are cut or refused")
    else:
        yield row("", f"more than the model's {context_length:,}: outputs end there, longer prompts are refused")
