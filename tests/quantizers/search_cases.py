"""Inputs, weights, statistics and schemes that the searches are tried on."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.number_formats import E4M3, int_format
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme
from quantizers.statistics import InputStatistics, add_batch, empty_statistics

INT4, INT8 = int_format(4), int_format(8)
ACTIVATIONS = {
    "int8 token": ActivationScheme(INT8, True, Granularity.TOKEN, dynamic=True),
    "e4m3 token": ActivationScheme(E4M3, True, Granularity.TOKEN, dynamic=True),
    "e4m3 static": ActivationScheme(E4M3, True, Granularity.TENSOR, dynamic=False),
}
KEPT = 512


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs (tokens, columns): channels of different size, one of three 50 times larger."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw) * (0.3 + torch.rand(columns, generator=draw))
    x = x + 0.3 * torch.randn(columns, generator=draw)
    x[:, torch.randperm(columns, generator=draw)[: max(1, columns // 32)]] *= 50
    return x


def heavy_tailed(kind: str, tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs whose rounding error a few tokens may decide.

    Args:
        kind: "even" or "lognormal" sizes of tokens; "massive", every 256th token 30 times larger;
            "spikes", one entry of every 256th token 200 times larger.
        tokens: T.
        columns: K.
        seed: of everything.
    """
    x = inputs(tokens, columns, seed)
    if kind == "even":
        return x
    draw = torch.Generator().manual_seed(1000 + seed)
    if kind == "lognormal":
        return x * torch.exp(0.7 * torch.randn(tokens, 1, generator=draw))
    few = torch.randperm(tokens, generator=draw)[: tokens // 256]
    if kind == "massive":
        x[few] *= 30
    else:
        x[few, torch.randint(columns, (len(few),), generator=draw)] *= 200
    return x


def weights(rows: tuple[int, ...], columns: int, seed: int = 0) -> list[Tensor]:
    """A group's weights (N_i, columns), whose columns differ in size."""
    draw = torch.Generator().manual_seed(100 + seed)
    sizes = 0.05 * (0.3 + torch.rand(columns, generator=draw))
    return [torch.randn(n, columns, generator=draw) * sizes for n in rows]


def statistics_of(x: Tensor, kept: int = KEPT, windows: int = 8) -> InputStatistics:
    """What one pass over windows of inputs leaves: sums, extremes, and so many rows."""
    keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:kept].sort().values
    statistics = empty_statistics(x.shape[1], x.device)
    for window in x.tensor_split(windows):
        start = statistics.tokens
        inside = keep[(keep >= start) & (keep < start + len(window))] - start
        statistics = add_batch(statistics, window, keep=inside.to(x.device))
    return statistics


def weight_scheme(
    name: str, granularity: str, *, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> WeightScheme:
    """The scheme of a format in "tensor", "channel", or groups of 16 or blocks of (16, 32)."""
    return WeightScheme(
        E4M3 if name == "e4m3" else int_format(int(name.removeprefix("int"))),
        symmetric,
        Granularity(granularity),
        group_size=16 if granularity == "group" else None,
        block_shape=(16, 32) if granularity == "block" else None,
        scale_dtype=dtype,
    )


def allowed(plain: float, tensor: Tensor) -> float:
    """A relative error: plain, or what factors of 8 bits lose where kernels compute."""
    return 5e-3 if compiles_kernels(tensor) else plain
