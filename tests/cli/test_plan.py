"""hsrpc plan: tables, one object, and a plot; no weights are read."""

from __future__ import annotations

import json
import re

import pytest
from matplotlib import image

from hsrpc.model.shapes import SHAPES
from hsrpc.plan.hardware import Hardware
from tests.cli.conftest import SMALL

PNG = b"\x89PNG\r\n\x1a\n"


def planned(hsrpc, *arguments: str) -> dict:
    """The JSON object of a plan."""
    ran = hsrpc("plan", *SMALL, *arguments, "--json", "--no-advice")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def test_json_adds_up(hsrpc):
    """What lies on device and host fits the budgets; the prediction follows from its parts."""
    plan = planned(hsrpc, "--cache-policy=hybrid", "--activation-share=0.5", "--max-batch=3")
    assert (plan["model"], plan["policy"], plan["activation_share"]) == ("storyteller", "hybrid", 0.5)
    assert (plan["max_batch"], plan["max_model_len"]) == (3, 96)
    assert plan["budgets"] == {"device": 13 * 1024**2, "host": 64 * 1024**2}
    assert 0 < sum(plan["device_bytes"].values()) <= plan["budgets"]["device"]
    assert 0 < sum(plan["host_bytes"].values()) <= plan["budgets"]["host"]
    assert set(plan["num_blocks"]) == {"device_kv", "host_kv", "device_activation", "host_activation"}
    assert 0 <= plan["resident_share"] < 1
    step = plan["prediction"]
    assert step["tokens_per_second"] == pytest.approx(step["batch"] / step["step_seconds"])
    assert step["step_seconds"] >= max(step["bus_seconds"], step["gpu_seconds"]) * 0.999
    parts = ("forward", "regenerate", "gather", "attention", "head")
    assert step["gpu_seconds"] == pytest.approx(sum(step[f"{part}_seconds"] for part in parts))
    assert step["longest_step_seconds"] >= step["step_seconds"]
    assert step["mean_tokens_per_second"] == pytest.approx(step["batch"] / step["mean_step_seconds"])
    assert 1 <= plan["max_prefill_tokens"] <= plan["max_idle_prefill_tokens"]
    assert plan["spare_prefill_tokens"] >= 0
    assert plan["hardware"]["load_bandwidth"] > 0


def test_the_longest_request_is_the_models_own(hsrpc, tmp_path):
    """By default, where there is room, and the table has it."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-2-7b"] | small | more))
    model = f"--model=random:{tmp_path / 'config.json'}"
    ran = hsrpc("plan", "--device=cpu", model, "--gpu-memory=400MiB", "--host-memory=1GiB")
    assert ran.err == ""
    assert re.search(r"longest request, tokens\W+8192", ran.out)


def test_a_model_without_a_checkpoint(hsrpc):
    """A shape of a known model needs no files: a plan can be made before anything is fetched."""
    plan = planned(hsrpc, "--model=random:opt-125m", "--gpu-memory=400MiB", "--host-memory=8GiB", "--dtype=float16")
    assert plan["model"] == "opt-125m"
    assert plan["prediction"]["tokens_per_second"] > 0


def test_an_absurd_configuration_is_refused_by_its_key(hsrpc, tmp_path):
    """A path given for a shape is refused as well: at once, and before anything is made of it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPES["opt-125m"] | {"num_hidden_layers": 1_000_000_000}))
    ran = hsrpc("plan", *SMALL, f"--model=random:{file}")
    assert ran.code == 1
    assert ran.err.startswith(
        f"hsrpc: error: {file}: num_hidden_layers: expected a whole number from 1 to 4096, found 1"
    )


def test_the_tables_name_budgets_policy_and_prediction(hsrpc):
    """For people: memory on both sides with its sum and budget, blocks, and the predicted step."""
    ran = hsrpc("plan", *SMALL)
    assert (ran.code, ran.err) == (0, "")
    for words in ("storyteller", "cache policy", "K and V take 2.00 times", "13.0 MiB", "64.0 MiB", "tokens/s"):
        assert words in ran.out
    rows = {line.split("│")[1].strip() for line in ran.out.splitlines() if line.count("│") >= 3}
    assert {"all", "budget", "K and V", "activations", "activation share", "weights resident", "throughput"} <= rows


def test_the_rates_of_a_slow_machine_are_told(hsrpc, monkeypatch):
    """In units that fit: never 0 GB/s."""
    slow = Hardware(load_bandwidth=3e8, store_bandwidth=3e8, gemm_rate=2e9, memory_bandwidth=4e8)
    monkeypatch.setattr("hsrpc.engine.startup.calibrate", lambda *_: slow)
    out = hsrpc("plan", *SMALL).out
    assert all(rate in out for rate in ("bus (300 MB/s)", "(2.00 GFLOP/s)", "attention (400 MB/s)"))


@pytest.mark.parametrize("name", ["share.png", "share"])
def test_plot_is_a_png(hsrpc, tmp_path, name):
    """--plot writes a PNG whatever the file's name, drawn on; standard output stays JSON."""
    file = tmp_path / name
    ran = hsrpc("plan", *SMALL, "--json", "--no-advice", "--plot", str(file))
    assert (ran.code, ran.err) == (0, f"saved {file}\n")
    assert json.loads(ran.out)["model"] == "storyteller"
    assert file.read_bytes().startswith(PNG)
    pixels = image.imread(file, format="png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    assert pixels[..., :3].std() > 0.01


def test_a_plot_that_cannot_be_written(hsrpc, tmp_path):
    """A folder that does not exist is named, with the system's reason."""
    file = tmp_path / "none" / "share.png"
    ran = hsrpc("plan", *SMALL, "--json", "--no-advice", "--plot", str(file))
    assert ran.code == 1
    assert ran.err == (
        f"hsrpc: error: plot={str(file)!r}: cannot be written (No such file or directory); give another file\n"
    )


def test_a_budget_that_is_too_small(hsrpc):
    """A plan that cannot be is one line that says what it would take."""
    ran = hsrpc("plan", *SMALL, "--gpu-memory=1MiB")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: gpu_memory='1.0 MiB': too small for a context of 96: ")
    assert ran.err.count("\n") == 1


ELSEWHERE = ("--model=random:opt-1.3b", "--hardware=rtx3090", "--gpu-memory=3GiB", "--host-memory=16GiB")
"""A machine of which nothing is measured here, with weights that stream."""
BOUNDED = (*ELSEWHERE, "--min-batch=16", "--max-batch=16", "--max-model-len=1024")


@pytest.fixture
def no_device(monkeypatch):
    """No device is opened, and nothing measured."""

    def refuse(*_: object) -> None:
        raise AssertionError("a device")

    for name in ("open_device", "calibrate"):
        monkeypatch.setattr(f"hsrpc.engine.startup.{name}", refuse)


@pytest.mark.usefixtures("no_device")
def test_a_machine_that_is_elsewhere(hsrpc):
    """Planned for by its name as CUDA plans: in the checkpoint's own type, of which weights may be coded."""
    ran = hsrpc("plan", *BOUNDED, "--json", "--no-advice")
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    assert plan["machine"] == {
        "name": "NVIDIA RTX 3090 (by its datasheet, not measured)",
        "kind": "cuda",
        "device_memory": 23 * 2**30,
        "host_memory": 64 * 2**30,
        "dtype": "float16",
    }
    assert plan["budgets"] == {"device": 3 * 2**30, "host": 16 * 2**30}
    assert plan["device_bytes"]["runtime"] > 0
    assert plan["hardware"]["load_bandwidth"] == pytest.approx(55.1e9 / 2)
    layers = 24 * (12 * 2048**2 + 9 * 2048) * 2
    resident = plan["device_bytes"]["resident weights"]
    assert resident == pytest.approx(plan["resident_share"] * layers, rel=0.01)
    assert hsrpc("plan", *BOUNDED, "--json", "--no-advice").out == ran.out


@pytest.mark.usefixtures("no_device")
def test_what_a_plan_lets_expect(hsrpc):
    """As one object: places, rates by batch, first tokens, and what every change would bring."""
    plan = json.loads(hsrpc("plan", *BOUNDED, "--json").out)
    weights, cache = plan["places"]["layers' weights"], plan["places"]["cache"]
    assert weights["device_bytes"] == plan["device_bytes"]["resident weights"]
    assert weights["host_bytes"] == plan["host_bytes"]["streamed weights"]
    assert weights["device_share"] == plan["resident_share"]
    blocks = plan["num_blocks"]
    on_device = blocks["device_kv"] + blocks["device_activation"]
    assert cache["device_share"] == pytest.approx(on_device / sum(blocks.values()))
    assert [step["batch"] for step in plan["by_batch"]] == [1, 4, 16]
    assert plan["by_batch"][-1]["tokens_per_second"] == pytest.approx(plan["prediction"]["tokens_per_second"], rel=0.05)
    assert plan["first_token"]["prompt_tokens"] == 896
    assert 0 < plan["first_token"]["idle_seconds"] < plan["first_token"]["loaded_seconds"]
    gains = [each["gain"] for each in plan["advice"]]
    assert gains == sorted(gains, reverse=True)
    assert {each["name"].split(",")[0] for each in plan["advice"]} >= {"twice the device memory", "weights of 4 bits"}
    assert json.loads(hsrpc("plan", *BOUNDED, "--json", "--no-advice").out) == plan | {"advice": None}


@pytest.mark.usefixtures("no_device")
def test_the_tables_say_what_a_plan_lets_expect(hsrpc):
    """The two best changes, what is not served marked as such; none of it without advice."""
    plan = json.loads(hsrpc("plan", *BOUNDED, "--json").out)
    out = hsrpc("plan", *BOUNDED).out
    for words in ("what lies where", "requests at once", "first in the queue", "(by its datasheet, not measured)"):
        assert words in out
    [*_, first, second] = [row for row in out.splitlines() if re.search(r"[+-]\d+% │", row)]
    for row, advice in zip((first, second), plan["advice"], strict=False):
        assert f"{advice['gain']:+.0%}" in row
        assert row.startswith(f"│ {advice['name']} ")
    assert "would help" not in hsrpc("plan", *BOUNDED, "--no-advice").out


@pytest.mark.usefixtures("no_device")
def test_each_of_several_gpus_is_shown(hsrpc):
    """A line for each, and one for all; both share one stream of weights, so each loads a half of it."""
    gpus = ("--gpus=2", "--placement=host", "--weight-coding=none", "--no-advice")
    plan, alone = (json.loads(hsrpc("plan", *BOUNDED, *more, "--json").out) for more in (gpus, gpus[1:]))
    first, second = plan["each_gpu"]
    assert first == second
    assert first["loaded_weight_bytes"] == pytest.approx(alone["each_gpu"][0]["loaded_weight_bytes"] / 2, rel=0.01)
    assert (first["requests"], first["blocks"]) == (plan["max_batch"], sum(plan["num_blocks"].values()))
    table = hsrpc("plan", *BOUNDED, *gpus).out.partition("the GPUs")[2].splitlines()[4:8]
    rows = {row.split()[1]: row.split() for row in table if row.startswith("│")}
    assert rows["0"][2:] == rows["1"][2:]
    rate = f"{2 * plan['prediction']['tokens_per_second']:.1f}"
    assert rows["all"][-2] == rate
    assert "the GPUs" not in hsrpc("plan", *BOUNDED, *gpus[1:]).out


@pytest.mark.usefixtures("no_device")
def test_hardware_that_cannot_be(hsrpc, tmp_path):
    """A name that nobody knows, a file without sense, and a device beside it: one line each."""
    ran = hsrpc("plan", "--hardware=tpu")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: hardware='tpu': neither a machine known here nor a file; use one of h100,")
    (tmp_path / "machine.json").write_text("{}")
    ran = hsrpc("plan", f"--hardware={tmp_path / 'machine.json'}")
    assert re.search(r"machine\.json': a machine has no field device_memory; write it anew with hsrpc bench", ran.err)
    ran = hsrpc("plan", "--hardware=h100", "--device=cpu")
    assert ran.err == ("hsrpc: error: device='cpu': has no meaning with --hardware h100; leave one of them out\n")


def test_a_plan_for_this_cpu_says_so(hsrpc, monkeypatch):
    """Where nobody asked for it; and how to plan for another machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    budgets = [option for option in SMALL if not option.startswith("--device")]
    ran = hsrpc("plan", *budgets, "--json", "--no-advice")
    assert ran.err == "hsrpc: no GPU here: planned for this CPU; --hardware h100, or another, plans for its machine\n"
    assert json.loads(ran.out)["machine"]["kind"] == "cpu"


@pytest.mark.usefixtures("no_device")
def test_rates_of_another_type_are_told(hsrpc):
    """What was measured in 16 bits is no measure of products in 32."""
    ran = hsrpc("plan", *BOUNDED, "--no-advice", "--dtype=float32")
    assert ran.err == "hsrpc: rates of float16 products, taken for float32: compute will take another time\n"


def test_a_calibration_that_is_saved_plans_elsewhere_as_here(hsrpc, tmp_path, monkeypatch):
    """The file has the rates and the memory; the plan is that of the machine that wrote it."""
    file = tmp_path / "machine.json"
    ran = hsrpc("bench", "calibrate", *SMALL, f"--save={file}")
    assert (ran.code, ran.err) == (0, "")
    assert "products of float32" in ran.out
    saved = json.loads(file.read_text())
    assert (saved["name"], saved["kind"], saved["dtype"]) == ("CPU", "cpu", "float32")
    monkeypatch.setattr("hsrpc.engine.startup.calibrate", lambda *_: Hardware(**saved["hardware"]))
    here = planned(hsrpc)
    monkeypatch.setattr("hsrpc.engine.startup.open_device", None)
    elsewhere = [option for option in SMALL if not option.startswith("--device")]
    ran = hsrpc("plan", *elsewhere, f"--hardware={file}", "--json", "--no-advice")
    assert (ran.code, ran.err) == (0, "")
    read = json.loads(ran.out)
    memory = {name: saved[name] for name in ("device_memory", "host_memory")}
    assert read == here | {"machine": here["machine"] | memory}


@pytest.fixture
def experts(tmp_path) -> list[str]:
    """Options for a model with experts, most of which have no room on an H100."""
    small = {"model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    small |= {"num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 1024, "vocab_size": 1000}
    small |= {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1024, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(small | {"max_position_embeddings": 2048}))
    budgets = ["--gpu-memory=1200MiB", "--host-memory=4GiB", "--max-prefill-tokens=256", "--max-batch=1"]
    return [f"--model=random:{tmp_path / 'config.json'}", "--hardware=h100", "--no-advice", *budgets]


def test_how_experts_come(hsrpc, experts):
    """On demand for one request: slots, the hit rate to expect, and from how many requests on the other way pays."""
    plan = json.loads(hsrpc("plan", *experts, "--json").out)
    found = plan["experts"]
    assert found["loading"] == "demand"
    assert 0 < found["slots"] < found["count"] == 64
    assert found["hit_rate"] == pytest.approx(found["slots"] / 64)
    assert found["streaming_from"] > 1
    assert plan["device_bytes"]["experts on demand"] >= 4 * found["slots"] * 3 * 1024 * 1024 * 2
    assert plan["prediction"]["experts_seconds"] > 0
    shown = hsrpc("plan", *experts).out
    assert re.search(rf"slots of a layer\W+{found['slots']} for 64 experts", shown)
    assert re.search(rf"hits, if all are as likely\W+{found['hit_rate']:.0%}", shown)
    assert re.search(rf"streaming all is as fast from\W+{found['streaming_from']} requests at once on", shown)
    assert re.search(r"experts on demand\W+\d+\.\d\d ms", shown)


def test_experts_that_fit_the_host_coded_alone(hsrpc):
    """They stream, since those that come on demand are not coded: that is said."""
    budgets = ["--gpu-memory=12GiB", "--host-memory=45GiB", "--max-batch=1", "--max-model-len=2048"]
    shown = hsrpc(
        "plan", "--model=random:qwen3-30b-a3b", "--dtype=bfloat16", "--hardware=h100", *budgets, "--no-advice"
    )
    assert "any number: on demand does not fit" in " ".join(shown.out.split())


def test_experts_may_be_made_to_stream(hsrpc, experts):
    """The outlook is the same from there; a model without experts has none."""
    ran = hsrpc("plan", *experts, "--experts=stream", "--json")
    plan = json.loads(ran.out)
    assert plan["experts"]["loading"] == "stream"
    assert plan["experts"]["streaming_from"] > 1
    assert "experts on demand" not in plan["device_bytes"]
    assert plan["prediction"]["experts_seconds"] == 0
    assert "all in every step" in hsrpc("plan", *experts, "--experts=stream").out
    assert planned(hsrpc)["experts"] is None
    refused = hsrpc("plan", *SMALL, "--experts=demand")
    assert refused.code != 0
    assert "experts" in refused.err
    assert "use experts=auto" in refused.err
