"""The kernel that decodes codes with scales, held against the values that checkpoints of AWQ and GPTQ mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking
from hsrpc.model.kernels import scaled
from hsrpc.model.quantization.reader import WeightTensors
from hsrpc.model.quantization.registry import read_quantization
from tests.model.quantization.packed import Groups, Parts, awq, compressed, gptq, in_groups

_COMPRESSED = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 20, "symmetric": False}
CASES: dict[str, tuple[dict[str, object], Groups, Parts]] = {}
"""What config.json says, a matrix, and its tensors."""


def case(name: str, made: Groups, parts: Parts, **section: object) -> None:
    CASES[name] = section, made, parts


torch.manual_seed(3)
made = in_groups(torch.randn(24, 104), 4, 32, symmetric=False)
case("awq", made, awq(made), quant_method="awq", bits=4, group_size=32)
made = in_groups(torch.randn(16, 104), 4, 32, symmetric=True)
case("gptq", made, gptq(made, 4), quant_method="gptq", bits=4, group_size=32)
made = in_groups(torch.randn(24, 104), 4, 20, symmetric=False, act_order=True)
case("gptq-order", made, gptq(made, 4), quant_method="gptq", bits=4, group_size=20, sym=False, desc_act=True)
made = in_groups(torch.randn(24, 72), 8, 32, symmetric=True, act_order=True)
case("gptq8-order", made, gptq(made, 8), quant_method="gptq", bits=8, group_size=32, desc_act=True)
made = in_groups(torch.randn(13, 45), 8, 20, symmetric=False, act_order=True)
group = {"weights": _COMPRESSED, "format": "pack-quantized"}
case("compressed", made, compressed(made, 8), quant_method="compressed-tensors", config_groups={"group": group})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(CASES))
def test_decode(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product in float32, rounded once."""
    monkeypatch.setattr(scaled, "_GROUP", 1)
    section, made, parts = CASES[name]
    save_file({f"layer.{end}": part for end, part in parts.items()}, tmp_path / "model.safetensors")
    reader = read_quantization(ConfigFile("config.json", {"quantization_config": section}))
    assert reader is not None
    checkpoint = Checkpoint(tmp_path, reader)
    found = reader.find(WeightTensors("layer", *made.codes.shape, checkpoint.stored, checkpoint.missing))
    assert found is not None
    packing = ScaledPacking(found.matrix.shape, dtype, (found.matrix,))
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for part in packing.parts(data):
        found.fill(part)
    operand = torch.full(packing.shape, 3.0, dtype=dtype)
    scaled.decoding([Encoded(packing, data, operand)])()
    assert torch.equal(operand, made.values.to(dtype))
