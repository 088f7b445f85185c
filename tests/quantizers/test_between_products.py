"""Norms, positions and gates: in float64 by their formulas; kernels, on a GPU, as plain torch."""

import pytest
import torch
from torch import Tensor

from quantizers import between_products
from quantizers.between_products import rms_norm, rotated_positions, swiglu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPSILON = 1e-5
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def drawn(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(*shape, generator=draw)).to(dtype).to(device)


def tables(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, D) of the angles of positions, float64."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    both = torch.cat((angles, angles), -1).expand(batch, length, width)
    return both.cos(), both.sin()


def heads_of(batch: int, heads: int, length: int, width: int, **options) -> Tensor:
    """(B, H, T, D) as attention has it: the heads of a token side by side in memory."""
    return (
        drawn(batch, length, heads * width, **options)
        .view(batch, length, heads, -1)
        .transpose(1, 2)
    )


def test_a_row_of_the_norm_has_the_weights_size():
    x, weight = drawn(5, 24, dtype=torch.float64).float(), drawn(24, dtype=torch.float32)
    wanted = torch.stack([row / (row @ row / 24 + EPSILON).sqrt() for row in x.double()]) * weight
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), wanted.float())


def test_each_pair_of_channels_is_turned_by_its_angle():
    x = heads_of(2, 3, 7, 8, dtype=torch.float32)
    cos, sin = tables(1, 7, 8)
    # a pair as a complex number times e^(i angle)
    pairs = torch.complex(*x.double().chunk(2, -1))
    turned = pairs * torch.complex(cos, sin)[:, None, :, :4]
    wanted = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotated_positions(x, cos.float(), sin.float()), wanted.float())


def test_a_gate_lets_through_its_silu():
    gate, up = drawn(3, 11, dtype=torch.float32), drawn(11, 3, dtype=torch.float32).T
    wanted = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    torch.testing.assert_close(swiglu(gate, up), wanted.float())


def plain(function, *given):
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(between_products, "compiles_kernels", lambda *_: False)
        return function(*given)


def kernel(function, *given):
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(between_products, "silu", None)
        patched.setattr(torch, "rsqrt", None)
        patched.setattr(torch, "cat", None)
        return function(*given)


def require_close(found: Tensor, wanted: Tensor) -> None:
    """In few entries, as a value before the last product was rounded the other way, apart."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    limits = torch.finfo(wanted.dtype)
    gap, size = (found.float() - wanted.float()).abs(), wanted.float().abs()
    if wanted.dtype == torch.float32:
        # an exponential's error grows with its argument
        assert (gap <= 32 * limits.eps * size + limits.tiny).all()
        return
    assert (gap > 0).float().mean() <= 0.002
    assert (gap <= 2 * limits.eps * size + limits.smallest_normal).all()


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5, 24), (2, 70, 4096), (9, 5000), (2, 8, 4, 128), (2, 28672)]
)
def test_the_norms_kernel(shape, dtype):
    x, weight = (drawn(*s, dtype=dtype, device="cuda") for s in (shape, shape[-1:]))
    found = kernel(rms_norm, x, weight, EPSILON)
    require_close(found, plain(rms_norm, x, weight, EPSILON))
    assert torch.equal(found, kernel(rms_norm, x, weight, EPSILON))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 7, 10), (2, 32, 33, 128), (3, 5, 4, 80), (1, 64, 9, 256)]
)
@pytest.mark.parametrize("own", [False, True])
def test_the_kernel_of_positions(shape, own, dtype):
    batch, _, length, width = shape
    x = heads_of(*shape, dtype=dtype, device="cuda")
    cos, sin = (t.to("cuda", dtype) for t in tables(batch if own else 1, length, width))
    found = kernel(rotated_positions, x, cos, sin)
    assert torch.equal(found, plain(rotated_positions, x, cos, sin))
    assert torch.equal(found, kernel(rotated_positions, x.contiguous(), cos, sin))
    assert found.transpose(1, 2).is_contiguous()


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 4096), (130, 14336)])
def test_the_gates_kernel(shape, dtype):
    gate, up = (drawn(*s, dtype=dtype, device="cuda") for s in (shape, shape[::-1]))
    up = up.permute(*reversed(range(up.ndim)))
    gate.view(-1)[0] = -200.0
    found = kernel(swiglu, gate, up)
    require_close(found, plain(swiglu, gate, up))


@on_gpu
@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_by_kernels_too(entry):
    x = torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)
    x[1, 3] = entry
    assert kernel(rms_norm, x, x[0], EPSILON).isnan().sum() >= 1
    assert not kernel(swiglu, x, x)[1, 3].isfinite()


@on_gpu
def test_a_gradient_passes_on_a_gpu():
    x = drawn(4, 64, dtype=torch.float32, device="cuda").requires_grad_()
    rms_norm(swiglu(x, x), x[0].detach(), EPSILON).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
