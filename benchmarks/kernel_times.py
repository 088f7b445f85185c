"""What lies between the products of a block: a kernel each beside torch's own operations.

    python benchmarks/kernel_times.py --device cuda:0

Of one micro-batch in the shape of Llama 3 8B: milliseconds (the median of several runs), and the
bytes that have to be read and written at least, by that time. Without a GPU torch's own alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from quantizers.between_products import rms_norm, rotated_positions, swiglu
from quantizers.devices import compiles_kernels

EPSILON = 1e-5


@torch.no_grad()
def main(
    device: Annotated[str, typer.Option(help="Where it is measured.")] = "cuda:0",
    tokens: Annotated[int, typer.Option(help="Of the micro-batch.", min=1)] = 16384,
    hidden: Annotated[int, typer.Option(help="Channels of hidden states.", min=2)] = 4096,
    intermediate: Annotated[int, typer.Option(help="Channels of the gate.", min=1)] = 14336,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.", min=2)] = 128,
) -> None:
    """Measure norms, rotary embeddings and gates."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x, weight = drawn(tokens, hidden), drawn(hidden)
    gate, up = drawn(tokens, intermediate), drawn(tokens, intermediate)
    query = drawn(1, tokens, hidden // head_dim, head_dim).transpose(1, 2)
    cos, sin = drawn(1, tokens, head_dim), drawn(1, tokens, head_dim)
    # tensors of each size that are read or written once
    asked: dict[str, tuple[Callable[[], Tensor], int]] = {
        "norm": (lambda: rms_norm(x, weight, EPSILON), 2 * x.nbytes),
        "rotary embedding": (lambda: rotated_positions(query, cos, sin), 2 * query.nbytes),
        "gate": (lambda: swiglu(gate, up), 3 * gate.nbytes),
    }
    table = Table("of a block", "torch, ms", "kernel, ms", "TB/s", "differs", box=box.MARKDOWN)
    for name, (compute, moved) in asked.items():
        with patch("quantizers.between_products.compiles_kernels", lambda *_: False):
            wanted, plain = compute(), _milliseconds(compute)
        row = [name, f"{plain:.3f}"]
        if compiles_kernels(x):
            share, taken = (compute() != wanted).float().mean().item(), _milliseconds(compute)
            row += [f"{taken:.3f}", f"{moved / taken / 1e9:.2f}", f"{share:.1e}"]
        table.add_row(*row)
    Console().print(table)


def _milliseconds(compute: Callable[[], Tensor]) -> float:
    timer = Timer("compute()", globals={"compute": compute})
    return 1e3 * float(timer.blocked_autorange(min_run_time=0.5).median)


if __name__ == "__main__":
    typer.run(main)
