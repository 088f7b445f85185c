"""Scores of lm-evaluation-harness for the source and for what was exported of it.

Both are read and run block by block, as they are for perplexity. Tasks that have given answers
scored can be asked for; those that have text written cannot: that would read the model per token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from configs.data_schema import TaskScores
from configs.schema import Evaluation
from tasks.engine.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from tasks.engine.decoder import STREAM_BYTES, build_decoder
from tasks.engine.draft import Draft
from tasks.engine.encoding import files_digest, load_tokenizer
from tasks.engine.errors import InputError
from tasks.engine.job import Job, require
from tasks.engine.precision import computing_dtype
from tasks.engine.step import step
from tasks.engine.task_list import task_lineage, task_manager, task_of
from tasks.engine.weights import weights_of
from tasks.evaluate import final_hidden

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# context and continuation, as tokens
Request = tuple[Sequence[int], Sequence[int]]


def _depends_on(job: Job, exported: str, section: Evaluation) -> dict[str, Any]:
    asked = section.lm_eval
    return {
        "exported": exported,
        "source": job.source.digest(job.source.tensors),
        "tokenizer": files_digest(job.source),
        "dtype": str(section.dtype),
        "tasks": [task_lineage(t) for t in asked.tasks],
        "limit": asked.limit,
        "fewshot": asked.num_fewshot,
        "lm_eval": version("lm-eval"),
    }


@step(depends_on=_depends_on, version=2, code=("quantizers.activations",))
def task_scores(job: Job, draft: Draft, exported: str, section: Evaluation) -> dict[str, Any]:
    """Score source and export; per task, each metric of both: ``{"source": .., "export": ..}``."""
    del draft
    tokenizer = load_tokenizer(job.source)
    length = job.source.config.get("max_position_embeddings")
    found: dict[str, dict[str, dict[str, float]]] = {}
    models = {
        "source": checkpoint_of(job.source),
        "export": open_checkpoint(require(job, exported).folder),
    }
    for which, checkpoint in models.items():
        model = scoring_model(
            checkpoint, tokenizer, length or 2048, device=job.device, dtype=str(section.dtype)
        )
        for task, metrics in scores(model, section.lm_eval).items():
            for metric, value in metrics.items():
                found.setdefault(task, {}).setdefault(metric, {})[which] = value
    return {"tasks": found}


def scores(model: LM, section: TaskScores) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks with a model: per task its metrics, such as ``acc``."""
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [task_of(t) for t in section.tasks]
    results = simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=section.num_fewshot,
        limit=section.limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=task_manager(defaults=not all(isinstance(task, dict) for task in tasks)),
    )
    assert results is not None
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "sample_len"
        }
        for task, metrics in results["results"].items()
    }


def scoring_model(
    checkpoint: Checkpoint,
    tokenizer: Any,
    length: int,
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> LM:
    """A checkpoint as lm-eval knows models; ``length`` is the longest text it takes, in tokens."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Blockwise(TemplateLM):
        """What lm-eval asks of a model, of one that is run block by block."""

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begins = tokenizer.bos_token_id
            return self.eot_token_id if begins is None else int(begins)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            del kwargs
            special = bool(add_special_tokens)
            return list(tokenizer.encode(string, add_special_tokens=special))

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            del kwargs
            asked = [(context, continuation) for _, context, continuation in requests]
            return continuation_scores(checkpoint, asked, length, device=device, dtype=dtype)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            del disable_tqdm
            sums = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, length, 1
                )
                pairs = [("", *make_disjoint_window(window)) for window in windows]
                sums.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise InputError("eval.lm_eval.tasks: one of them has text written; name others")

    model: LM = Blockwise()
    return model


def continuation_scores(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    length: int,
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> list[tuple[float, bool]]:
    """Log-probability (nats) of each continuation after its context, and whether it is greedy.

    Of what is longer than ``length`` tokens, the end is taken. Texts of like length run together,
    padded behind, which no token before sees.
    """
    computing = computing_dtype(dtype, device)
    decoder = build_decoder(checkpoint.source.config, device)
    weights = weights_of(checkpoint, device, computing)
    cut = [([*context, *answer][-(length + 1) :], len(answer)) for context, answer in requests]
    order = sorted(range(len(cut)), key=lambda number: len(cut[number][0]))
    found: dict[int, tuple[float, bool]] = {}
    width = int(checkpoint.source.config["hidden_size"]) * computing.itemsize
    longest = max((len(tokens) for tokens, _ in cut), default=1)
    together = max(1, STREAM_BYTES // (longest * width))
    for start in range(0, len(order), together):
        numbers = order[start : start + together]
        rows = [torch.tensor(cut[number][0][:-1]) for number in numbers]
        windows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        finals = final_hidden(weights, decoder, windows)
        for number, row, final in zip(numbers, rows, finals, strict=True):
            answer = torch.tensor(cut[number][0][-cut[number][1] :], device=device)
            asked = final[len(row) - len(answer) : len(row)].to(device)
            logs = torch.log_softmax(decoder.logits(asked, weights.head).float(), dim=-1)
            each = logs.gather(1, answer[:, None])
            greedy = bool((logs.argmax(-1) == answer).all())
            found[number] = (float(each.double().sum()), greedy)
    return [found[number] for number in range(len(cut))]


def score_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of MLflow: ``lm_eval.TASK.METRIC`` of the export, its source's with ``.source``."""
    named: dict[str, float] = {}
    for task, metrics in found["tasks"].items():
        for metric, both in metrics.items():
            named[f"lm_eval.{task}.{metric}"] = both["export"]
            named[f"lm_eval.{task}.{metric}.source"] = both["source"]
    return named
