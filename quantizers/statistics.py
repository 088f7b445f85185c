"""Sums over calibration inputs that the searches need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.errors import NonFiniteError

__all__ = [
    "InputStatistics",
    "WeightedRows",
    "add_batch",
    "checked",
    "drawn_rows",
    "empty_statistics",
    "heaviest",
    "weighted_rows",
    "written_parts",
]

# Rows kept to see how inputs are rounded.
_ROWS = 1024
# Channels of a Gram matrix's blocks, and rows of a product: large enough for fast products.
_BLOCK = {"cpu": 512, "cuda": 2048}
_CHUNK = {"cpu": 2048, "cuda": 16384}
# entries of the inputs that are weighed at once
_WEIGHED_ENTRIES = 1 << 24
# Entries summed at once on a CPU.
_CPU_ENTRIES = 1 << 18


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Rows drawn the likelier the heavier they are: a priority sample, doi 10.1145/1314690.1314696.

    Attributes:
        rows: (h, K), as they came; one more than are used.
        sizes: (h,) float32, positive: what the rows were drawn by.
        priorities: (h,) float32, falling: size over a uniform random number.
    """

    rows: Tensor
    sizes: Tensor
    priorities: Tensor


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Statistics of the inputs x (K,) of a group of linears, over all tokens seen.

    Attributes:
        gram: (K, K) float32, the sum of x x^T (not divided by the number of tokens).
        total: (K,) float32, the sum of x (not divided).
        mean_abs_sum: (K,) float32, the sum of |x| (not divided).
        window_minimum: (W, K) float32, the smallest x of each window.
        window_maximum: (W, K) float32, the largest x of each window.
        sample: (m, K), rows that were asked to be kept, as they came, in the inputs' dtype.
        drawn: rows drawn by their size, see weighted_rows.
        tokens: number of tokens summed.
    """

    gram: Tensor
    total: Tensor
    mean_abs_sum: Tensor
    window_minimum: Tensor
    window_maximum: Tensor
    sample: Tensor
    drawn: WeightedRows
    tokens: int

    @property
    def minimum(self) -> Tensor:
        """(K,) float32, the smallest x per channel; infinity before the first token."""
        return _with_row(self.window_minimum, torch.inf).amin(0)

    @property
    def maximum(self) -> Tensor:
        """(K,) float32, the largest x per channel; minus infinity before the first token."""
        return _with_row(self.window_maximum, -torch.inf).amax(0)

    @property
    def absmax(self) -> Tensor:
        """(K,) float32, the largest |x| per channel; 0 before the first token."""
        return torch.maximum(self.maximum, -self.minimum).clamp(min=0.0)

    def gram_mean(self) -> Tensor:
        """The Gram matrix H = X^T X / T, (K, K) float32; zeros if there were no tokens."""
        return self.gram / max(self.tokens, 1)


def empty_statistics(columns: int, device: torch.device | str = "cpu") -> InputStatistics:
    """Statistics of no tokens.

    Args:
        columns: K.
        device: where the sums live.
    """
    return InputStatistics(
        gram=torch.zeros(columns, columns, device=device),
        total=torch.zeros(columns, device=device),
        mean_abs_sum=torch.zeros(columns, device=device),
        window_minimum=torch.empty(0, columns, device=device),
        window_maximum=torch.empty(0, columns, device=device),
        sample=torch.empty(0, columns, device=device),
        drawn=WeightedRows(
            torch.empty(0, columns, device=device),
            torch.empty(0, device=device),
            torch.empty(0, device=device),
        ),
        tokens=0,
    )


def add_batch(
    statistics: InputStatistics,
    x: Tensor,
    *,
    keep: Tensor | None = None,
    draw: bool = True,
    chunk: int | None = None,
    reuse: bool = False,
    last: bool = True,
    before: int = 0,
) -> InputStatistics:
    """Statistics with a batch added; the argument stays as it is, unless it may be used up.

    Rows are taken chunk by chunk, each from the batch's start, and summed in float32, so equal
    batches and an equal chunk give equal bits. On CUDA, bf16 and fp16 rows are multiplied in
    their own dtype with float32 sums, and a kernel sums windows. Waits for the device once, where
    the batch is the last.

    Args:
        statistics: what was seen before.
        x: (..., T, K), floating point, on the device of the statistics; no gradient passes. Each
            (T, K) is a window.
        keep: int64, numbers of the rows of this batch that are kept as a sample.
        draw: whether rows are drawn for weighted_rows, which searches of weights alone do not ask.
        chunk: rows per product, part of what decides the last bits; by the device where None.
        reuse: whether the sum is made in the argument's Gram matrix, instead of a second one.
        last: whether no other batch follows: before, half of the Gram matrix is not written, and
            nothing is refused: see checked.
        before: tokens that others have seen before all of these; rows are drawn by their number.

    Raises:
        NonFiniteError: x, or one before it, holds NaN or infinity, or a sum overflows float32.
        ValueError: x is not floating point or has another number of channels; chunk < 1.
    """
    columns = statistics.total.shape[0]
    chunk = _CHUNK.get(x.device.type, _CHUNK["cpu"]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: use at least one row")
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"need floats with {columns} channels, not {x.dtype} of shape {tuple(x.shape)}"
        )
    rows = x.detach().reshape(-1, columns)
    if rows.shape[0] == 0:
        return statistics
    native = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)

    windows = x.detach().reshape(-1, x.shape[-2] if x.ndim > 1 else 1, columns)
    total, sums = statistics.total.clone(), statistics.mean_abs_sum.clone()
    as_they_are = native or x.dtype == torch.float32
    factors = rows if as_they_are else torch.empty_like(rows, dtype=torch.float32)
    low, high = _sums_(windows, factors, total, sums, chunk)
    gram = statistics.gram if reuse else statistics.gram.clone()
    for part in torch.split(factors, chunk):
        _add_product_(gram, part)
    tokens = statistics.tokens + rows.shape[0]
    typical = (sums / tokens).clamp(min=torch.finfo(torch.float32).tiny)
    kept = rows[:0] if keep is None else rows[keep]
    found = InputStatistics(
        gram=gram,
        total=total,
        mean_abs_sum=sums,
        window_minimum=torch.cat((statistics.window_minimum, low)),
        window_maximum=torch.cat((statistics.window_maximum, high)),
        sample=torch.cat((statistics.sample.to(x.dtype), kept)),
        drawn=_draw(statistics.drawn, rows, _heaviness(rows, typical), before + statistics.tokens)
        if draw
        else statistics.drawn,
        tokens=tokens,
    )
    return checked(found) if last else found


def completed(statistics: InputStatistics) -> InputStatistics:
    """The same after its last batch: the whole Gram matrix, written in place."""
    _mirror_(statistics.gram)
    return statistics


def written_parts(gram: Tensor) -> list[Tensor]:
    """Views of all that is written of a Gram matrix before its last batch: see completed."""
    return [gram[block, block.start :] for block in _blocks(gram)]


def largest_sum(statistics: InputStatistics) -> Tensor:
    """The largest of some sums, a scalar, for which nothing waits.

    Finite where no input held NaN or infinity and no sum overflowed, and only there.
    """
    # A finite diagonal bounds the whole matrix: (x_i x_j)^2 <= x_i^2 x_j^2, summed.
    sums = torch.cat((statistics.mean_abs_sum, statistics.gram.diagonal()))
    largest: Tensor = torch.linalg.vector_norm(sums, torch.inf)
    return largest


def checked(statistics: InputStatistics) -> InputStatistics:
    """The same after its last batch: the whole Gram matrix, written in place, all of it finite.

    Raises:
        NonFiniteError: an input held NaN or infinity, or a sum overflows float32.
    """
    if not bool(largest_sum(completed(statistics)).isfinite()):
        raise NonFiniteError(
            f"inputs of {statistics.tokens} tokens, {len(statistics.total)} channels, hold NaN, "
            "infinity or overflow"
        )
    return statistics


def drawn_rows(tokens: int) -> int:
    """How many rows are drawn of so many tokens."""
    return min(tokens, _ROWS + 1)


def heaviest(drawn: WeightedRows) -> WeightedRows:
    """The rows of highest priority among those that were drawn of several parts of the inputs."""
    kept = drawn.priorities.sort(descending=True, stable=True).indices[: _ROWS + 1]
    return WeightedRows(drawn.rows[kept], drawn.sizes[kept], drawn.priorities[kept])


def weighted_rows(statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """Rows to see rounding on, and how many tokens each stands for.

    Sums over all tokens are estimated without bias; most of the heaviest stand for themselves.

    Returns:
        rows (m, K) in the inputs' dtype, and weights (m,) float32.
    """
    drawn = statistics.drawn
    if len(drawn.rows) <= _ROWS:
        return drawn.rows, torch.ones_like(drawn.sizes)
    threshold = drawn.priorities[_ROWS]
    sizes = drawn.sizes[:_ROWS]
    return drawn.rows[:_ROWS], torch.maximum(sizes, threshold) / sizes


def _draw(before: WeightedRows, rows: Tensor, sizes: Tensor, seed: int) -> WeightedRows:
    """The rows of highest priority among those that were drawn and new ones."""
    generator = torch.Generator().manual_seed(seed)
    # from pinned memory: nothing waits for the copy
    drawn = torch.rand(len(rows), generator=generator, pin_memory=rows.is_cuda)
    # in (0, 1]: nothing is divided by zero
    luck = 1 - drawn.to(rows.device, non_blocking=True)
    priorities = sizes / luck
    new = priorities.sort(descending=True, stable=True).indices[: _ROWS + 1]
    return heaviest(
        WeightedRows(
            torch.cat((before.rows.to(rows.dtype), rows[new])),
            torch.cat((before.sizes, sizes[new])),
            torch.cat((before.priorities, priorities[new])),
        )
    )


def _heaviness(rows: Tensor, typical: Tensor) -> Tensor:
    """How much a row's rounding may weigh: its range, as it is and with its channels levelled."""
    parts, largest = [], typical.amax()
    # each row for itself: of all rows in float32 there would be two copies
    for part in torch.split(rows, max(1, _WEIGHED_ENTRIES // rows.shape[1])):
        absolute = part.abs().to(torch.float32)
        levelled = (absolute / typical).amax(1)
        parts.append(1 + levelled.square() + (absolute.amax(1) / largest).square())
    return torch.cat(parts)


def _with_row(extremes: Tensor, value: float) -> Tensor:
    return torch.cat((extremes, extremes.new_full((1, extremes.shape[1]), value)))


def _sums_(
    windows: Tensor, factors: Tensor, total: Tensor, sums: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Add x and |x| to sums in place, write float32 factors, give each window's extremes.

    On a CPU so few rows at a time that all of it happens while they lie in its cache.

    Args:
        windows: (W, T, K).
        factors: (W T, K), written where it is not the windows themselves.
        total: (K,) float32.
        sums: (K,) float32.
        chunk: rows at most.
    """
    count, length, columns = windows.shape
    if compiles_kernels(windows):
        from quantizers.search_kernel import window_sums

        by_window, sizes, low, high = window_sums(windows.contiguous())
        total += by_window.sum(0)
        sums += sizes.sum(0)
        if factors.data_ptr() != windows.data_ptr():
            factors.copy_(windows.reshape(factors.shape))
        return low, high
    if windows.device.type != "cpu":
        for part in torch.split(windows.reshape(factors.shape), chunk):
            total += part.sum(0, dtype=torch.float32)
            sums += part.abs().sum(0, dtype=torch.float32)
        if factors.data_ptr() != windows.data_ptr():
            factors.copy_(windows.reshape(factors.shape))
        return windows.amin(1).float(), windows.amax(1).float()
    step = min(chunk, max(1, _CPU_ENTRIES // columns))
    low = torch.full((count, columns), torch.inf, device=windows.device)
    high = torch.full((count, columns), -torch.inf, device=windows.device)
    own = factors.data_ptr() == windows.data_ptr()
    for number, window in enumerate(windows):
        for start in range(0, length, step):
            part = window[start : start + step]
            if not own:
                done = number * length + start
                part = factors[done : done + len(part)].copy_(part)
            total += part.sum(0, dtype=torch.float32)
            sums += part.abs().sum(0, dtype=torch.float32)
            low[number] = torch.minimum(low[number], part.amin(0))
            high[number] = torch.maximum(high[number], part.amax(0))
    return low, high


def _add_product_(gram: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to a gram in place, float32; what is left of its diagonal blocks stays."""
    for block in _blocks(gram):
        _addmm_(gram[block, block.start :], rows[:, block], rows[:, block.start :])


def _mirror_(gram: Tensor) -> None:
    """Write what lies right of the diagonal blocks to the left of them."""
    for block in _blocks(gram):
        gram[block.stop :, block] = gram[block, block.stop :].t()


def _blocks(gram: Tensor) -> list[slice]:
    step = _BLOCK.get(gram.device.type, _BLOCK["cpu"])
    return [slice(start, start + step) for start in range(0, gram.shape[0], step)]


def _addmm_(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32:
        out.addmm_(left.t(), right)
    else:
        torch.addmm(out, left.t(), right, out_dtype=torch.float32, out=out)
