import math

import pytest
import torch

from quantizers.input_scales import InputRange, static_input_scale
from quantizers.number_formats import E4M3, int_format
from tests.quantizers.search_cases import inputs

FORMATS = {"e4m3": E4M3, "int8": int_format(8)}


def window_absmax(x, windows):
    return torch.stack([part.abs().amax(0) for part in x.tensor_split(windows)])


@pytest.mark.parametrize("name, largest", [("e4m3", 448.0), ("int8", 127.0)])
@pytest.mark.parametrize("covers", list(InputRange))
def test_what_a_scale_covers(device, covers, name, largest):
    x = inputs(600, 12)
    x[7] *= 5
    windows = x.tensor_split(6)
    values = sorted(abs(value) for row in x.tolist() for value in row)
    wanted = {
        InputRange.MINMAX: values[-1],
        InputRange.WINDOW_MEAN: sum(float(w.abs().max()) for w in windows) / 6,
        InputRange.PERCENTILE: values[math.ceil(0.995 * len(values)) - 1],
    }[covers]
    scale = static_input_scale(
        window_absmax(x, 6).to(device), x.to(device), FORMATS[name], covers, 99.5
    )
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == (1,)
    assert scale.item() == pytest.approx(wanted / largest, rel=1e-6)


@pytest.mark.parametrize(
    "percentile, value", [(100, 10.0), (99.9, 10.0), (90, 9.0), (89.9, 9.0), (50, 5.0), (0.01, 1.0)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percentile, value):
    sample = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0], [6.0, 7.0, -8.0, 9.0, -10.0]])
    for dtype in (torch.float32, torch.bfloat16):
        scale = static_input_scale(
            torch.ones(1, 5), sample.to(dtype), E4M3, InputRange.PERCENTILE, percentile
        )
        assert scale.item() == pytest.approx(value / 448)


def test_minmax_and_mean_need_no_sample():
    nothing = torch.empty(0, 3)
    windows = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]])
    both = [
        static_input_scale(windows, nothing, int_format(8), covers).item() * 127
        for covers in (InputRange.MINMAX, InputRange.WINDOW_MEAN)
    ]
    assert both == pytest.approx([8.0, 6.0])


@pytest.mark.parametrize("covers", list(InputRange))
def test_inputs_that_are_all_zero_get_a_positive_scale(covers):
    scale = static_input_scale(torch.zeros(2, 3), torch.zeros(4, 3), E4M3, covers)
    assert scale.item() == pytest.approx(1 / 448)


def test_no_windows_are_refused():
    with pytest.raises(ValueError, match="at least one window"):
        static_input_scale(torch.empty(0, 3), torch.ones(1, 3), E4M3, InputRange.MINMAX)


@pytest.mark.parametrize("percentile", [0, -1, 100.1])
def test_percentiles_that_are_none_are_refused(percentile):
    with pytest.raises(ValueError, match=r"\(0, 100\]"):
        static_input_scale(
            torch.ones(1, 3), torch.ones(1, 3), E4M3, InputRange.PERCENTILE, percentile
        )
