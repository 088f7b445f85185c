"""The same beginnings of text, continued by the source and by what was exported of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import Evaluation
from tasks.engine.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from tasks.engine.decoder import build_decoder
from tasks.engine.draft import Draft
from tasks.engine.encoding import files_digest, load_tokenizer
from tasks.engine.errors import InputError
from tasks.engine.job import Job, require
from tasks.engine.memo import Memo
from tasks.engine.precision import computing_dtype
from tasks.engine.source import Source
from tasks.engine.step import step
from tasks.engine.weights import weights_of
from tasks.engine.windows import read_tokens
from tasks.evaluate import likeliest

# beginnings that are continued: those of the first evaluation windows, of so many tokens
BEGINNINGS = 3
PROMPT = 16


def _depends_on(job: Job, exported: str, tokens: str, section: Evaluation) -> dict[str, Any]:
    return {
        "exported": exported,
        "source": job.source.digest(job.source.tensors),
        "tokens": tokens,
        "dtype": str(section.dtype),
        "length": section.sample_tokens,
        "tokenizer": files_digest(job.source),
    }


@step(depends_on=_depends_on, version=2, code=("quantizers.activations",))
def sample_text(
    job: Job, draft: Draft, exported: str, tokens: str, section: Evaluation
) -> dict[str, Any]:
    """Continue the beginnings of evaluation windows by the likeliest tokens, with both models.

    The value holds, per beginning, its text (``prompt``), that of the source (``before``) and of
    the export (``after``), and how many tokens they share until they part (``same``).
    """
    del draft
    windows = read_tokens(require(job, tokens))[:BEGINNINGS]
    # of short windows a half
    long = windows.shape[1] >= PROMPT + section.sample_tokens
    prompt = PROMPT if long else max(1, windows.shape[1] // 2)
    windows = windows[:, : prompt + section.sample_tokens]
    place: dict[str, Any] = {"device": job.device, "dtype": str(section.dtype)}
    place["kept"] = None if job.lean else job.memo
    before = continued(checkpoint_of(job.source), windows, prompt, **place)
    # what the source wrote is a good first guess
    after = continued(open_checkpoint(require(job, exported).folder), before, prompt, **place)
    text_of = _text_of(job.source)
    return {
        "tokens": windows.shape[1] - prompt,
        "samples": [
            {
                "prompt": text_of(ours[:prompt]),
                "before": text_of(theirs[prompt:]),
                "after": text_of(ours[prompt:]),
                "same": _shared(theirs[prompt:], ours[prompt:]),
            }
            for theirs, ours in zip(before.tolist(), after.tolist(), strict=True)
        ],
    }


def continued(
    checkpoint: Checkpoint,
    guess: Tensor,
    prompt: int,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    kept: Memo | None = None,
) -> Tensor:
    """Greedy continuations of the first ``prompt`` tokens of (W, T) windows: int64 (W, T).

    Each pass through the model takes all tokens at once, and settles at least one more of each
    window, all that were guessed right at best (Jacobi iteration, arXiv 2305.10427). A model that
    is read block by block is read few times so. Of what is settled no logits are asked again.
    """
    tokens = guess.long()
    decoder = build_decoder(checkpoint.source.config, device)
    weights = weights_of(checkpoint, device, computing_dtype(dtype, device), kept=kept)
    settled = prompt
    while settled < tokens.shape[1]:
        found = likeliest(weights, decoder, tokens[:, :-1], settled - 1)
        wrong = (found != tokens[:, settled:]).any(0)
        tokens = torch.cat([tokens[:, :settled], found], dim=1)
        # the first that was guessed wrong is right now, what follows it was asked with it wrong
        settled += int(wrong.int().argmax()) + 1 if wrong.any() else len(wrong)
    return tokens


def _text_of(source: Source) -> Callable[[Sequence[int]], str]:
    """What tokens say; their numbers, where the model has no tokenizer."""
    try:
        tokenizer = load_tokenizer(source)
    except InputError:
        return lambda tokens: " ".join(map(str, tokens))
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))
