"""Tables of the documents, each made of raw results."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any, NamedTuple

from benchmarks.comparison import Comparison
from benchmarks.raw_results import Record
from hsrpc.config import format_bytes, format_rate

Row = tuple[str, ...]
NAMES = {
    "opt-1.3b": "OPT-1.3B",
    "opt-2.7b": "OPT-2.7B",
    "opt-6.7b": "OPT-6.7B",
    "opt-13b": "OPT-13B",
    "opt-30b": "OPT-30B",
    "llama-2-13b": "Llama-2-13B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "gemma-3-27b": "Gemma-3-27B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "llama-3.3-70b": "Llama-3.3-70B",
    "qwen3-32b": "Qwen3-32B",
    "gpt-oss-120b": "gpt-oss-120b",
    "gpt-oss-20b:mxfp4": "gpt-oss-20b, mxfp4",
}
OWN = "hsrpc"
DISTINCT = 0.8
"""Share of distinct 4-grams from which an output is no loop."""


def drafts_replay(records: Sequence[Record]) -> Iterator[Row]:
    """Steps of each setting beside the formula; the model and its batch once."""
    for record in records:
        run, alone = record.result, None
        if "failure" in run:
            continue
        model = f"{NAMES.get(run['model'], run['model'])}, {run['batch']}"
        for each in run["settings"]:
            rate = each["tokens_per_second"]
            alone = alone or rate
            yield (
                model,
                f"{each['drafts']}, {each['acceptance']:.0%}" if each["drafts"] else "none",
                f"{each['tokens_per_request']:.2f}",
                f"{each['step_seconds'] * 1e3:.0f} ms",
                f"{each['predicted_step_seconds'] * 1e3:.0f} ms",
                f"{each['limit_seconds'] * 1e3:.0f} ms",
                f"{rate:.1f}",
                f"{each['predicted_tokens_per_second']:.1f}",
                f"{rate / alone:.2f}",
            )
            model = ""


def policies(records: Sequence[Record]) -> Iterator[Row]:
    """Whole decode steps under each policy."""
    for record in records:
        setting = record.result["setting"]
        model = f"{NAMES[setting['shape']]}, {setting['batch']} x {setting['prompt']}"
        for cell in record.result["policies"]:
            run = cell["result"]
            copies, predicted = f"{run['sustained_efficiency']:.2f}", ms(run["predicted_step_seconds"])
            yield (model, _policy(cell), *_step(cell), copies, predicted, rate(cell["tokens_per_second"]))
            model = ""


def prefixes(records: Sequence[Record]) -> Iterator[Row]:
    """Pairs of decode steps: nothing shared, then a prefix, and how many times the tokens/s that makes."""
    for alone, sharing in zip(records[::2], records[1::2], strict=True):
        [before], [after] = alone.result, sharing.result
        words = sharing.header.command.split()
        times = after["decode_tokens_per_second"] / before["decode_tokens_per_second"]
        where = "on the host" if "--placement" in words else "planned"
        for run, name, shared, gain in (
            (before, f"{NAMES[before['model']]}, {before['batch']}, {where}", "0", ""),
            (after, "", words[words.index("--shared-prefix") + 1], f"**{times:.2f}**"),
        ):
            resident, busy = f"{100 * run['resident_share']:.0f} %", f"{100 * run['device_busy_share']:.0f} %"
            yield name, shared, resident, *_step(run), busy, rate(run["decode_tokens_per_second"]), gain


def fp8_products(records: Sequence[Record]) -> Iterator[Row]:
    """A layer's products of fp8 weights: decoded and multiplied in 16 bits, and codes with codes."""
    [record] = records
    forms, seen = {"fp8": "blocks of 128 x 128", "fp8-rows": "a scale for each row"}, ""
    for line in record.result:
        name, times = f"{NAMES[line['model']]}, {forms[line['weights']]}", ("decode", "products", "codes", "rounding")
        errors = (f"{100 * line[part]:.1f} %" for part in ("products_error", "codes_error"))
        yield "" if name == seen else name, f"{line['rows']:,}", *(f"{line[part]:.2f} ms" for part in times), *errors
        seen = name


def coding(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps with weights as they are and coded."""
    seen = ""
    for record in records:
        [run] = record.result
        weights = "coded without loss" if run["codes_weights"] else "as they are"
        copies, predicted = f"{run['sustained_efficiency']:.2f}", ms(run["predicted_step_seconds"])
        model = f"{NAMES[run['model']]}, {run['batch']} requests"
        model, seen = ("" if model == seen else model), model
        yield (model, weights, *_step(run), copies, predicted, rate(run["decode_tokens_per_second"]))


def mixtures(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps of mixtures of experts and of layers that differ, and what is cached."""
    for record in records:
        [run] = record.result
        weights, predicted = "coded" if run["codes_weights"] else "as they are", ms(run["predicted_step_seconds"])
        if run["expert_hits"]:
            hits, assumed = (f"{100 * run[name]:.0f} %" for name in ("expert_hit_rate", "expected_hit_rate"))
            weights = f"on demand, {hits} hits"
            predicted = f"{ms(_predicted_at_hits(run))}, {predicted} at {assumed}"
        words = record.header.command.split()
        latents = words[words.index("--latent-attention") + 1] if "--latent-attention" in words else None
        caches = {None: run["policy"], "absorb": "latents, absorbed", "rebuild": "latents, rebuilt"}[latents]
        memory = f"{run['device_budget'] / 2**30:.0f} GiB"
        if not run["codes_weights"] and run["resident_share"] == 1:
            weights = "none"
        model = f"{NAMES[run['model']]}, {run['batch']}"
        yield (
            model,
            memory,
            caches,
            weights,
            *_step(run),
            predicted,
            rate(run["decode_tokens_per_second"]),
        )


def _predicted_at_hits(run: Mapping[str, Any]) -> float:
    """Seconds of the predicted step, had as many experts been hits as were.

    Where the run does not say it yet: less the loads of those that were hits beyond what the plan assumes.
    """
    if "predicted_at_hits_seconds" in run:
        return float(run["predicted_at_hits_seconds"])
    needed = (run["expert_hits"] + run["expert_loads"]) / run["num_steps"]
    each = run["expert_loaded_bytes"] / run["expert_loads"] / run["hardware"]["load_bandwidth"]
    spared = (run["expert_hit_rate"] - run["expected_hit_rate"]) * needed * each
    return float(run["predicted_step_seconds"] - spared)


def quantized(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps of quantised weights."""
    for record in records:
        [run] = record.result
        shape, _, form = run["model"].partition(":")
        predicted, tokens = ms(run["predicted_step_seconds"]), rate(run["decode_tokens_per_second"])
        yield (f"{NAMES[shape]}, {run['batch']}", form, *_step(run), predicted, tokens)


def caches(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps of cached activations as they are computed, and in 8 bits."""
    for record in records:
        [run] = record.result
        form = "in 8 bits" if "--cache-format" in record.header.command else "as computed"
        resident, busy = f"{100 * run['resident_share']:.0f} %", f"{100 * run['device_busy_share']:.0f} %"
        predicted, tokens = ms(run["predicted_step_seconds"]), rate(run["decode_tokens_per_second"])
        yield (f"{NAMES[run['model']]}, {run['batch']}", form, resident, *_step(run), busy, predicted, tokens)


def code_kernels(records: Sequence[Record]) -> Iterator[Row]:
    """How fast a layer of codes is decoded."""
    [record] = records
    for case in record.result["cases"]:
        times = f"{case['milliseconds']:.2f} ms", f"{case['rate'] / 1e12:.2f} TB/s", f"{case['share']:.2f}"
        yield (NAMES[case["shape"]], case["format"], *times)


def resident(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps with everything on the device."""
    for record in records:
        [run] = record.result
        times = run["step_seconds"], run["predicted_step_seconds"]
        beside = f"{times[1] / times[0]:.2f}"
        yield (f"{NAMES[run['model']]}, {run['batch']}", *map(ms, times), beside, rate(run["decode_tokens_per_second"]))


def products(records: Sequence[Record]) -> Iterator[Row]:
    """A layer's products over rows."""
    for model in (model for record in records for model in record.result):
        name = NAMES[model["model"]]
        for line in model["rows"]:
            times = (f"{line[part] * 1e6:.0f} us" for part in ("seconds", "read", "compute"))
            yield name, f"{line['rows']:,}", *times, f"{line['exponent']:.1f}" if line["exponent"] else ""
            name = ""


def few_rows(records: Sequence[Record]) -> Iterator[Row]:
    """A layer's products with codes as they lie, and with decoded weights, over rows."""
    for model in (model for record in records for model in record.result):
        name = f"{NAMES[model['model']]}, {model['format']}"
        for line in model["rows"]:
            yield name, f"{line['rows']:,}", *(f"{line[part] * 1e6:.0f} us" for part in ("fused", "decoded", "plain"))
            name = ""


def structured_output(records: Sequence[Record]) -> Iterator[Row]:
    """Processor time of each library, by constraint."""
    [record] = records
    for cases in zip(*(library["cases"] for library in record.result), strict=True):
        times = [
            text
            for case in cases
            for text in (
                f"{case['compile'] * 1e3:.1f} ms",
                *(f"{case[part] * 1e6:,.0f} us" for part in ("mask_mean", "mask_max")),
            )
        ]
        yield cases[0]["name"], str(cases[0]["tokens"]), *times


def experts(records: Sequence[Record]) -> Iterator[Row]:
    """Hit rates of experts on demand, of a random model and of choices that are drawn: a column for the slots."""
    [record] = records
    for batch in dict.fromkeys(cell["batch"] for cell in record.result["cells"]):
        cells = [cell for cell in record.result["cells"] if cell["batch"] == batch]
        yield (f"{batch}: hits", *(f"{cell['hit_rate']:.0%}" for cell in cells))
        yield ("hits of drawn choices", *(f"{cell['drawn_hit_rate']:.0%}" for cell in cells))
        yield ("loads a layer", *(f"{cell['loads']:.1f}" for cell in cells))


def recompute(records: Sequence[Record]) -> Iterator[Row]:
    """Decode steps with a growing part of the tokens recomputed."""
    layers = {"opt-6.7b": 32, "opt-13b": 40, "opt-30b": 48}
    for record in records:
        steps, busy = [], []
        for run in record.result:
            rebuilt = run["regenerated_tokens"] / layers[run["model"]]
            share = run["recomputed_tokens"] / (run["recomputed_tokens"] + rebuilt)
            steps.append(f"{share:.2f}: {run['step_seconds'] * 1e3:.0f}")
            busy.append(f"{run['device_busy_share']:.2f}")
        run = record.result[0]
        yield f"{NAMES[run['model']]}, {run['batch']}", "; ".join(steps), ", ".join(busy)


def sweeps(records: Sequence[Record]) -> Iterator[Row]:
    """Steps and predictions over the activation share, with the planner's choice."""
    for record in records:
        cells = {cell["name"]: cell for cell in record.result}
        chosen = cells.pop("planner")
        in_order = [cells[f"share {tenths / 10}"] for tenths in range(11)] + [chosen]
        share = f" ({chosen['plan']['activation_share']:.2g})"
        steps = [f"{cell['step_seconds'] * 1e3:.0f}" for cell in in_order]
        ratios = [f"{cell['predicted_over_measured']:.2f}" for cell in in_order]
        yield (f"{NAMES[chosen['model']]}: step, ms", *steps[:-1], steps[-1] + share)
        yield ("predicted / measured", *ratios)


def grids(records: Sequence[Record]) -> Iterator[Row]:
    """The planner's choice beside other batches and placements."""
    for record in records:
        chosen, *others = record.result
        memory = chosen["setting"]["gpu_memory"].replace("GiB", " GiB")
        rates = "; ".join(f"{cell['plan']['batch']}: {rate(cell['tokens_per_second'])}" for cell in others)
        yield (
            f"{NAMES[chosen['model']]}, {memory}",
            _placement(chosen["plan"]),
            ms(chosen["step_seconds"]),
            f"{chosen['predicted_over_measured']:.2f}",
            rate(chosen["tokens_per_second"]),
            rates,
        )


def prompts(records: Sequence[Record]) -> Iterator[Row]:
    """Prompts while all weights stream."""
    for record in records:
        [run] = record.result
        tokens = record.header.command.split("--prompt ")[1].split()[0]
        launch = f"{run['hardware']['launch_time'] * 1e3:.2f} ms"
        coded = "coded" if run.get("codes_weights") else "as they are"
        per_second, share = rate(run["prefill_tokens_per_second"]), f"{run['prefill_gemm_share']:.2f}"
        yield f"{NAMES[run['model']]}, {tokens}", coded, per_second, share, launch


def mixed(records: Sequence[Record]) -> Iterator[Row]:
    """Steps of prompts and decoding together."""
    for record in records:
        [run] = record.result
        steps = run["step_times"]
        yield (
            record.name.partition("/")[2].replace("-", " "),
            f"{len(steps)}, {ms(min(steps))} to {ms(max(steps))}",
            f"{run['efficiency']:.2f}",
            f"{run['recomputed_tokens'] / len(steps):,.0f}",
            str(run["preemptions"]),
            f"{run['loop_lag_p99'] * 1e3:.1f} ms",
        )


def peers(records: Sequence[Record]) -> Iterator[Row]:
    """Total throughput beside each peer, in the same case."""
    for record in records:
        best = _best(record.result)
        ratios: dict[str, list[float]] = {}
        for (model, system), (setup, outcome) in best.items():
            if system == OWN:
                continue
            own = best[model, OWN][1]
            ratio = _total(own) / _total(outcome)
            ratios.setdefault(system, []).append(ratio)
            yield (
                setup["case"],
                f"{NAMES[model]}, {_requests(own['batch'], outcome['batch'])}",
                system,
                *_of_peer(own),
                *_of_peer(outcome),
                f"{ratio:.2f}",
            )
        for system, found in ratios.items():
            if len(found) > 1:
                yield (setup["case"], "geometric mean", system, *[""] * 6, f"**{geometric_mean(found):.2f}**")


def grpc(records: Sequence[Record]) -> Iterator[Row]:
    """The same requests embedded and through the server, medians."""
    [record] = records
    for way, label in (("embedded", "embedded"), ("grpc", "through gRPC")):
        samples = [sample for sample in record.result["samples"] if sample["way"] == way]

        def typical(name: str, samples: Sequence[Any] = samples) -> float:
            return float(median(sample[name] for sample in samples))

        yield (
            label,
            rate(typical("tokens_per_second")),
            rate(typical("full_tokens_per_second")),
            f"{typical('step_seconds') * 1e3:.2f} ms",
            f"{typical('loop_lag_p99') * 1e3:.1f} ms",
            f"{typical('loop_cores'):.2f}",
        )


def gateway(records: Sequence[Record]) -> Iterator[Row]:
    """The same streams by each door of a server, medians."""
    [record] = records
    samples = record.result["samples"]
    for offered in dict.fromkeys(sample["offered"] for sample in samples):
        for way in dict.fromkeys(sample["way"] for sample in samples):
            chosen = [sample for sample in samples if (sample["offered"], sample["way"]) == (offered, way)]

            def typical(name: str, chosen: Sequence[Any] = chosen) -> float:
                return float(median(sample[name] for sample in chosen))

            times = ("first_token_p50", "first_token_p99", "server_cpu", "gateway_cpu")
            yield (
                rate(offered) if chosen[0]["way"] == samples[0]["way"] else "",
                way,
                rate(typical("tokens_per_second")),
                *(f"{typical(name) * 1e3:.0f} ms" for name in times),
            )


def scheduling(records: Sequence[Record]) -> Iterator[Row]:
    """Milliseconds of a step by requests that run and wait."""
    [record] = records
    found = {(cell["running"], cell["waiting"]): cell["median_s"] for cell in record.result["results"]}
    for running in sorted({running for running, _ in found}):
        waiting = sorted(waiting for other, waiting in found if other == running)
        yield (str(running), *(f"{found[running, number] * 1e3:.2f} ms" for number in waiting))


def growth(records: Sequence[Record]) -> Iterator[Row]:
    """Steps along a line of contexts and one of batches."""
    [record] = records
    for axis, points in record.result["lines"].items():
        steps = ", ".join(f"{point[axis]:.0f}: {ms(point['step_s'])}" for point in points)
        yield axis, steps, f"{record.result['departure_from_linear'][axis] * 100:.1f} %"


def startup(records: Sequence[Record]) -> Iterator[Row]:
    """Seconds until an engine is ready, and of pinning alone."""
    [record] = records
    found = record.result
    yield "pinning alone, by torch's allocator", f"{found['pin_by_torch_s']:.1f} s"
    pinning = " and ".join(f"{seconds:.1f}" for seconds in found["pin_alone_s"])
    yield "pinning alone, as the engine does", f"{pinning} s"
    for order, seconds in zip(("first", "second"), found["ready_s"], strict=True):
        yield f"{order} engine of a process until ready", f"{seconds:.1f} s"


def bus(records: Sequence[Record]) -> Iterator[Row]:
    """GB/s of copies alone and beside GEMMs."""
    [record] = records
    for copies, rates in record.result["rates"].items():
        yield (copies, *(f"{gigabytes:.1f}" for gigabytes in rates.values()))


def orchestration(records: Sequence[Record]) -> Iterator[Row]:
    """A step beside its graph and sampling alone."""
    [record] = records
    found = record.result
    step, alone = (f"{found[name] * 1e3:.2f} ms" for name in ("step_seconds", "alone_seconds"))
    yield f"{NAMES[found['model']]}, {found['batch']} requests", step, alone, f"{found['orchestration'] * 100:.1f} %"


def overview(records: Sequence[Record]) -> Iterator[Row]:
    """Steps with everything on the host, for the first page."""
    for record in records:
        if "policies" in record.result:
            yield from ((*row[:5], row[7]) for row in policies([record]) if "emulated" not in row[1])
        else:
            [(model, weights, step, limit, efficiency, _, _, tokens)] = coding([record])
            yield f"{model}, bfloat16", f"auto, weights {weights}", step, limit, efficiency, tokens


def placed(records: Sequence[Record]) -> Iterator[Row]:
    """What the planner chooses, for the first page."""
    for record, (model, placement, step, _, tokens, _) in zip(records, grids(records), strict=True):
        chosen = record.result[0]
        predicted = ms(chosen["step_seconds"] * chosen["predicted_over_measured"])
        yield model.partition(",")[0], placement, step, predicted, tokens


def beside(records: Sequence[Record]) -> Iterator[Row]:
    """What else the first page says, each in a line."""
    host, budget, resident, prompt, come, cost = records
    for record, what in ((host, "equal batches, all on the host"), (budget, "equal budgets, each tuned")):
        *each, mean = [row[-1] for row in peers([record]) if row[2] == "flexgen"]
        yield f"{mean} times", f"FlexGen's total throughput, {what}: {', '.join(each)}; geometric mean"
    plain, compiled = [row[-1] for row in peers([resident])]
    what = "transformers with a static cache, OPT-1.3B on the device; where it compiles its decode"
    yield f"{plain} and {compiled} times", what
    [(_, _, per_second, share, _)] = prompts([prompt])
    yield share, f"of the GEMM rate: prompts of 512 tokens while all weights stream, {per_second} tokens/s"
    [(_, _, efficiency, *_)] = mixed([come])
    yield efficiency, "of the limit: requests that come and go, with lengths like those of chats"
    lost = (1 - cost.result["tokens_per_second_ratio"]) * 100
    yield f"{lost:.1f} %", "of all tokens/s lost: streaming OPT-1.3B through gRPC"


def guard(records: Sequence[Record]) -> Iterator[Row]:
    """References of the guard, for each kind of GPU."""
    for record in records:
        kind = record.result["kind"]
        for cell in record.result["cases"]:
            yield (kind, cell["name"], *_step(cell), rate(cell["tokens_per_second"]), record.header.commit)
            kind = ""


def lists(records: Sequence[Record]) -> Iterator[Row]:
    """The guard's cases on one machine, by turns: before a step was a list, after, and both again."""
    found = [{cell["name"]: cell for cell in record.result["cases"]} for record in records]
    for name in found[0]:
        cells = [cells.get(name) for cells in found]
        yield (
            name,
            *("" if each is None else f"{ms(each['step_seconds'])}, {each['efficiency']:.2f}" for each in cells),
        )


def smollm2(records: Sequence[Record]) -> Iterator[Row]:
    """Tokens equal to the reference's: a line for a prompt and a placement, a column for a policy."""
    [record] = records
    for number, prompt in enumerate(record.result["prompts"]):
        facts = prompt["kind"], str(prompt["prompt_tokens"])
        rest = f"{prompt['least_margin']:.1g}", _beginning(prompt["output"])
        found: dict[str, list[str]] = {}
        for run in record.result["runs"]:
            found.setdefault(run["weights"], []).append(str(Comparison(**run["compared"][number])))
        for weights, cells in found.items():
            yield (*facts, weights, *cells, *rest)
            facts = rest = ("", "")


def drafts(records: Sequence[Record]) -> Iterator[Row]:
    """Tau of outputs of each kind of work: a column for a drafter, with a figure for each length of drafts."""
    [record] = records
    groups: dict[tuple[str, float], list[Any]] = {}
    for text in record.result["texts"]:
        groups.setdefault((text["kind"], text["temperature"]), []).append(text)
    for (kind, temperature), texts in groups.items():
        distinct = sorted(text["distinct"] for text in texts)
        cells = _of_ways(texts)
        ways = [", ".join(f"{cell.tau:.2f}" for cell in cells if cell.way == way) for way in _ways(cells)]
        tokens = f"{sum(text['output_tokens'] for text in texts):,}"
        yield kind, "greedy" if temperature == 0 else f"{temperature:g}", tokens, _range(distinct), *ways


def draft_costs(records: Sequence[Record]) -> Iterator[Row]:
    """What drafters gain and ask for over all outputs: a line for each and for each length of drafts."""
    [record] = records
    texts = record.result["texts"]
    seconds = {(cell["way"], cell["max_drafted"]): cell["seconds"] for cell in record.result["step_seconds"]}
    without_loops = _of_ways([text for text in texts if text["distinct"] >= DISTINCT])
    last = ""
    for cell, calm in zip(_of_ways(texts), without_loops, strict=True):
        yield (
            "" if cell.way == last else cell.way,
            str(cell.max_drafted),
            f"{cell.tau:.2f}",
            f"{calm.tau:.2f}",
            f"{cell.drafted / cell.steps:.2f}",
            f"{cell.accepted / cell.drafted:.0%}",
            f"{seconds[cell.way, cell.max_drafted] * 1e3:.1f} ms",
        )
        last = cell.way


class _OfWay(NamedTuple):
    """What a drafter does for some outputs, with drafts of a certain length at most."""

    way: str
    max_drafted: int
    tokens: int
    steps: int
    drafted: int

    @property
    def tau(self) -> float:
        return self.tokens / self.steps

    @property
    def accepted(self) -> int:
        """Drafted tokens that were right: all but that of the model itself, of each step."""
        return self.tokens - self.steps


def _of_ways(texts: Sequence[Any]) -> list[_OfWay]:
    """Sums over these outputs, in the order of the file."""
    tokens = sum(text["output_tokens"] for text in texts)
    return [
        _OfWay(
            cells[0]["way"],
            cells[0]["max_drafted"],
            tokens,
            sum(cell["steps"] for cell in cells),
            sum(cell["drafted"] for cell in cells),
        )
        for cells in zip(*(text["replayed"] for text in texts), strict=True)
    ]


def _ways(cells: Sequence[_OfWay]) -> list[str]:
    return list(dict.fromkeys(cell.way for cell in cells))


def _range(shares: Sequence[float]) -> str:
    """Least, median and most, of shares in order."""
    return " / ".join(f"{share:.2f}" for share in (shares[0], median(shares), shares[-1]))


def cache_quality(records: Sequence[Record]) -> Iterator[Row]:
    """Outputs with caches in 8 bits beside those without: a line for a model's text and what is rounded."""
    [record] = records
    for model, facts in record.result["models"].items():
        greedy = facts.get("greedy_equal", {})
        for text, measured in facts["texts"].items():
            name = f"{model}, {text}"
            for mode, values in measured["modes"].items():
                equal = f"{greedy[mode]:.0f} of {facts['greedy_of']}" if mode in greedy else ""
                yield (
                    name,
                    mode,
                    f"{values['perplexity']:.{0 if values['perplexity'] >= 1000 else 2}f}",
                    f"{1000 * values['divergence']:.2g}",
                    f"{values['same_best']:.1%}",
                    *(f"{values[of]:.1%}" for of in ("key_error", "value_error", "logit_error")),
                    equal,
                )
                name = ""
            greedy = {}  # the engine's prompts are not of the texts: once for each model


def model_sizes(records: Sequence[Record]) -> Iterator[Row]:
    """Well-known shapes, in bfloat16, and which kind of cache takes less."""
    [record] = records
    for model in record.result["models"]:
        window = f" ({model['window']:,})" if model["window"] else ""
        yield (
            model["name"],
            f"`{model['family']}`",
            _count(model["parameters"]),
            format_bytes(model["weight_bytes"]),
            f"{model['context']:,}{window}",
            format_bytes(model["kv_bytes"]),
            f"{model['activation_ratio']:.2f}",
            _paying_cache(model["activation_ratio"]),
        )


def model_plans(records: Sequence[Record]) -> Iterator[Row]:
    """What the planner would do with well-known shapes: four columns for each size of GPU memory."""
    [record] = records
    for model in record.result["models"]:
        yield (model["name"], *(cell for each in model["plans"] for cell in _planned(each)))


def model_machine(records: Sequence[Record]) -> Iterator[Row]:
    """The machine that is planned for."""
    [record] = records
    machine, rates = record.result["machine"], record.result["machine"]["rates"]
    yield (
        f"{machine['file']}, {machine['case']}",
        format_rate(rates["load_bandwidth"], "B/s"),
        format_rate(rates["store_bandwidth"], "B/s"),
        f"{rates['gemm_rate'] / 1e12:.0f} TFLOP/s",
        format_rate(rates["memory_bandwidth"] * rates["weight_read_share"], "B/s"),
        format_bytes(record.result["host_memory"]),
    )


def commands(records: Sequence[Record]) -> Iterator[Row]:
    """Where every file comes from."""
    for record in records:
        header = record.header
        yield f"[{record.name}]({record.name}.json)", f"`{header.command}`", header.commit, header.date


def ms(seconds: float) -> str:
    """Milliseconds, with a decimal where there are less than a hundred."""
    return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"


def rate(number: float) -> str:
    """A number with three digits or more, and no more decimals than that takes."""
    return f"{number:,.{0 if number >= 100 else 1}f}"


def _step(cell: Any) -> Row:
    return ms(cell["step_seconds"]), ms(cell["limit_seconds"]), f"{cell['efficiency']:.2f}"


def _beside(cell: Any | None) -> str:
    return "" if cell is None else f"{ms(cell['step_seconds'])}, {cell['efficiency']:.2f}"


def _policy(cell: Any) -> str:
    share = cell["recomputed_share"]
    return f"{cell['label']}, {share * 100:.0f} % of the tokens recomputed" if share else str(cell["label"])


def _beginning(text: str) -> str:
    """The first words of a text, in one cell of a table."""
    return f"`{textwrap.shorten(text, 36, placeholder=' ...')}`".replace("|", "\\|")


def _paying_cache(ratio: float) -> str:
    """Kind whose blocks take fewer bytes a token, where caches cross the bus; `ratio`: K and V to an activation."""
    if ratio > 1:
        return f"activations: {'half' if ratio == 2 else f'{1 / ratio:.2f}'} of K and V"
    if ratio == 1:
        return "K and V: as wide, and ready"
    return "K and V: queries are grouped"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _planned(cell: Any) -> Row:
    """Tokens/s, requests, caches and resident weights of a plan."""
    if "refused" in cell:
        return "does not fit", "", "", ""
    plan = cell["plan"]
    caches = {"kv": "K and V", "activation": "activations"}.get(plan["policy"])
    caches = caches or f"activations {plan['activation_share'] * 100:.0f} %"
    more = f" + {plan['recomputed_share'] * 100:.0f} %" if plan["recomputed_share"] else ""
    resident = f"{plan['resident_share'] * 100:.0f} %"
    return rate(plan["mean_tokens_per_second"]), str(plan["batch"]), caches + more, resident


def _placement(plan: Any) -> str:
    resident = plan["resident_share"]
    where = "all on the device" if resident == 1 else f"{resident * 100:.0f} % of the weights on the device"
    return f"{plan['batch']} requests, {plan['policy']}, {where}"


def _best(entries: Sequence[Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Setup and outcome with the highest total throughput, by model and system; in order of the models."""
    best: dict[tuple[str, str], tuple[Any, Any]] = {}
    for entry in entries:
        setup, outcome = entry["setup"], entry["outcome"]
        if outcome is None:
            continue
        key = (setup["model"], f"{setup['system']}{', compiled' if setup['compiled'] else ''}")
        if key not in best or _total(outcome) > _total(best[key][1]):
            best[key] = setup, outcome
    order = list(NAMES)
    return dict(sorted(best.items(), key=lambda item: order.index(item[0][0])))


def _total(outcome: Any) -> float:
    tokens: float = outcome["total_tokens"] / outcome["total_seconds"]
    return tokens


def _requests(own: int, other: int) -> str:
    return str(own) if own == other else f"{own} and {other}"


def _of_peer(outcome: Any) -> Row:
    return rate(_total(outcome)), ms(outcome["step_seconds"]), f"{outcome['efficiency']:.2f}"
