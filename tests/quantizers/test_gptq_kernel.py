"""The kernel of GPTQ's columns against the plain loop; needs a GPU and its compiler."""

import pytest
import torch

from quantizers.gptq import round_columns_plainly
from quantizers.number_formats import E4M3, E5M2, int_format

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def problem(columns, rows, number, symmetric, device):
    """What a block of columns is rounded from, on a device."""
    draw = torch.Generator().manual_seed(columns * 1000 + rows)
    weight = 0.05 * torch.randn(columns, rows, generator=draw)
    carried = 0.005 * torch.randn(columns, rows, generator=draw)
    unit = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=draw).triu(1)
    scale = 0.15 / number.qmax * (0.5 + torch.rand(9, rows, generator=draw))
    zero = None
    if not symmetric:
        zero = torch.randint(-3, 4, (9, rows), generator=draw).float()
    groups = torch.randint(9, (columns,), generator=draw)
    given = (weight, carried, unit, scale, zero, groups)
    return [None if t is None else t.to(device) for t in given]


@pytest.mark.parametrize(
    ("columns", "rows"), [(128, 512), (96, 33), (1, 7), (17, 1), (64, 100), (300, 4), (512, 3)]
)
@pytest.mark.parametrize(
    ("number", "symmetric"),
    [
        (int_format(4), True),
        (int_format(4), False),
        (int_format(8), True),
        (E4M3, True),
        (E5M2, True),
    ],
)
def test_the_kernel_rounds_as_the_loop_does(columns, rows, number, symmetric):
    from quantizers.gptq_kernel import round_columns_at_once

    given = problem(columns, rows, number, symmetric, DEVICE)
    codes, error = round_columns_at_once(*given, number)
    wanted, lost = round_columns_plainly(*given, number)
    # a last bit may turn a code over, and all that follows it in its row
    rows_alike = (codes == wanted).all(0)
    assert rows_alike.float().mean() >= 0.98 or (~rows_alike).sum() <= 1
    torch.testing.assert_close(error[:, rows_alike], lost[:, rows_alike], rtol=1e-4, atol=1e-6)
    again, same = round_columns_at_once(*given, number)
    assert torch.equal(again, codes) and torch.equal(same, error)
