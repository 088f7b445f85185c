"""The output error against outputs of all tokens, with weights and inputs really quantized."""

import pytest
import torch

from quantizers.channel_transform import ChannelTransform
from quantizers.input_scales import InputRange
from quantizers.number_formats import E4M3
from quantizers.output_error import GroupProblem, group_input_scale, output_error
from quantizers.schemes import ActivationScheme, Granularity
from tests.quantizers.literal import output_loss, rounded_weight
from tests.quantizers.search_cases import (
    ACTIVATIONS,
    allowed,
    inputs,
    statistics_of,
    weight_scheme,
    weights,
)

BF16 = torch.bfloat16
CASES = {
    "int4 group": (weight_scheme("int4", "group", dtype=BF16), {"width": 16}),
    "int4 channel": (
        weight_scheme("int4", "channel", symmetric=False, dtype=BF16),
        {"symmetric": False},
    ),
    "int8 channel": (weight_scheme("int8", "channel"), {}),
    "e4m3 tensor": (weight_scheme("e4m3", "tensor"), {"whole": True}),
}


def transform_of(columns, shifted):
    draw = torch.Generator().manual_seed(3)
    scale = torch.exp(0.5 * torch.randn(columns, generator=draw))
    return ChannelTransform(scale, torch.randn(columns, generator=draw) if shifted else None)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("case", CASES)
def test_is_that_of_the_outputs(device, case, act, shifted):
    scheme, how = CASES[case]
    name, bf16 = case.split()[0], {"scale_dtype": scheme.scale_dtype}
    x, group, transform = inputs(300, 48), weights((20, 12), 48), transform_of(48, shifted)
    moved = ChannelTransform(
        transform.scale.to(device), transform.shift.to(device) if shifted else None
    )
    problem = GroupProblem(
        [w.to(device) for w in group],
        statistics_of(x.to(device), kept=300),
        scheme,
        ACTIVATIONS.get(act or ""),
    )
    error = output_error(problem, moved)
    wanted = output_loss(
        x,
        group,
        lambda w: rounded_weight(w, name, **how, **bf16),
        act,
        shift=transform.shift.double() if shifted else 0.0,
        scale=transform.scale.double(),
    )
    assert error.dtype == torch.float64
    assert error.shape == ()
    rel = allowed(1e-4, problem.weights[0]) if act is None else 1e-3
    assert float(error) == pytest.approx(wanted, rel=rel)


def test_the_weights_part_needs_no_sample():
    x, group = inputs(300, 48), weights((20,), 48)
    full, none = (
        GroupProblem(group, statistics_of(x, kept=kept), CASES["int4 group"][0])
        for kept in (300, 0)
    )
    transform = transform_of(48, True)
    assert torch.equal(output_error(full, transform), output_error(none, transform))


def test_inputs_that_are_never_rounded_cost_what_the_weights_cost():
    # e4m3 holds these inputs exactly: a static scale of one is what their range gives
    x = torch.randint(-3, 4, (200, 16), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0] = 448.0
    group = weights((8,), 16)
    plain, rounded = (
        GroupProblem(group, statistics_of(x, kept=200), weight_scheme("e4m3", "channel"), act)
        for act in (None, ACTIVATIONS["e4m3 static"])
    )
    unchanged = ChannelTransform(torch.ones(16))
    assert float(output_error(rounded, unchanged)) == pytest.approx(
        float(output_error(plain, unchanged)), rel=1e-6
    )


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("covers", list(InputRange))
def test_a_static_scale_covers_the_transformed_inputs(covers, shifted):
    x, transform = inputs(300, 48), transform_of(48, shifted)
    problem = GroupProblem(
        weights((8,), 48),
        statistics_of(x, kept=300, windows=6),
        weight_scheme("e4m3", "tensor"),
        ACTIVATIONS["e4m3 static"],
        covers,
        99.0,
    )
    moved = (x - (transform.shift if shifted else 0)) / transform.scale
    windows = [float(part.abs().max()) for part in moved.tensor_split(6)]
    wanted = {
        InputRange.MINMAX: max(windows),
        InputRange.WINDOW_MEAN: sum(windows) / 6,
        InputRange.PERCENTILE: sorted(moved.abs().flatten().tolist())[
            int(0.99 * moved.numel()) - 1
        ],
    }[covers]
    scale = group_input_scale(problem, transform)
    assert scale is not None
    assert scale.item() == pytest.approx(wanted / 448, rel=1e-5)


def test_dynamic_inputs_have_no_scale():
    group, statistics = weights((8,), 16), statistics_of(inputs(20, 16))
    for act in (None, ACTIVATIONS["int8 token"]):
        problem = GroupProblem(group, statistics, weight_scheme("int8", "channel"), act)
        assert group_input_scale(problem, ChannelTransform(torch.ones(16))) is None


def test_groups_of_a_token_are_rounded_each_by_its_own_range():
    scheme = ActivationScheme(E4M3, True, Granularity.GROUP, dynamic=True, group_size=8)
    x, group = inputs(100, 16), weights((8,), 16)
    unchanged = ChannelTransform(torch.ones(16))
    problem = GroupProblem(
        group, statistics_of(x, kept=100), weight_scheme("e4m3", "block"), scheme
    )
    weight = group[0]
    # the block is wider than the weight: it has one scale
    lossy = rounded_weight(weight, "e4m3", whole=True)
    absmax = x.unflatten(1, (2, 8)).abs().amax(-1, keepdim=True)
    codes = (x.unflatten(1, (2, 8)) * (448 / absmax)).to(torch.float8_e4m3fn).float()
    seen = (codes * absmax / 448).flatten(1)
    wanted = (seen.double() @ lossy.T - x.double() @ weight.double().T).square().sum(1).mean()
    assert float(output_error(problem, unchanged)) == pytest.approx(float(wanted), rel=1e-3)


def test_weights_stay_as_they_were():
    group = weights((8, 4), 16)
    copies = [w.clone() for w in group]
    problem = GroupProblem(group, statistics_of(inputs(20, 16)), weight_scheme("int8", "channel"))
    output_error(problem, transform_of(16, False))
    assert all(torch.equal(a, b) for a, b in zip(group, copies, strict=True))
    assert problem.columns == 16
    assert torch.equal(problem.stacked(), torch.cat(copies))
