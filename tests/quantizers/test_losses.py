import math

import pytest
import torch

from quantizers.losses import relative_output_error, relative_weight_error


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 32)])
def test_weight_error_equals_float64(device, dtype, shape):
    weight = random(*shape, device=device, dtype=dtype)
    restored = (weight.float() + 0.1 * random(*shape, seed=1, device=device)).to(dtype)
    w, q = weight.double(), restored.double()
    expected = ((w - q).square().sum() / w.square().sum()).sqrt().item()
    assert relative_weight_error(weight, restored) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 32)])
def test_output_error_is_that_of_the_outputs(device, dtype, shape):
    weight = random(*shape, device=device, dtype=dtype)
    restored = (weight.float() + 0.1 * random(*shape, seed=1, device=device)).to(dtype)
    x = random(200, shape[1], seed=2, device=device).double()
    outputs, damaged = x @ weight.double().T, x @ restored.double().T
    expected = ((outputs - damaged).norm() / outputs.norm()).item()
    gram = (x.T @ x).float()
    assert relative_output_error(weight, restored, gram) == pytest.approx(expected, rel=1e-5)
    assert relative_output_error(weight, restored, gram / 200) == pytest.approx(expected, rel=1e-5)


def test_nothing_lost():
    weight, gram = random(4, 6), torch.eye(6)
    assert relative_weight_error(weight, weight) == 0.0
    assert relative_output_error(weight, weight, gram) == 0.0


def test_zero_by_zero_is_zero_and_something_by_zero_is_infinite():
    zeros, ones, gram = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)
    assert relative_weight_error(zeros, zeros) == 0.0
    assert relative_output_error(zeros, zeros, gram) == 0.0
    assert relative_output_error(ones, zeros, torch.zeros(3, 3)) == 0.0
    assert relative_weight_error(zeros, ones) == math.inf
    assert relative_output_error(zeros, ones, gram) == math.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_is_not_hidden(value):
    weight = torch.ones(2, 3)
    restored = weight.clone()
    restored[0, 0] = value
    assert not math.isfinite(relative_weight_error(weight, restored))
    assert not math.isfinite(relative_output_error(weight, restored, torch.eye(3)))


def test_parameters_are_accepted_and_stay_as_they_are():
    weight = torch.nn.Parameter(random(3, 5))
    restored = weight.detach() * 0.5
    copy = restored.clone()
    assert relative_weight_error(weight, restored) == pytest.approx(0.5)
    assert relative_output_error(weight, restored, torch.eye(5)) == pytest.approx(0.5)
    assert torch.equal(restored, copy)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        relative_weight_error(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        relative_output_error(torch.ones(2, 3), torch.ones(2, 3), torch.eye(2))
