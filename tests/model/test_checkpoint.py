"""Reading safetensors checkpoints, refusing broken ones, and drawing random weights."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hsrpc.errors import CheckpointError
from hsrpc.model import safetensors_file
from hsrpc.model.checkpoint import Checkpoint, RandomWeights, has_weights
from hsrpc.model.families.registry import create_family
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import named_spec
from hsrpc.model.tensor import TensorSpec

FUSED = TensorSpec("ab_weight", (5, 3), ("model.a", "model.b"), (2, 3))


def write_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One file with `model.a` [2, 3] and `model.b` [3, 3]."""
    state = {"model.a": torch.randn(2, 3).to(dtype), "model.b": torch.randn(3, 3).to(dtype)}
    save_file(state, directory / "model.safetensors")
    return state


def write_shards(directory: Path, weight_map: dict[str, object]) -> dict[str, torch.Tensor]:
    """Two files with a tensor each, under the index given."""
    state = {"model.a": torch.randn(2, 3), "model.b": torch.randn(3, 3)}
    save_file({"model.a": state["model.a"]}, directory / "one.safetensors")
    save_file({"model.b": state["model.b"]}, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


def write_raw(directory: Path, header: object, data: bytes = b"") -> None:
    """A file with a header of our own making."""
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(directory: Path, tensor: TensorSpec = FUSED, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(tensor.shape, float("nan"), dtype=dtype)
    Checkpoint(directory).read(tensor, out)
    return out


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_sources_are_concatenated_and_converted(tmp_path, stored, served):
    """Sources lie one after the other, in the type of the destination."""
    state = write_checkpoint(tmp_path, stored)
    assert torch.equal(read(tmp_path, dtype=served), torch.cat(list(state.values())).to(served))


@pytest.mark.parametrize(
    ("stored", "value", "served", "remedy"),
    [
        (torch.float32, 70_000.0, torch.float16, "serve it with --dtype bfloat16"),
        (torch.bfloat16, -1e6, torch.float16, "serve it with --dtype bfloat16"),
        (torch.float32, 3.4e38, torch.bfloat16, "serve it with --dtype float32"),
        (torch.float64, 1e300, torch.float32, "fetch the file again"),
    ],
)
def test_weights_too_large_for_the_served_type_are_refused(tmp_path, stored, value, served, remedy):
    """The refusal has the tensor, its largest value, and the type that works."""
    state = {"model.a": torch.ones(2, 3).to(stored), "model.b": torch.ones(3, 3).to(stored)}
    state["model.b"][1, 2] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.b: expected at most .*, found .*e.*; {remedy}"):
        read(tmp_path, dtype=served)
    assert torch.equal(read(tmp_path, dtype=stored), torch.cat(list(state.values())))


def test_infinite_weights_are_read_as_they_are(tmp_path):
    """What was infinite already did not become so here."""
    save_file({"model.a": torch.ones(2, 3), "model.b": torch.full((3, 3), torch.inf)}, tmp_path / "model.safetensors")
    assert read(tmp_path, dtype=torch.float16)[2:].isinf().all()


def test_large_tensors_are_converted_piece_by_piece(tmp_path, monkeypatch):
    """Conversion in pieces smaller than the tensor leaves no seam."""
    monkeypatch.setattr(safetensors_file, "_CHUNK_ELEMENTS", 4)
    state = write_checkpoint(tmp_path, torch.float16)
    assert torch.equal(read(tmp_path), torch.cat(list(state.values())).float())


def test_sharded_checkpoints_are_read_through_their_index(tmp_path):
    """A packed tensor may have its sources in several files."""
    state = write_shards(tmp_path, {"model.a": "one.safetensors", "model.b": "two.safetensors"})
    assert torch.equal(read(tmp_path), torch.cat(list(state.values())))


def test_prefix_may_be_left_out(tmp_path):
    """Names without `model.` are found as well."""
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    assert read(tmp_path).sum() == 6


def test_many_threads_read_at_once(tmp_path):
    """Reads from several threads do not disturb one another."""
    expected = torch.cat(list(write_checkpoint(tmp_path).values()))
    checkpoint = Checkpoint(tmp_path)
    outs = [torch.empty(5, 3) for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda out: checkpoint.read(FUSED, out), outs))
    assert all(torch.equal(out, expected) for out in outs)


def test_destination_must_fit(tmp_path):
    """A destination of another shape, or with gaps, is the caller's mistake."""
    write_checkpoint(tmp_path)
    for out in (torch.empty(3, 5), torch.empty(3, 5).T):
        with pytest.raises(ValueError, match=r"ab_weight: out must be contiguous and \[5, 3\]"):
            Checkpoint(tmp_path).read(FUSED, out)


def test_missing_tensor_is_refused(tmp_path):
    """The refusal names the directory and the tensor."""
    write_checkpoint(tmp_path)
    missing = TensorSpec("c_weight", (1,), ("model.c",))
    with pytest.raises(
        CheckpointError, match=r"expected tensor model\.c, found as the nearest model\.[ab], model\.[ab];"
    ):
        Checkpoint(tmp_path).check([FUSED, missing])


def test_wrong_shape_is_refused(tmp_path):
    """Sources that only fit in sum are refused, with both shapes."""
    write_checkpoint(tmp_path)
    swapped = TensorSpec("ab_weight", (5, 3), ("model.a", "model.b"), (3, 2))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.a: expected shape \[3, 3\], found \[2, 3\]"):
        Checkpoint(tmp_path).check([swapped])


def test_unsupported_type_is_refused_only_where_it_is_needed(tmp_path):
    """Integer buffers beside the weights do no harm; as weights they are refused."""
    save_file({"model.a": torch.ones(2, 3), "steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check([TensorSpec("a", (2, 3), ("model.a",))])
    with pytest.raises(CheckpointError, match="steps: expected one of F64, F32, F16, BF16, found I64"):
        checkpoint.check([TensorSpec("steps", (1,), ("steps",))])


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated_file_is_refused(tmp_path, kept):
    """A file cut in its length, header or data is refused when it is opened."""
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected .*, found \d+ bytes; fetch"):
        Checkpoint(tmp_path)


def test_file_cut_after_opening_is_refused(tmp_path):
    """A file that became shorter gives an error, never old memory."""
    write_checkpoint(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.b: expected 36 bytes from byte \d+ on, found 26 bytes"):
        checkpoint.read(FUSED, torch.empty(5, 3))


def test_extra_long_header_is_refused_before_it_is_read(tmp_path):
    """A header length beyond the format's limit is not allocated."""
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match="expected a header of at most 100000000 bytes, found 1099511627776"):
        Checkpoint(tmp_path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "a JSON object as header, found list"),
        ({"a": 1}, "a: expected dtype, shape"),
        ({"a": GOOD | {"shape": [-2]}}, "a: expected dtype, shape"),
        ({"a": GOOD | {"shape": [True]}}, "a: expected dtype, shape"),
        ({"a": GOOD | {"data_offsets": [0]}}, "a: expected dtype, shape"),
        ({"a": GOOD | {"shape": [3]}}, "a: expected 3 elements of F32, found 8 bytes"),
        ({"a": GOOD, "b": GOOD}, "b: expected data from byte"),
        ({"a": GOOD | {"dtype": "I16", "data_offsets": [0, 80]}}, "expected a file of"),
    ],
)
def test_corrupt_header_is_refused(tmp_path, header, words):
    """Headers that lie about the data are refused."""
    write_raw(tmp_path, header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path)


def test_header_that_is_no_json_is_refused(tmp_path):
    """Eight bytes of length and then noise are not a header."""
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\xff{{{")
    with pytest.raises(CheckpointError, match="expected a JSON header"):
        Checkpoint(tmp_path)


def test_missing_shard_is_refused(tmp_path):
    """A shard that the index names and the directory lacks is refused by name."""
    write_shards(tmp_path, {"model.a": "one.safetensors", "model.b": "three.safetensors"})
    with pytest.raises(CheckpointError, match=r"three\.safetensors: expected a readable file, found No such file"):
        Checkpoint(tmp_path).check([FUSED])


def test_tensor_missing_from_its_shard_is_refused(tmp_path):
    """An index that disagrees with a shard is refused."""
    write_shards(tmp_path, {"model.a": "two.safetensors", "model.b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors: model\.a: expected the tensor that the index places"):
        Checkpoint(tmp_path).check([FUSED])


@pytest.mark.parametrize("shard", ["../one.safetensors", "/one.safetensors", "..", "one.bin", 3])
def test_shards_outside_the_directory_are_refused(tmp_path, shard):
    """An index cannot reach for files elsewhere."""
    write_shards(tmp_path, {"model.a": shard})
    with pytest.raises(CheckpointError, match=r"weight_map: model\.a: expected a \.safetensors file of the same dir"):
        Checkpoint(tmp_path)


def test_shard_that_nobody_needs_may_be_missing(tmp_path):
    """An index may list tensors of another use, whose shard was never fetched."""
    places = {"model.a": "one.safetensors", "model.b": "two.safetensors", "model.c": "three.safetensors"}
    state = write_shards(tmp_path, places)
    assert torch.equal(read(tmp_path), torch.cat(list(state.values())))


@pytest.mark.parametrize("names", [("model-1-of-2", "model-2-of-2"), ("a", "b"), ("model-x", "model-y")])
def test_shards_without_an_index_are_read(tmp_path, names):
    """What an index would say is in the headers; weights of other names and uses beside them are left alone."""
    state = {"model.a": torch.randn(2, 3), "model.b": torch.randn(3, 3)}
    for name, (tensor, value) in zip(names, state.items(), strict=True):
        save_file({tensor: value}, tmp_path / f"{name}.safetensors")
    for other in ("consolidated", "adapter_model"):
        save_file({"model.a": torch.zeros(2, 3)}, tmp_path / f"{other}.safetensors")
    assert has_weights(tmp_path)
    assert torch.equal(read(tmp_path), torch.cat(list(state.values())))


def test_consolidated_weights_beside_the_model_are_ignored(tmp_path):
    """Beside an index or a single file too; alone they are refused by name."""
    save_file({"model.a": torch.zeros(2, 3)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, found consolidated\.safetensors; fetch"):
        Checkpoint(tmp_path)
    state = write_checkpoint(tmp_path)
    assert torch.equal(read(tmp_path), torch.cat(list(state.values())))


def test_shards_without_an_index_that_are_not_all_there_are_refused(tmp_path):
    """Their numbers say how many there should be, and a tensor in two of them belongs to two models."""
    save_file({"model.a": torch.ones(1)}, tmp_path / "model-00001-of-00003.safetensors")
    save_file({"model.a": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"expected model-00002-of-00003\.safetensors beside model-00001"):
        Checkpoint(tmp_path)
    save_file({"model.b": torch.ones(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.a: expected each tensor in one file, found it in model-0"):
        Checkpoint(tmp_path)


def test_index_without_a_map_is_refused(tmp_path):
    """An index must say where tensors are."""
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path, name):
    """PyTorch's own files are never opened here; the remedy is the converter."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"found {name}; run `hsrpc convert .* DIRECTORY`"):
        Checkpoint(tmp_path)


def test_directory_without_weights_is_refused(tmp_path):
    """Neither weights nor directory: each is said."""
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*, found neither"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="expected a directory, found none"):
        Checkpoint(tmp_path / "absent")


def test_random_weights_depend_on_seed_and_source_alone():
    """The same seed gives the same layer again, another seed or layer gives other weights."""
    family = create_family(named_spec("opt-125m", torch.float32))
    first, second = family.layer_tensors(0)[2], family.layer_tensors(1)[2]
    drawn = [torch.empty(first.shape) for _ in range(4)]
    for out, (seed, tensor) in zip(drawn, [(1, first), (1, first), (2, first), (1, second)], strict=True):
        RandomWeights(seed).read(tensor, out)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_random_weights_fill_large_tensors_without_equal_rows():
    """A tensor larger than a random block is filled to the end, and no two rows are alike."""
    tensor = TensorSpec("embed_weight", (70_000, 128), ("embed",))
    out = torch.full(tensor.shape, float("nan"), dtype=torch.float16)
    RandomWeights(0).read(tensor, out)
    assert torch.isfinite(out).all()
    assert len(out[:, :8].unique(dim=0)) == len(out)
    assert out.float().std() == pytest.approx(128**-0.5, rel=0.01)


def test_random_weights_take_few_numbers():
    """Drawing them is most of the time that a model of many experts takes to start."""
    tensor = TensorSpec("expert_0_in", (1536, 512), ("in",))
    out = torch.empty(tensor.shape)
    RandomWeights(0).read(tensor, out)
    assert 100_000 < len(out.unique()) < 200_000


@pytest.mark.parametrize("shape", ["opt-125m", "opt-350m", "llama-2-7b"])
def test_random_model_has_lively_logits_in_half_precision(tmp_path, draw_packed, shape):
    """A deep model with random weights stays inside float16's range and tells tokens apart."""
    small = {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 4, "vocab_size": 64}
    more = {"ffn_dim": 128, "intermediate_size": 96, "word_embed_proj_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape] | small | more))
    logits = draw_packed(tmp_path, torch.float16).logits(([3, 1, 4, 1, 5], [9, 2]))
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


def test_random_norms_are_near_one_and_biases_near_zero():
    """Norms neither silence nor inflate a layer; biases matter little."""
    family = create_family(named_spec("opt-125m", torch.float32))
    drawn = {tensor.name: torch.empty(tensor.shape) for tensor in family.layer_tensors(0)}
    for tensor in family.layer_tensors(0):
        RandomWeights(0).read(tensor, drawn[tensor.name])
    assert (drawn["attention_norm_weight"] - 1).abs().max() < 0.2
    assert drawn["attention_norm_bias"].abs().max() < 0.2
    assert 0 < drawn["fc1_bias"].abs().max() < 0.2
