"""Measure a checkpoint that was reopened from disk: perplexity, KL and agreement with its source.

Both models run block by block, so neither has to fit in memory. Activations are quantized as
SGLang's kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from configs.schema import Evaluation
from tasks.engine.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from tasks.engine.decoder import (
    HEAD_ROWS,
    STREAM_BYTES,
    Decoder,
    build_decoder,
    micro_batches,
    run_block,
)
from tasks.engine.draft import Draft
from tasks.engine.errors import RunError
from tasks.engine.job import Job, require
from tasks.engine.memo import Memo
from tasks.engine.precision import computing_dtype
from tasks.engine.step import step
from tasks.engine.store import Entry, load_tensors
from tasks.engine.transfer import launched_on
from tasks.engine.weights import Weights, weights_of
from tasks.engine.windows import read_tokens

TOKEN_NLL = "token_nll.safetensors"


@dataclass(frozen=True)
class Scores:
    """Sums over predicted tokens; nats."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def plus(self, other: Scores) -> Scores:
        """Add up two parts."""
        return Scores(
            self.tokens + other.tokens,
            self.nll + other.nll,
            self.reference_nll + other.reference_nll,
            self.kl + other.kl,
            self.agreed + other.agreed,
        )


def _depends_on(job: Job, exported: str, tokens: str, section: Evaluation) -> dict[str, Any]:
    return {
        "exported": exported,
        "source": job.source.digest(job.source.tensors),
        "tokens": tokens,
        "dtype": str(section.dtype),
    }


@step(depends_on=_depends_on, version=3, code=("quantizers.activations",))
def evaluate(
    job: Job, draft: Draft, exported: str, tokens: str, section: Evaluation
) -> dict[str, Any]:
    """Evaluate the export beside its source on token windows; keeps the NLL of each token."""
    report, token_nll = measure_tokens(
        open_checkpoint(require(job, exported).folder),
        read_tokens(require(job, tokens)),
        checkpoint_of(job.source),
        device=job.device,
        dtype=str(section.dtype),
        kept=None if job.lean else job.memo,
    )
    draft.save_tensors(TOKEN_NLL, {"nll": token_nll})
    return report


def read_token_nll(entry: Entry) -> Tensor:
    """Read what the evaluation found for each predicted token: float32 (W, T - 1), nats."""
    return load_tensors(entry.file(TOKEN_NLL))["nll"]


def measure(
    checkpoint: Checkpoint,
    windows: Tensor,
    reference: Checkpoint | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure a checkpoint on token windows (W, T): each window predicts its tokens but the first.

    Returns:
        ``nll`` (mean, nats), ``perplexity``, ``tokens`` (predicted), and with a reference
        ``reference_nll``, ``nll_increase``, ``kl`` (mean KL(reference || checkpoint), nats) and
        ``top1_agreement`` (share of positions where both find the same token likeliest).

    Raises:
        RunError: the checkpoint gives NaN or Inf.
    """
    return measure_tokens(checkpoint, windows, reference, device=device, dtype=dtype)[0]


def measure_tokens(
    checkpoint: Checkpoint,
    windows: Tensor,
    reference: Checkpoint | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    kept: Memo | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """``measure``, and the NLL of each predicted token: float32 (W, T - 1), on the host.

    Where weights are ``kept``, what measures next finds them.
    """
    computing = computing_dtype(dtype, device)
    models = [checkpoint] if reference is None else [checkpoint, reference]
    decoders = [build_decoder(model.source.config, device) for model in models]
    width = int(checkpoint.source.config["hidden_size"])
    per_window = windows.shape[1] * width * computing.itemsize * len(models)
    scores, token_nll = Scores(), []
    parts = windows.split(max(1, STREAM_BYTES // per_window))
    place: dict[str, Any] = {"passes": len(parts), "kept": kept}
    loaded = [weights_of(model, device, computing, **place) for model in models]
    for part in parts:
        finals = [
            final_hidden(weights, decoder, part)
            for weights, decoder in zip(loaded, decoders, strict=True)
        ]
        heads = [weights.head for weights in loaded]
        for row, nll in _score(decoders, finals, heads, part, device):
            scores = scores.plus(row)
            token_nll.append(nll.float().cpu())
    shape = (len(windows), windows.shape[1] - 1)
    return _means(scores, reference is not None), torch.cat(token_nll).reshape(shape)


def likeliest(weights: Weights, decoder: Decoder, windows: Tensor, first: int = 0) -> Tensor:
    """The token that a checkpoint finds likeliest after each of (W, T) tokens but the ``first``.

    Returns:
        int64 (W, T - first), on the host.
    """
    final, head = final_hidden(weights, decoder, windows), weights.head
    return torch.stack(
        [
            torch.cat(
                [
                    decoder.logits(rows, head).argmax(-1).cpu()
                    for rows in window[first:].split(HEAD_ROWS)
                ]
            )
            for window in final
        ]
    )


def final_hidden(weights: Weights, decoder: Decoder, windows: Tensor) -> Tensor:
    """Hidden states after the final norm: (W, T, D), on the weights' device."""
    with launched_on(weights.device):
        return _final_hidden(weights, decoder, windows)


def _final_hidden(weights: Weights, decoder: Decoder, windows: Tensor) -> Tensor:
    model, device = weights.checkpoint, weights.device
    embedding, numbers = weights.embedding(windows)
    batches, arguments = [], []
    shapes: dict[torch.Size, Any] = {}
    for batch in micro_batches(numbers, device):
        hidden, per_block = decoder.embed(embedding, batch.to(device))
        batches.append(hidden)
        arguments.append(shapes.setdefault(batch.shape, per_block))
    # neither it nor a block that is done lies beside the next one
    del embedding
    for block in range(model.blocks):
        tensors = weights.block(block)
        hook = model.input_hook(block, device)
        linears = model.quantized(block)
        batches = [
            run_block(decoder.blocks[block], tensors, hidden, given[block], linears, hook)
            for hidden, given in zip(batches, arguments, strict=True)
        ]
        del tensors
    norm = {"weight": weights.norm}
    with torch.no_grad():
        finals = [
            torch.func.functional_call(decoder.final_norm, norm, (hidden,)) for hidden in batches
        ]
    return torch.cat(finals)


def _score(
    decoders: list[Decoder],
    finals: list[Tensor],
    heads: list[Tensor],
    windows: Tensor,
    device: str,
) -> Iterator[tuple[Scores, Tensor]]:
    """Sums and the NLL of each token, in the windows' order."""
    for number, window in enumerate(windows):
        targets = window[1:].to(device)
        for start in range(0, len(targets), HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, len(targets)))
            logs = [
                functional.log_softmax(decoder.logits(final[number, rows], head), dim=-1)
                for decoder, final, head in zip(decoders, finals, heads, strict=True)
            ]
            yield _score_rows(logs, targets[rows])


def _score_rows(logs: list[Tensor], targets: Tensor) -> tuple[Scores, Tensor]:
    each = -logs[0].gather(1, targets[:, None])[:, 0]
    nll = each.double().sum()
    if len(logs) == 1:
        return Scores(len(targets), float(nll)), each
    ours, reference = logs
    kl = functional.kl_div(ours, reference, log_target=True, reduction="none").sum(-1)
    scores = Scores(
        len(targets),
        float(nll),
        float(-reference.gather(1, targets[:, None]).double().sum()),
        float(kl.double().sum()),
        int((ours.argmax(-1) == reference.argmax(-1)).sum()),
    )
    return scores, each


def _means(scores: Scores, compared: bool) -> dict[str, Any]:
    nll = scores.nll / scores.tokens
    if not math.isfinite(nll):
        raise RunError("evaluate: the checkpoint's log-likelihood is not finite; it is damaged")
    # e^nll overflows a float from 710 on
    report: dict[str, Any] = {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "tokens": scores.tokens,
    }
    if compared:
        report |= {
            "reference_nll": scores.reference_nll / scores.tokens,
            "nll_increase": (scores.nll - scores.reference_nll) / scores.tokens,
            "kl": scores.kl / scores.tokens,
            "top1_agreement": scores.agreed / scores.tokens,
        }
    return report


def summary(metrics: Mapping[str, Any]) -> str:
    """One line of text."""
    line = f"NLL {metrics['nll']:.4f}, perplexity {metrics['perplexity']:.2f}"
    if "kl" in metrics:
        line += (
            f", NLL increase {metrics['nll_increase']:+.4f}, KL {metrics['kl']:.4f}, "
            f"top-1 agreement {metrics['top1_agreement']:.1%}"
        )
    return line
