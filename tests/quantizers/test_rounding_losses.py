import pytest
import torch
from torch import Tensor

from quantizers import rounding_losses
from quantizers.number_formats import int_format
from quantizers.rounding import QuantizedWeight, dequantize, round_to_nearest
from quantizers.rounding_losses import rounding_energies
from quantizers.schemes import Granularity, WeightScheme

SCHEME = WeightScheme(int_format(4), True, Granularity.GROUP, group_size=8)


def rounded() -> tuple[Tensor, QuantizedWeight, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 24, generator=draw), torch.randn(40, 24, generator=draw)
    inverse = torch.rand(24, generator=draw) + 0.5
    return weight, round_to_nearest(weight, SCHEME), x, inverse


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5), slice(4, 4)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("entries", [1, 60, 1 << 22])
def test_energies_are_those_of_the_outputs(
    rows: slice, scaled: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rounding_losses.PART_ENTRIES, "cpu", entries)
    weight, found, x, inverse = rounded()
    given = inverse if scaled else None
    weights, outputs = rounding_energies(weight, found, SCHEME, rows, x.T @ x, given)
    lost = (weight - dequantize(found, SCHEME)).double()[rows]
    factor = inverse.double() if scaled else torch.ones(24, dtype=torch.float64)
    for of_matrix, position in ((lost, 0), (weight.double()[rows], 1)):
        assert float(weights[position]) == pytest.approx(float(of_matrix.square().sum()), rel=1e-5)
        made = x.double() @ (of_matrix * factor).T
        assert outputs is not None
        assert float(outputs[position]) == pytest.approx(float(made.square().sum()), rel=1e-4)


def test_without_inputs_there_are_no_outputs() -> None:
    weight, found, _, _ = rounded()
    weights, outputs = rounding_energies(weight, found, SCHEME)
    assert outputs is None
    assert weights.dtype == torch.float64
