import dataclasses

import pytest
import torch

from quantizers.devices import compiles_kernels
from quantizers.errors import NonFiniteError
from quantizers.statistics import add_batch, empty_statistics, weighted_rows

SUMS = ("gram", "total", "mean_abs_sum")
EXTREMES = ("absmax", "minimum", "maximum")


def inputs(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.linspace(-2, 3, shape[-1])
    return (torch.randn(*shape, generator=generator) + offsets).to(device, dtype)


def expected(rows):
    """The same in float64, on the CPU."""
    x = rows.reshape(-1, rows.shape[-1]).cpu().double()
    return {
        "gram": x.T @ x,
        "total": x.sum(0),
        "mean_abs_sum": x.abs().sum(0),
        "absmax": x.abs().amax(0),
        "minimum": x.amin(0),
        "maximum": x.amax(0),
    }


def assert_equals(statistics, rows):
    reference = expected(rows)
    for name in SUMS + EXTREMES:
        value = getattr(statistics, name)
        assert value.dtype == torch.float32
        exact = name in EXTREMES
        torch.testing.assert_close(
            value.cpu().double(),
            reference[name],
            rtol=0 if exact else 3e-6,
            atol=0 if exact else 1e-6 * reference["gram"].abs().max().item(),
        )
    assert statistics.tokens == rows.numel() // rows.shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 5), (1, 16), (3, 11, 24), (2, 2, 2, 7), (9,)])
def test_equal_to_float64(device, dtype, shape):
    x = inputs(*shape, dtype=dtype, device=device)
    assert_equals(add_batch(empty_statistics(shape[-1], device), x, chunk=8), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_add_up(device, dtype):
    batches = [inputs(n, 12, seed=n, dtype=dtype, device=device) for n in (5, 1, 30)]
    statistics = empty_statistics(12, device)
    for batch in batches:
        statistics = add_batch(statistics, batch, chunk=7)
    assert_equals(statistics, torch.cat(batches))


def test_bf16_products_are_summed_in_float32(device):
    # In bf16 a sum stops growing at 256.
    x = torch.ones(5000, 3, dtype=torch.bfloat16, device=device)
    statistics = add_batch(empty_statistics(3, device), x)
    assert statistics.gram.tolist() == [[5000.0] * 3] * 3
    assert statistics.mean_abs_sum.tolist() == [5000.0] * 3


def test_arguments_stay_as_they_are(device):
    x = inputs(20, 6, device=device)
    first = add_batch(empty_statistics(6, device), x, chunk=4)
    copies = {name: getattr(first, name).clone() for name in SUMS + EXTREMES}
    x_copy = x.clone()
    second = add_batch(first, x, chunk=4)
    assert torch.equal(x, x_copy)
    assert all(torch.equal(getattr(first, name), copy) for name, copy in copies.items())
    assert second.tokens == 2 * first.tokens
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.tokens = 0


def test_the_sum_may_be_made_in_place(device):
    first, second = (inputs(9, 12, seed=seed, device=device) for seed in (1, 2))
    apart = add_batch(add_batch(empty_statistics(12, device), first), second)
    before = add_batch(empty_statistics(12, device), first)
    together = add_batch(before, second, reuse=True)
    assert together.gram.data_ptr() == before.gram.data_ptr()
    for name in SUMS + EXTREMES:
        assert torch.equal(getattr(together, name), getattr(apart, name))


def test_what_is_checked_and_mirrored_last_is_the_same(device):
    parts = inputs(4, 9, 3000, device=device).split(1)
    apart = together = empty_statistics(3000, device)
    for number, part in enumerate(parts):
        apart = add_batch(apart, part)
        together = add_batch(together, part, reuse=number > 0, last=number == 3)
    for name in SUMS + EXTREMES:
        assert torch.equal(getattr(together, name), getattr(apart, name))


def test_what_came_before_the_last_is_refused_with_it(device):
    bad = torch.full((2, 4), torch.nan, device=device)
    before = add_batch(empty_statistics(4, device), bad, last=False)
    with pytest.raises(NonFiniteError):
        add_batch(before, torch.ones(2, 4, device=device))


def test_equal_chunks_give_equal_bits(device):
    x = inputs(64, 16, device=device)
    runs = [add_batch(empty_statistics(16, device), x, chunk=16) for _ in range(2)]
    halves = empty_statistics(16, device)
    for half in x.split(32):
        halves = add_batch(halves, half, chunk=16)
    for name in SUMS + EXTREMES:
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name))
        # a kernel sums windows whole
        if not compiles_kernels(x):
            assert torch.equal(getattr(runs[0], name), getattr(halves, name))


def test_empty(device):
    empty = empty_statistics(4, device)
    assert empty.tokens == 0
    assert empty.gram.shape == (4, 4)
    assert torch.equal(empty.gram_mean(), torch.zeros(4, 4, device=device))
    assert add_batch(empty, torch.empty(0, 4, device=device)) is empty
    tensors = [getattr(empty, name).data_ptr() for name in SUMS]
    assert len(set(tensors)) == len(tensors)
    assert empty.absmax.tolist() == [0.0] * 4
    assert empty.minimum.tolist() == [torch.inf] * 4
    assert empty.maximum.tolist() == [-torch.inf] * 4


def test_extremes_of_each_window(device):
    x = inputs(5, 7, 3, device=device)
    statistics = add_batch(add_batch(empty_statistics(3, device), x[:2]), x[2:])
    assert torch.equal(statistics.window_minimum, x.amin(1))
    assert torch.equal(statistics.window_maximum, x.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_kept(device, dtype):
    x = inputs(2, 6, 3, dtype=dtype, device=device)
    statistics = add_batch(empty_statistics(3, device), x, keep=torch.tensor([1, 7], device=device))
    statistics = add_batch(statistics, x, keep=torch.tensor([], dtype=torch.int64, device=device))
    statistics = add_batch(statistics, x, keep=torch.tensor([11], device=device))
    assert statistics.sample.dtype == dtype
    assert torch.equal(statistics.sample, x.reshape(-1, 3)[[1, 7, 11]])


def test_one_sided_channels_keep_their_sign(device):
    x = torch.tensor([[1.0, -4.0], [3.0, -2.0]], device=device)
    statistics = add_batch(empty_statistics(2, device), x)
    assert statistics.minimum.tolist() == [1.0, -4.0]
    assert statistics.maximum.tolist() == [3.0, -2.0]
    assert statistics.absmax.tolist() == [3.0, 4.0]


def test_gram_mean():
    x = inputs(50, 6)
    mean = add_batch(empty_statistics(6), x).gram_mean()
    torch.testing.assert_close(mean.double(), x.double().T @ x.double() / 50, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 9, 19])
def test_non_finite_inputs_are_refused(device, dtype, value, row):
    x = inputs(20, 6, dtype=dtype, device=device)
    x[row, 2] = value
    statistics = empty_statistics(6, device)
    with pytest.raises(NonFiniteError, match="20 tokens, 6 channels"):
        add_batch(statistics, x, chunk=8)
    assert torch.equal(statistics.gram, torch.zeros(6, 6, device=device))


def test_sums_that_overflow_are_refused():
    with pytest.raises(NonFiniteError, match="overflow"):
        add_batch(empty_statistics(2), torch.full((3, 2), 1e30))


def test_gradients_are_left_behind():
    x = inputs(8, 4).requires_grad_()
    assert not add_batch(empty_statistics(4), x).gram.requires_grad


def test_wrong_arguments_are_refused():
    statistics = empty_statistics(4)
    with pytest.raises(ValueError, match="4 channels"):
        add_batch(statistics, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="int64"):
        add_batch(statistics, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk"):
        add_batch(statistics, torch.zeros(2, 4), chunk=0)


def test_few_rows_are_all_there_and_stand_for_themselves(device):
    x = inputs(900, 4, device=device)
    statistics = add_batch(add_batch(empty_statistics(4, device), x[:300]), x[300:])
    rows, weights = weighted_rows(statistics)
    assert weights.tolist() == [1.0] * 900
    assert torch.equal(rows.sort(0).values, x.sort(0).values)


def test_sums_over_many_rows_are_estimated_from_few(device):
    # one row in a hundred is forty times larger and makes most of the sum
    x = inputs(8192, 6, device=device)
    x[::100] *= 40
    statistics = empty_statistics(6, device)
    for part in x.split(1024):
        statistics = add_batch(statistics, part)
    rows, weights = weighted_rows(statistics)
    assert rows.shape == (1024, 6)
    for value in (lambda r: r.square().sum(1), lambda r: r.abs().amax(1).square()):
        estimate = float((value(rows) * weights).sum())
        assert estimate == pytest.approx(float(value(x).sum()), rel=0.03)
    # of rows that weigh little, the number is estimated
    assert float(weights.sum()) == pytest.approx(8192, rel=0.2)
    # the heaviest stand for themselves
    assert float(weights[rows.abs().amax(1) > 40].max()) == 1.0


def test_the_same_rows_are_drawn_each_time():
    x = inputs(4096, 3)
    first, second = (weighted_rows(add_batch(empty_statistics(3), x)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
