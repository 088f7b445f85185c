"""In how many bits calibration computes."""

from __future__ import annotations

import pytest
import torch

from tasks.engine import precision
from tasks.engine.precision import (
    compute_dtype,
    computing_dtype,
    feedback_products,
    search_products,
)


@pytest.mark.parametrize("fast", [True, False])
def test_dtype_of_hidden_states(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: fast)
    assert compute_dtype(torch.bfloat16, "cpu") is (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype(torch.float16, "cpu") is torch.float32
    assert compute_dtype(torch.float32, "cpu") is torch.float32
    assert compute_dtype(torch.float16, "cuda:0") is torch.float16
    assert compute_dtype(torch.bfloat16, "cuda") is torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda:0", torch.bfloat16),
        ("float32", "cuda:0", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_dtype_of_an_evaluation(asked: str, device: str, dtype: torch.dtype) -> None:
    assert computing_dtype(asked, device) is dtype


@pytest.mark.parametrize(
    ("fast", "device", "inside"),
    [(True, "cpu", "medium"), (False, "cpu", "highest"), (False, "cuda", "high")],
)
def test_search_products_last_as_long_as_the_search(
    monkeypatch: pytest.MonkeyPatch, fast: bool, device: str, inside: str
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: fast)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), search_products(device):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "inside"), [("cpu", "highest"), ("cuda:1", "high")])
def test_errors_are_passed_on_in_tf32_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch, device: str, inside: str
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: True)
    with feedback_products(device):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_of_bf16_inputs_lose_nothing_but_the_order_of_their_sum() -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 256).to(torch.bfloat16).float()
    exact = x.double().T @ x.double()
    with search_products("cpu"):
        product = x.T @ x
    assert (product - exact).abs().max() / exact.abs().max() < 1e-5
