"""The scripts in benchmarks/, each run on the CPU with a model of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks import (
    bus,
    coding,
    decoding,
    expert_cache,
    gpu_check,
    gpu_outputs,
    growth,
    orchestration,
    planner_check,
    planner_report,
    startup,
)
from benchmarks.planner_report import draw_grid, draw_sweep
from hsrpc.config import CachePolicy, DeviceKind, Placement
from hsrpc.model.shapes import SHAPES
from hsrpc.request import Delta, TokenLogprob
from tests.bench.conftest import TINY

PNG = b"\x89PNG\r\n\x1a\n"
LENGTHS = ("--prompt", "8", "--output", "24", "--steps", "5")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options for a model from a configuration file, in little memory."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return ["--shape", str(file), "--device", "cpu", "--gpu-memory", "64MiB"]


def cell(name: str, measured: float, predicted: float, share: float = 0.0) -> planner_report.Cell:
    """As planner_check measures one, of a batch of 4."""
    return {
        "name": name,
        "model": "tiny",
        "device": "CPU",
        "plan": {"batch": 4, "activation_share": share},
        "tokens_per_second": measured,
        "step_seconds": 4 / measured,
        "predicted_over_measured": measured / predicted,
    }


def test_a_sweep_measures_the_planners_choice_and_the_shares(tiny, tmp_path, capsys):
    """What the file has is not measured again, so shares near the best can be added."""
    files = ["--json", str(tmp_path / "sweep.json"), "--plot", str(tmp_path / "sweep.png")]
    sweep = ["sweep", *tiny, "--host-memory", "64MiB", "--batch", "3", *LENGTHS, *files, "--shares"]
    planner_check.main([*sweep, "0", "0.5", "1"])
    first = json.loads((tmp_path / "sweep.json").read_text())
    assert [(each["name"], each["plan"]["batch"]) for each in first] == [
        ("planner", 3),
        ("share 0.0", 3),
        ("share 0.5", 3),
        ("share 1.0", 3),
    ]
    shares = [each["plan"]["activation_share"] for each in first[1:]]
    assert shares == [0, pytest.approx(0.5, abs=0.2), 1]
    assert "planner / best: " in capsys.readouterr().out
    assert (tmp_path / "sweep.png").read_bytes().startswith(PNG)
    planner_check.main([*sweep, "0.5", "0.55"])
    second = json.loads((tmp_path / "sweep.json").read_text())
    assert second[:4] == first
    assert [each["name"] for each in second[4:]] == ["share 0.55"]


def test_a_sweep_forces_tokens_to_be_computed_anew(tiny, tmp_path):
    """What was asked for is what was computed, beside activations alone; the plot has it on its axis."""
    files = ["--json", str(tmp_path / "anew.json"), "--plot", str(tmp_path / "anew.png")]
    sweep = ["sweep", "--over", "recompute", *tiny, "--host-memory", "64MiB", "--batch", "4", *LENGTHS, *files]
    planner_check.main([*sweep, "--shares", "0", "0.5"])
    cells = json.loads((tmp_path / "anew.json").read_text())
    assert [each["name"] for each in cells] == ["planner", "recompute 0.0", "recompute 0.5"]
    assert [each["plan"]["policy"] for each in cells[1:]] == ["activation"] * 2
    assert cells[1]["recomputed_share"] == 0
    assert cells[2]["recomputed_share"] == pytest.approx(0.5, abs=0.1)
    assert cells[1]["context"] == pytest.approx(cells[2]["context"], rel=0.1)
    assert (tmp_path / "anew.png").read_bytes().startswith(PNG)


def test_a_grid_measures_the_planners_plan_beside_forced_ones(tiny, tmp_path):
    """At most as many as asked for; the planner's is the first."""
    files = ["--json", str(tmp_path / "grid.json"), "--plot", str(tmp_path / "grid.png")]
    more = ["--host-memory", "64MiB", "--dtype", "float32", "--cells", "2", "--within", "0"]
    planner_check.main(["grid", *tiny, *more, *LENGTHS, *files])
    cells = json.loads((tmp_path / "grid.json").read_text())
    assert [each["name"] == "planner" for each in cells] == [True, False, False]
    assert all(each["tokens_per_second"] > 0 for each in cells)
    assert (tmp_path / "grid.png").read_bytes().startswith(PNG)


def test_a_plan_that_does_not_come_to_be_is_a_failure(tiny, tmp_path, capsys):
    """It is in the file with its reason, and nothing is drawn."""
    files = ["--json", str(tmp_path / "sweep.json"), "--plot", str(tmp_path / "sweep.png")]
    settings = ["--host-memory", "64MiB", "--batch", "3", "--prompt", "8", "--output", "6", "--steps", "5"]
    planner_check.main(["sweep", *tiny, *settings, *files, "--shares", "0"])
    cells = json.loads((tmp_path / "sweep.json").read_text())
    assert [set(each) for each in cells] == [{"name", "failure", "setting"}] * 2
    assert "steps of a batch of 3" in capsys.readouterr().out
    assert not (tmp_path / "sweep.png").exists()


def test_what_failed_is_tried_again_after_what_is_new(tiny, tmp_path, monkeypatch):
    """A crash in one cell takes neither its place in the file nor the other cells with it."""
    file = tmp_path / "sweep.json"
    sweep = ["sweep", *tiny, "--host-memory", "64MiB", "--batch", "3", *LENGTHS, "--json", str(file), "--shares"]
    measured = []

    async def crash(config, options):
        measured.append(config.activation_share)
        if config.activation_share == 0.5 and len(measured) < 4:
            raise RuntimeError("CUDA error")
        return {"predicted_over_measured": 1.0, "tokens_per_second": 1.0, "step_seconds": 1.0}

    monkeypatch.setattr(planner_check, "_measure", crash)
    planner_check.main([*sweep, "0.5", "1"])
    assert [each.get("failure") for each in json.loads(file.read_text())] == [None, "RuntimeError: CUDA error", None]
    planner_check.main([*sweep, "0.5", "0.75"])
    assert measured == [None, 0.5, 1, 0.75, 0.5]
    cells = {each["name"]: each for each in json.loads(file.read_text())}
    assert len(cells) == 4
    assert not any("failure" in each for each in cells.values())


def test_a_batch_that_does_not_fit_is_known_before_it_runs(tiny, tmp_path, monkeypatch, capsys):
    """Its steps would never be whole, and all of its tokens would be waited for."""
    monkeypatch.setattr(decoding, "make_workload", lambda *_, **__: pytest.fail("it runs"))
    tiny[tiny.index("--gpu-memory") + 1] = "4MiB"
    settings = ["--host-memory", "1MiB", "--batch", "512", *LENGTHS, "--json", str(tmp_path / "sweep.json")]
    planner_check.main(["sweep", *tiny, *settings, "--shares", "0"])
    assert capsys.readouterr().out.count("of 512 requests fit at once") == 4


def test_a_file_is_for_one_setting(tiny, tmp_path):
    """Cells of another budget or prompt are not compared with its own."""
    sweep = ["sweep", *tiny, "--host-memory", "64MiB", *LENGTHS, "--json", str(tmp_path / "f" / "sweep.json")]
    planner_check.main([*sweep, "--batch", "3", "--shares", "0"])
    with pytest.raises(SystemExit, match="'batch': 3"):
        planner_check.main([*sweep, "--batch", "4", "--shares", "0"])


def test_a_grid_goes_on_around_the_batch_that_was_measured(tiny, tmp_path, monkeypatch):
    """A plan made anew may have another batch: the cells would not be those of before. A whole grid plans nothing."""
    file = tmp_path / "grid.json"
    more = ["--host-memory", "64MiB", "--dtype", "float32", "--cells", "2", "--within", "0", "--json", str(file)]
    grid = ["grid", *tiny, *more, *LENGTHS]
    planner_check.main(grid)
    cells = json.loads(file.read_text())
    kinds = [(each["plan"]["batch"], each["plan"]["policy"]) for each in cells]
    assert len(set(kinds)) == 3
    file.write_text(json.dumps(cells[:2]))
    batches = []
    forced = planner_check.forced_configs
    monkeypatch.setattr(
        planner_check, "forced_configs", lambda config, batch: batches.append(batch) or forced(config, batch)
    )
    planner_check.main(grid)
    assert batches == [cells[0]["plan"]["batch"]]
    assert len(json.loads(file.read_text())) == 3
    planner_check.main(grid)
    assert len(batches) == 1


def test_a_sweep_is_drawn_as_two_lines_and_the_planners_choice(tmp_path, monkeypatch):
    """By share, whatever order they were measured in; the planner's cell is marked and is no point of a line."""
    drawn = {}
    monkeypatch.setattr(
        planner_report, "plot_sweep", lambda *given, chosen, share: drawn.update(lines=given[1:3], chosen=chosen)
    )
    cells = [cell("planner", 50, 60, 0.75), cell("share 1.0", 40, 30, 1.0), cell("share 0.0", 20, 25, 0.0)]
    draw_sweep(cells, tmp_path / "sweep.png", over="activation")
    assert drawn["lines"] == ([(0.0, 20), (1.0, 40)], [(0.0, 25), (1.0, 30)])
    assert drawn["chosen"] == (0.75, 50)
    draw_sweep(cells[1:], tmp_path / "sweep.png", over="activation")
    assert drawn["chosen"] is None


def test_a_grid_is_drawn_as_bars_with_what_was_predicted(tmp_path, monkeypatch):
    """A bar a cell, the planner's in a colour of its own, the prediction on each."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_grid([cell("planner", 50, 60), cell("batch 8", 40, 30), cell("batch 2", 20, 25)], tmp_path / "grid.png")
    axes = plt.gcf().axes[0]
    monkeypatch.undo()
    plt.close("all")
    bars, [markers] = axes.containers[0], axes.collections
    assert [bar.get_width() for bar in bars] == [50, 40, 20]
    assert len({bar.get_facecolor() for bar in bars[1:]} | {bars[0].get_facecolor()}) == 2
    assert markers.get_offsets().tolist() == [[60, 0], [30, 1], [25, 2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["planner", "batch 8", "batch 2"]


def test_scheduling_is_timed_for_each_queue_and_batch(tmp_path, monkeypatch):
    """All pairs; a step takes some time, and the batch and the queue are as full as they are said to be."""
    monkeypatch.setattr(growth, "RUNNING", (1, 3))
    monkeypatch.setattr(growth, "WAITING", (0, 5))
    files = ["--json", str(tmp_path / "scheduling.json"), "--plot", str(tmp_path / "scheduling.png")]
    growth.main(["scheduling", "--steps", "2", *files])
    found = json.loads((tmp_path / "scheduling.json").read_text())["results"]
    assert [(each["running"], each["waiting"]) for each in found] == [(1, 0), (1, 5), (3, 0), (3, 5)]
    assert all(0 < each["min_s"] <= each["median_s"] <= each["max_s"] for each in found)
    assert (tmp_path / "scheduling.png").read_bytes().startswith(PNG)


def test_steps_grow_along_two_lines(tiny, tmp_path):
    """One over contexts and one over batches, each with its limit and its distance from a straight line."""
    files = ["--json", str(tmp_path / "steps.json"), "--plot", str(tmp_path / "steps.png")]
    lines = ["--context", "8", "32", "--batch", "2", "3", "--steps", "3"]
    growth.main(["steps", *tiny, "--host-memory", "64MiB", *lines, *files])
    found = json.loads((tmp_path / "steps.json").read_text())
    assert [point["batch"] for point in found["lines"]["batch"]] == [2, 3]
    contexts = [point["context"] for point in found["lines"]["context"]]
    assert 8 < contexts[0] < 32 < contexts[1]
    assert all(point["limit_s"] > 0 for line in found["lines"].values() for point in line)
    assert set(found["departure_from_linear"]) == {"context", "batch"}
    assert (tmp_path / "steps.png").read_bytes().startswith(PNG)


def test_startup_makes_a_checkpoint_once_and_times_what_follows(tiny, tmp_path, capsys):
    """The same directory serves another run; all times are kept."""
    run = [*tiny, "--directory", str(tmp_path / "made"), "--cache-memory", "8MiB", "--json", str(tmp_path / "out.json")]
    startup.main([*run, "--repeats", "2"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["ready_s"]) == len(found["pin_alone_s"]) == len(found["planning_s"]) == 2
    assert found["ratio"] > 0
    shards = [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").glob("*.safetensors"))]
    startup.main([*run, "--repeats", "1"])
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "made").glob("*.safetensors"))] == shards
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        startup.main([*run, "--shape", "opt-125m"])
    assert "not opt-125m; give another" in capsys.readouterr().err


MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_gpu_check_fills_mixtures_of_experts(kind, monkeypatch, capsys):
    """Experts that transformers has in one tensor, whatever it calls it."""
    sizes = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    shape = sizes | MIXTURES[kind] | {"model_type": kind, "intermediate_size": 24, "max_position_embeddings": 640}
    monkeypatch.setitem(SHAPES, "tiny-mixture", shape)
    monkeypatch.setattr(gpu_check, "LENGTHS", (1, 33))
    monkeypatch.setattr(gpu_check, "RUNS", (gpu_check.Run(CachePolicy.HYBRID, 0.5, Placement.HOST),))
    gpu_check.main(["--shape", "tiny-mixture", "--device", "cpu"])
    assert "of 2 prompts equal throughout" in capsys.readouterr().out


LATENTS = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def test_the_gpu_check_attends_to_latents(monkeypatch, capsys):
    """A chunk rebuilds K and V behind more latents, attended to as they are stored, than there are rows of K and V."""
    shape = {"model_type": "deepseek_v2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"vocab_size": 128, "intermediate_size": 64, "max_position_embeddings": 640, **LATENTS}
    monkeypatch.setitem(SHAPES, "tiny-latents", shape)
    monkeypatch.setattr(gpu_check, "RUNS", (gpu_check.Run(CachePolicy.ACTIVATION, None, Placement.HOST),))
    gpu_check.main(["--shape", "tiny-latents", "--device", "cpu"])
    assert "of 8 prompts equal throughout" in capsys.readouterr().out


def test_the_gpu_check_compares_with_transformers(tiny_shape, monkeypatch, capsys):
    """Here on the CPU, with two of its runs and short prompts."""
    monkeypatch.setattr(gpu_check, "LENGTHS", (1, 33))
    runs = (gpu_check.Run(CachePolicy.HYBRID, 0.5, Placement.HOST), gpu_check.Run(CachePolicy.KV, None, Placement.AUTO))
    monkeypatch.setattr(gpu_check, "RUNS", runs)
    gpu_check.main(["--shape", tiny_shape, "--device", "cpu", "--layers", "1"])
    assert capsys.readouterr().out.count("of 2 prompts equal throughout") == 2


def test_the_gpu_checks_reference_has_the_type_that_is_asked_for(tiny_shape, tmp_path):
    """A configuration names the type of its checkpoint."""
    config, file = gpu_check.configuration(tiny_shape, 1) | {"dtype": "bfloat16"}, tmp_path / "config.json"
    file.write_text(json.dumps(config))
    model = gpu_check.reference_model(config, file, DeviceKind.CPU, torch.float32)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_outputs_of_two_devices_are_compared(monkeypatch, capsys):
    """Here of the CPU with itself; an output that does not match, or a score that is another, is found."""
    asked = gpu_outputs.requests()
    few = [asked[2]._replace(prompt="One"), asked[6]._replace(prompt="A fox and an owl")]
    monkeypatch.setattr(gpu_outputs, "requests", lambda: few)
    monkeypatch.setattr(gpu_outputs, "SETTINGS", gpu_outputs.SETTINGS[2:])
    gpu_outputs.main(["--device", "cpu"])
    assert "2 of 2 outputs equal throughout" in capsys.readouterr().out
    one, other = TokenLogprob(5, -1.0, 1), TokenLogprob(5, -1.1, 1)
    with pytest.raises(AssertionError, match=r"logprob=-1\.1"):
        gpu_outputs.check([few[1]], [[Delta("a", prompt_logprobs=(one,))]], [[Delta("a", prompt_logprobs=(other,))]])
    with pytest.raises(AssertionError, match="'a'"):
        gpu_outputs.check([few[0]], [[Delta("a")]], [[Delta("a")]])


def test_the_gpu_check_finds_a_token_that_is_not_the_models(tiny_shape, tmp_path):
    """The model's own tokens pass; one out of its five most probable does not."""
    config, file = gpu_check.configuration(tiny_shape, None), tmp_path / "config.json"
    file.write_text(json.dumps(config))
    model = gpu_check.reference_model(config, file, DeviceKind.CPU, torch.float16)
    ranked = model(torch.tensor([[5, 6]])).logits[0, -1].argsort(descending=True).tolist()
    top = ranked[:5]
    assert gpu_check.compare(model, [[5, 6]], [[(top[0], top)]]) == 1
    assert gpu_check.compare(model, [[5, 6]], [[(top[4], top)]]) == 0
    with pytest.raises(AssertionError, match="token 0"):
        gpu_check.compare(model, [[5, 6]], [[(ranked[5], top)]])
    with pytest.raises(AssertionError, match="token 0"):
        gpu_check.compare(model, [[5, 6]], [[(top[4], ranked[1:6])]])


def test_orchestration_is_what_a_step_takes_beyond_its_work(tiny, tmp_path, capsys):
    """Both are measured; a model that streams has no graph, and says so."""
    file = tmp_path / "orchestration.json"
    orchestration.main([*tiny, "--batch", "3", "--prompt", "8", "--output", "24", "--json", str(file)])
    found = json.loads(file.read_text())
    assert min(found["alone_seconds"], found["step_seconds"]) > 0
    assert found["orchestration"] == pytest.approx(1 - found["alone_seconds"] / found["step_seconds"])
    assert "orchestration" in capsys.readouterr().out
    tiny[tiny.index("--gpu-memory") + 1] = "2600KiB"
    with pytest.raises(SystemExit, match="raise --gpu-memory"):
        orchestration.main([*tiny, "--batch", "3", "--prompt", "8", "--output", "24"])


def test_the_bus_is_timed_alone_and_beside_gemms(tiny, tmp_path):
    """Every kind of copy, with every kind of work beside it."""
    file = tmp_path / "bus.json"
    sizes = ["--rows", "16", "--buffer", "64KiB", "--run", "4KiB", "--memory", "1MiB", "--repeats", "2"]
    bus.main([*tiny[:4], *sizes, "--json", str(file)])
    rates = json.loads(file.read_text())["rates"]
    assert set(rates) == {"one piece", "many pieces", "runs"}
    assert all(len(found) == 3 and min(found.values()) > 0 for found in rates.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coding_says_how_much_smaller_matrices_get(dtype, tmp_path, capsys):
    """The share of bytes of random weights of a shape, each matrix and all together."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 128}))
    saved = tmp_path / "coding.json"
    coding.main(
        ["--model", f"random:{file}", "--dtype", dtype, "--device", "cpu", "--layers", "2", "--json", str(saved)]
    )
    found = json.loads(saved.read_text())
    assert found["share"] == pytest.approx({"float16": 0.856, "bfloat16": 0.668}[dtype], abs=0.01)
    assert found["decode_rate"] > 0
    assert "of the bytes; coded at" in capsys.readouterr().out


def test_hits_of_experts_by_slots(tmp_path, capsys):
    """A line for each number of slots: none hits nothing, all hit always; choices that are drawn hit as planned."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 100}
    shape, file = tmp_path / "config.json", tmp_path / "experts.json"
    shape.write_text(json.dumps(expert_cache.SHAPE | small))
    found = ["--shape", str(shape), "--json", str(file), "--prompt", "8", "--steps", "12", "--batch", "2"]
    expert_cache.main([*found, "--slots", "0", "4", "8"])
    saved = json.loads(file.read_text())
    assert saved["header"]["command"].startswith("python -m benchmarks.expert_cache --shape config.json")
    none, half, all_slots = saved["cells"]
    assert (none["hit_rate"], none["drawn_hit_rate"], none["slot_share"]) == (0, 0, 0)
    assert none["expected_loads"] == pytest.approx(2 + 2 * 6 / 8)
    assert none["loads"] >= 2
    assert half["expected_loads"] == pytest.approx(none["expected_loads"] / 2)
    assert half["loads"] < none["loads"]
    assert 0.3 < half["drawn_hit_rate"] < 0.7
    assert all_slots["hit_rate"] > 0.9
    assert all_slots["expected_loads"] == 0
    assert {cell["batch"] for cell in saved["cells"]} == {2}
    assert capsys.readouterr().out.count("%") == 9
