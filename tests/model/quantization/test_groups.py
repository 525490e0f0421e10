"""Readers of whole numbers in groups: any matrix comes out as its values, and what is damaged is refused by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization import groups
from hsrpc.model.quantization.reader import Reader
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.tensor import TensorSpec
from tests.model.quantization.packed import Parts, awq, compressed, gptq, in_groups, signed

_WEIGHT = TensorSpec("w", (24, 40), ("layer.weight",))
_EIGHTS = st.integers(1, 5).map(lambda count: 8 * count)


def reader(**section: object) -> Reader:
    found = read_quantization(ConfigFile("config.json", {"quantization_config": section}))
    assert found is not None
    return found


def of_gptq(**section: object) -> Reader:
    return reader(**{"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False} | section)


def of_awq(**section: object) -> Reader:
    return reader(
        **{"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"} | section
    )


def of_compressed(form: str = "pack-quantized", **weights: object) -> Reader:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False} | weights
    return reader(quant_method="compressed-tensors", format=form, config_groups={"group_0": {"weights": weights}})


def read(reader: Reader, parts: Parts, tensor: TensorSpec = _WEIGHT) -> torch.Tensor:
    """The values that a checkpoint with these tensors of one module has."""
    with tempfile.TemporaryDirectory() as directory:
        save_file({f"layer.{end}": part for end, part in parts.items()}, Path(directory) / "model.safetensors")
        out = torch.empty(tensor.shape)
        Checkpoint(Path(directory), reader).read(tensor, out)
    return out


@settings(max_examples=30, deadline=None)
@given(rows=_EIGHTS, columns=_EIGHTS, size=st.sampled_from((-1, 1, 7, 16)), flags=st.tuples(*4 * [st.booleans()]))
def test_gptq(rows: int, columns: int, size: int, flags: tuple[bool, bool, bool, bool]) -> None:
    """Both versions, any groups of neighbours and others; the last group may be smaller."""
    symmetric, act_order, first, wide = flags
    made = in_groups(
        torch.randn(rows, columns), bits := 8 if wide else 4, size, symmetric=symmetric, act_order=act_order
    )
    section = {"bits": bits, "group_size": size, "sym": symmetric, "desc_act": act_order}
    found = of_gptq(**section, checkpoint_format="gptq" if first else "gptq_v2")
    tensor = TensorSpec("w", (rows, columns), ("layer.weight",))
    assert torch.equal(read(found, gptq(made, bits, version=1 if first else 2), tensor), made.values)


@settings(max_examples=30, deadline=None)
@given(rows=_EIGHTS, columns=_EIGHTS, size=st.sampled_from((-1, 1, 7, 16)))
def test_awq(rows: int, columns: int, size: int) -> None:
    """Zero points of any kind; none stands for the middle."""
    made = in_groups(torch.randn(rows, columns), 4, size, symmetric=False)
    tensor = TensorSpec("w", (rows, columns), ("layer.weight",))
    assert torch.equal(read(of_awq(group_size=size), awq(made), tensor), made.values)
    made = in_groups(torch.randn(rows, columns), 4, size, symmetric=True)
    parts = awq(made)
    del parts["qzeros"]
    assert torch.equal(read(of_awq(group_size=size, zero_point=False), parts, tensor), made.values)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), size=st.sampled_from((1, 7, 16)), order=st.booleans())
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed(bits: int, rows: int, columns: int, size: int, order: bool) -> None:
    """Rows that fill no word, zero points in words and in bytes, groups of columns where there are any."""
    made = in_groups(torch.randn(rows, columns), bits, size, symmetric=False, act_order=order)
    tensor = TensorSpec("w", (rows, columns), ("layer.weight",))
    found, parts = of_compressed(num_bits=bits, group_size=size), compressed(made, bits)
    assert torch.equal(read(found, parts, tensor), made.values)
    parts["weight_zero_point"] = (made.zeros - (1 << bits - 1)).to(torch.int8)
    if not order:
        parts["weight_g_idx"] = torch.full_like(made.groups, -1)
    assert torch.equal(read(found, parts, tensor), made.values)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_bytes(strategy: str) -> None:
    """With a sign, and zero points that have one."""
    weight = torch.randn(24, 40)
    made = in_groups(weight.view(1, -1) if strategy == "tensor" else weight, 8, -1, symmetric=False)
    parts = signed(made) | {"weight_zero_point": (made.zeros - 128).to(torch.int8)}
    parts["weight"] = parts["weight"].view(weight.shape)
    found = of_compressed("int-quantized", num_bits=8, strategy=strategy)
    assert torch.equal(read(found, parts), made.values.view(weight.shape))


def test_bytes_with_groups_of_any_columns() -> None:
    """As compressed-tensors wrote them before 0.20."""
    made = in_groups(torch.randn(24, 40), 8, 16, symmetric=True, act_order=True)
    found = of_compressed("int-quantized", num_bits=8, symmetric=True, actorder="group")
    assert torch.equal(read(found, signed(made) | {"weight_g_idx": made.groups}), made.values)


def test_matrices_beyond_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part after part."""
    monkeypatch.setattr(groups, "_READ_AT_ONCE", 1)
    tensor = TensorSpec("w", (40, 296), ("layer.weight",))
    made = in_groups(torch.randn(tensor.shape), 4, 16, symmetric=False)
    for found, parts in ((of_gptq(), gptq(made, 4)), (of_awq(), awq(made))):
        assert torch.equal(read(found, parts, tensor), made.values)
    odd = in_groups(torch.randn(40, 301), 4, 16, symmetric=False)
    tensor = TensorSpec("w", (40, 301), ("layer.weight",))
    assert torch.equal(read(of_compressed(), compressed(odd, 4), tensor), odd.values)


def test_gptq_where_modules_differ() -> None:
    """Rules by pattern have other bits and groups; which of them holds is seen from the shapes."""
    rules = {"+:.*down.*": {"bits": 8, "group_size": 20}, "-:.*up.*": {}}
    for bits, size in ((4, 16), (8, 20)):
        made = in_groups(torch.randn(24, 40), bits, size, symmetric=False)
        assert torch.equal(read(of_gptq(dynamic=rules), gptq(made, bits)), made.values)


@pytest.mark.parametrize(
    ("columns", "sizes", "found"),
    [
        (200, (128, 40, 1 << 20), {2: 128, 5: 40, 1: 200}),
        (192, (128, 96, 32), {6: 32}),
        (100, (128, 1 << 20), {1: 100}),
    ],
)
def test_sizes_of_groups(columns: int, sizes: tuple[int, ...], found: dict[int, int], tmp_path: Path) -> None:
    """By their number; not where two sizes make as many groups, which is refused where nothing else is left."""
    save_file({"layer.scales": torch.ones(2, 24)}, tmp_path / "model.safetensors")
    scales = Checkpoint(tmp_path).stored("layer.scales")
    assert scales is not None
    assert groups.group_sizes(scales, columns, sizes) == found
    with pytest.raises(CheckpointError, match=r"layer\.scales: expected 192 columns to be parted"):
        groups.group_sizes(scales, 192, (128, 96))


def _tensor(*shape: int, dtype: torch.dtype = torch.int32) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: torch.zeros(shape, dtype=dtype)


def _first(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda part: part.view(-1).index_fill(0, torch.tensor([0]), number).view(part.shape)


DAMAGE: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("gptq", "qweight", _tensor(4, 3), r"shape \[5, 24\] of I32, found shape \[4, 3\] of I32; fetch"),
    ("gptq", "qweight", _tensor(5, 24, dtype=torch.float32), r"shape \[5, 24\] of I32, found .* of F32"),
    ("gptq", "scales", lambda part: part[:2].clone(), r"shape \[3, 24\] of F16 .*, found shape \[2, 24\] of F16"),
    ("gptq", "qzeros", _tensor(3, 4), r"shape \[3, 3\] of I32, found"),
    ("gptq", "g_idx", _tensor(8), r"shape \[40\] of I32, found"),
    ("gptq", "g_idx", _first(2), "groups of 16 columns .*, found columns in another order; set `desc_act` to true"),
    ("gptq-order", "g_idx", _first(3), "groups from 0 to 2, .*, found 3; fetch"),
    ("gptq-order", "g_idx", _first(-1), "groups from 0 to 2, .*, found -1; fetch"),
    ("gptq-symmetric", "qzeros", _first(0), "zero points that are 8, .*, found 1; set `sym`"),
    ("awq", "qweight", _tensor(40, 4), r"shape \[40, 3\] of I32, found"),
    ("awq", "scales", lambda part: part.t().contiguous(), r"shape \[3, 24\] of F16 .*, found shape \[24, 3\] of F16"),
    ("awq", "qzeros", _tensor(3, 4), r"shape \[3, 3\] of I32, found"),
    ("compressed", "weight_packed", _tensor(24, 6), r"shape \[24, 5\] of I32, found"),
    (
        "compressed",
        "weight_scale",
        lambda part: part[:, :2].clone(),
        r"shape \[24, 3\] of F16 .*, found shape \[24, 2\]",
    ),
    ("compressed", "weight_zero_point", _tensor(2, 3), r"shape \[3, 3\] of I32, found"),
    ("compressed", "weight_g_idx", _first(7), "groups from 0 to 2, .*, found 7; fetch"),
]


def _whole(kind: str) -> tuple[Reader, Parts]:
    made = in_groups(torch.randn(24, 40), 4, 16, symmetric="symmetric" in kind, act_order="order" in kind)
    if kind == "compressed":
        return of_compressed(), compressed(made, 4)
    if kind == "awq":
        return of_awq(), awq(made)
    return of_gptq(desc_act="order" in kind, sym="symmetric" in kind), gptq(made, 4)


@pytest.mark.parametrize(("kind", "end", "damage", "words"), DAMAGE)
def test_what_is_damaged_is_refused(
    kind: str, end: str, damage: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    """By the name of the tensor, with what was expected and found, and what can be done."""
    found, parts = _whole(kind)
    parts[end] = damage(parts[end])
    with pytest.raises(CheckpointError, match=rf"layer\.{end}: expected {words}"):
        read(found, parts)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        ("gptq-order", "g_idx"),
        ("awq", "qzeros"),
        ("compressed", "weight_scale"),
        ("compressed", "weight_zero_point"),
    ],
)
def test_what_is_missing_is_refused(kind: str, end: str) -> None:
    """By the name of the tensor."""
    found, parts = _whole(kind)
    del parts[end]
    with pytest.raises(CheckpointError, match=rf"expected tensor layer\.{end}, found as the nearest layer\."):
        read(found, parts)


@pytest.mark.parametrize("make", [of_gptq, of_awq])
def test_columns_that_fill_no_words_are_refused(make: Callable[..., Reader]) -> None:
    """Neither format has them."""
    parts = {"qweight": torch.zeros(36, 3, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"layer\.qweight: expected .*columns that .*, not .*36, found"):
        read(make(), parts, TensorSpec("w", (24, 36), ("layer.weight",)))


@pytest.mark.parametrize(
    ("make", "section", "words"),
    [
        (of_gptq, {"bits": 3}, "bits: expected 4 or 8, found 3"),
        (of_gptq, {"bits": True}, "bits: expected 4 or 8, found True"),
        (of_gptq, {"group_size": 0}, "group_size: expected a whole number from 1 to .*, or -1, found 0"),
        (of_gptq, {"checkpoint_format": "marlin"}, "checkpoint_format: expected one of gptq, gptq_v2, found 'marlin'"),
        (of_gptq, {"is_marlin_format": True}, "is_marlin_format: expected false"),
        (of_gptq, {"pack_dtype": "int16"}, "pack_dtype: expected one of int32"),
        (of_gptq, {"dynamic": {"+:x": {"bits": 2}}}, r"dynamic: \+:x: bits: expected 4 or 8, found 2"),
        (of_awq, {"bits": 8}, "bits: expected 4, found 8"),
        (of_awq, {"version": "gemv"}, "version: expected one of gemm.*found 'gemv'"),
        (of_compressed, {"num_bits": 6}, "num_bits: expected 4 or 8, found 6"),
        (of_compressed, {"type": "float"}, "type: expected one of int, found 'float'"),
        (of_compressed, {"strategy": "token"}, "strategy: expected one of tensor, channel, group"),
    ],
)
def test_what_is_not_served_is_refused(make: Callable[..., Reader], section: dict[str, object], words: str) -> None:
    """By key and value, with what can be served."""
    with pytest.raises(CheckpointError, match=words) as caught:
        make(**section)
    assert "serve" in str(caught.value)
