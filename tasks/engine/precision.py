"""In how many bits calibration computes: as many as serve, where fewer are faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# eval.dtype but for auto
_EVALUATED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles (AMX), far faster than float32 ones."""
    return torch.cpu._is_amx_tile_supported()


def compute_dtype(source: torch.dtype, device: str) -> torch.dtype:
    """Dtype of hidden states and block weights while calibrating.

    The source's on a GPU; on a CPU float32, but for bf16 sources where bf16 is fast.
    """
    if torch.device(device).type != "cpu" or (source == torch.bfloat16 and has_fast_bf16()):
        return source
    return torch.float32


def computing_dtype(asked: str, device: str) -> torch.dtype:
    """Dtype that a model is evaluated in: the one asked for, or what suits the device."""
    if asked in _EVALUATED:
        return _EVALUATED[asked]
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@contextmanager
def search_products(device: str) -> Iterator[None]:
    """Multiply float32 matrices with factors of fewer bits, sums in float32; to be entered.

    bf16 on CPUs with AMX, where bf16 inputs lose nothing, TF32 on a GPU. A search compares sums of
    squares over millions of entries: what each factor loses does not move them.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and not has_fast_bf16():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if on_cpu else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def feedback_products(device: str) -> AbstractContextManager[None]:
    """Multiply errors that are passed on with factors of TF32 on a GPU; to be entered.

    That moves what a column is rounded from by less than a thousandth of a step; bf16 factors
    would by eight times as much, so that a CPU keeps float32.
    """
    return nullcontext() if torch.device(device).type == "cpu" else search_products(device)
