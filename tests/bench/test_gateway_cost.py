"""What the OpenAI port costs, measured for a moment."""

from __future__ import annotations

import json

import pytest

from benchmarks.gateway_cost.__main__ import Sample, main, medians
from benchmarks.gateway_cost.client import Way


@pytest.mark.timeout(120)
def test_each_door_is_measured_by_turns(tmp_path, capsys):
    """All tokens come by each, the gateway works for one of them, and the file has every sample with its header."""
    file = tmp_path / "gateway.json"
    main(["--streams=4", "--rates=400", "--seconds=0.5", "--repeats=1", f"--json={file}"])
    found = json.loads(file.read_text())
    assert [sample["way"] for sample in found["samples"]] == list(Way)
    for sample in found["samples"]:
        assert 0 < sample["first_token_p50"] <= sample["first_token_p99"]
        assert 100 < sample["tokens_per_second"] < 800
        assert sample["server_cpu"] > 0
    assert found["header"]["command"].startswith("python -m benchmarks.gateway_cost --streams=4")
    assert "OpenAI port" in capsys.readouterr().out


def test_medians_are_of_a_door_at_a_rate():
    """Not of all samples together."""

    def sample(way: Way, rate: float) -> Sample:
        return Sample(
            way=way,
            offered=10.0,
            tokens_per_second=rate,
            first_token_p50=1.0,
            first_token_p99=1.0,
            server_cpu=1.0,
            gateway_cpu=1.0,
        )

    samples = [sample(way, rate + 10 * place) for place, way in enumerate(Way) for rate in (1.0, 2.0, 9.0)]
    assert [(typical.way, typical.tokens_per_second) for typical in medians(samples)] == list(
        zip(Way, (2.0, 12.0, 22.0), strict=True)
    )
