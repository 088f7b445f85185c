"""Evaluation windows that lie in a checkpoint with what was measured on them.

A server that loads the checkpoint anywhere is asked for the same tokens, without the text, the
store or the source model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from tasks.engine.errors import InputError

WINDOWS = "blockquant_windows.json"
# positions of its context that SGLang does not take as input
MARGIN = 8


@dataclass(frozen=True, eq=False)
class ServedWindows:
    """Windows that a server of the model takes whole, and their measured log-likelihoods.

    Attributes:
        tokens: (W, L) int64; a server predicts all but the first of each.
        nll: mean NLL of each window's predicted tokens, nats.
    """

    tokens: Tensor
    nll: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean NLL of all predicted tokens."""
        return sum(self.nll) / len(self.nll)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tokens: list[list[int]]
    nll: list[float]


def served_windows(
    tokens: Tensor, token_nll: Tensor, count: int, context: int | None
) -> ServedWindows | None:
    """Cut the first ``count`` windows to what a server takes: less than its context.

    Args:
        tokens: (W, T), what was evaluated on.
        token_nll: (W, T - 1), nats.
        count: how many; None is returned for none.
        context: positions of the model, None where it names none.
    """
    length = tokens.shape[1] if context is None else min(tokens.shape[1], context - MARGIN)
    if count < 1 or length < 2:
        return None
    means = token_nll[:count, : length - 1].double().mean(-1)
    return ServedWindows(tokens[:count, :length], tuple(means.tolist()))


def windows_text(windows: ServedWindows) -> str:
    """The file's text, a window to a line."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in windows.tokens.tolist())
    return f'{{"nll": {json.dumps(list(windows.nll))},\n"tokens": [\n{lines}\n]}}\n'


def read_windows(folder: Path) -> ServedWindows:
    """Read the windows of a checkpoint.

    Raises:
        InputError: there are none, or the file is damaged.
    """
    place = folder / WINDOWS
    try:
        stored = _Stored.model_validate_json(place.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no {WINDOWS} in it, so there is nothing to compare a server with; publish "
            "it again with --set serving.windows=16 and --overwrite"
        ) from error
    except (OSError, ValidationError) as error:
        raise InputError(f"{place}: damaged; publish the checkpoint again") from error
    lengths = {len(row) for row in stored.tokens}
    if len(stored.tokens) != len(stored.nll) or len(lengths) != 1 or min(lengths) < 2:
        raise InputError(f"{place}: damaged; publish the checkpoint again")
    return ServedWindows(torch.tensor(stored.tokens), tuple(stored.nll))
