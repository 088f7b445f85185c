"""How large numbers are, against NumPy's partition of the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from quantizers.channel_transform import ChannelTransform
from quantizers.statistics import add_batch, empty_statistics
from tasks.engine.ranges import SAMPLED, described, of_inputs, of_weight
from tasks.quantize import Origin, quantize
from tests.tasks.conftest import JobOf, make_entry


def weight_range(weight: torch.Tensor) -> dict[str, float]:
    found: dict[str, float] = described({"w": {"it": of_weight(weight)}}).work()["w"]["it"]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 48)])
def test_percentiles_are_entries_of_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = weight_range(weight)
    magnitudes = numpy.sort(numpy.abs(weight.double().numpy()).ravel())
    for name, share in (("p50", 50), ("p99", 99), ("p99.9", 99.9)):
        assert found[name] == numpy.percentile(magnitudes, share, method="nearest")
    assert found["absmax"] == magnitudes[-1]


def test_the_largest_is_found_between_the_sampled_ones() -> None:
    weight = torch.zeros(3, SAMPLED)
    weight[1, 1] = -7.0
    assert weight_range(weight) == {"absmax": 7.0, "p50": 0.0, "p99": 0.0, "p99.9": 0.0}


def test_inputs_before_and_after_a_transform() -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    scale, shift = torch.linspace(0.5, 3, 6), torch.linspace(-1, 1, 6)
    statistics = {"a": empty_statistics(6), "b": empty_statistics(6)}
    statistics = {name: add_batch(empty, x) for name, empty in statistics.items()}
    found = described(of_inputs(statistics, {"a": ChannelTransform(scale, shift)})).work()
    moved = (x - shift) / scale
    assert found["a"]["before"]["absmax"] == float(x.abs().max())
    assert found["a"]["after"]["absmax"] == pytest.approx(float(moved.abs().max()), rel=1e-6)
    middle = moved.abs().amax((0, 1)).sort().values
    assert found["a"]["after"]["p50"] == pytest.approx(float(middle[2]), rel=1e-6)
    assert found["b"]["before"] == found["b"]["after"] == found["a"]["before"]


def test_each_is_described_by_its_own_numbers_whatever_is_beside_it() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {str(n): torch.randn(n, 8, generator=generator) for n in (5, 2, 5, 7, 2)}
    weights |= {f"more {n}": torch.randn(n, 8, generator=generator) for n in (2, 5)}
    together = described({name: {"it": of_weight(w)} for name, w in weights.items()}).work()
    assert list(together) == list(weights)
    for name, weight in weights.items():
        assert together[name]["it"] == weight_range(weight)
    assert described({}).work() == {}


def test_a_rounded_block_says_both_ranges(job_of: JobOf, tiny: Path) -> None:
    job = job_of(tiny, "rtn_w4a16")
    value = make_entry(quantize, job, Origin(job.steps[-1], None, None), block=1).value
    assert value["inputs"] == {}
    stored = job.read_block(1)
    assert set(value["weights"]) == set(value["linears"])
    for name, both in value["weights"].items():
        weight = stored[f"{name}.weight"].float().reshape(-1, 128)
        largest = weight.abs().amax(1)
        assert both["before"]["absmax"] == float(largest.max())
        # symmetric codes of 4 bits reach from -8 to 7, the scale is the largest over 7.5 or 7
        assert float(largest.max()) * 0.8 < both["after"]["absmax"] < float(largest.max()) * 1.2
        assert both["after"]["absmax"] != both["before"]["absmax"]
