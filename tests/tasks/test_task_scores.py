"""Scores of tasks: what transformers finds of the same questions, for source and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.data_schema import TaskScores
from flows import finishing
from flows.quantize_model import quantize_model
from tasks.engine.checkpoint import checkpoint_of
from tasks.engine.errors import InputError
from tasks.engine.source import open_source
from tasks.engine.task_list import MISSING, require_tasks
from tasks.task_scores import (
    continuation_scores,
    scores,
    scoring_model,
)
from tests.questions import QUESTIONS, make_task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of multiple choice described in a file."""
    return make_task(tmp_path)


def log_probability(model: Any, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """Of an answer, token by token, with transformers."""
    total, greedy = 0.0, True
    for number, token in enumerate(answer):
        seen = torch.tensor([context + answer[:number]])
        logs = model(seen).logits[0, -1].detach().log_softmax(-1)
        total += float(logs[token])
        greedy &= int(logs.argmax()) == token
    return total, greedy


def right_answers(model: Any, tokenizer: Any) -> float:
    """Share of the questions whose right answer a model finds likeliest."""
    right = 0
    for question in QUESTIONS:
        context = tokenizer.encode(question["question"], add_special_tokens=False)
        found = []
        for answer in question["answers"]:
            whole = tokenizer.encode(f"{question['question']} {answer}", add_special_tokens=False)
            found.append(log_probability(model, context, whole[len(context) :])[0])
        right += found.index(max(found)) == question["right"]
    return right / len(QUESTIONS)


@pytest.fixture
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def test_answers_are_scored_as_transformers_scores_them(tiny: Path, model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    requests = [
        (torch.randint(8192, (a,), generator=draw).tolist(), [5, 6, 7][:b])
        for a, b in ((4, 3), (9, 1), (2, 2), (9, 3))
    ]
    # the greedy answer to the first
    first = torch.tensor([requests[0][0]])
    likeliest = [int(model(first).logits[0, -1].argmax())]
    requests.append((requests[0][0], likeliest))
    found = continuation_scores(checkpoint_of(open_source(tiny)), requests, 64)
    for (context, answer), (score, greedy) in zip(requests, found, strict=True):
        expected = log_probability(model, context, answer)
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy is expected[1]
    assert found[-1][1]


def test_of_a_long_text_the_end_is_taken(tiny: Path, model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    context = torch.randint(8192, (30,), generator=draw).tolist()
    (found,) = continuation_scores(checkpoint_of(open_source(tiny)), [(context, [5, 6])], 8)
    # eight tokens are put in, and the last predicts the one behind them
    assert found[0] == pytest.approx(log_probability(model, context[-7:], [5, 6])[0], abs=1e-4)


def test_a_task_in_a_file_gives_the_share_of_right_answers(
    tiny: Path, model: Any, task: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    checkpoint = checkpoint_of(open_source(tiny))
    found = scores(scoring_model(checkpoint, tokenizer, 64), TaskScores(tasks=(str(task),)))
    assert set(found) == {"questions"}
    assert found["questions"]["acc"] == pytest.approx(right_answers(model, tokenizer))
    limited = scores(
        scoring_model(checkpoint, tokenizer, 64), TaskScores(tasks=(str(task),), limit=1)
    )
    assert limited["questions"]["acc"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("described", "line"),
    [
        ({"task": "t", "output_type": "generate_until"}, "has text written"),
        ({"output_type": "multiple_choice"}, "it needs the key task"),
        ("task: !function os.system", "not readable as YAML"),
    ],
)
def test_tasks_that_cannot_be_scored_are_one_line(
    tmp_path: Path, described: Any, line: str
) -> None:
    path = tmp_path / "task.yml"
    path.write_text(described if isinstance(described, str) else yaml.safe_dump(described))
    with pytest.raises(InputError, match=line) as raised:
        require_tasks(TaskScores(tasks=(str(path),)))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_task_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(InputError, match=r"lm-eval has no task no_such_task; see: lm-eval ls"):
        require_tasks(TaskScores(tasks=("no_such_task",)))
    require_tasks(TaskScores(tasks=("piqa",)))
    with pytest.raises(InputError, match="gsm8k has text written"):
        require_tasks(TaskScores(tasks=("gsm8k",)))


@pytest.mark.usefixtures("services")
def test_a_run_tells_mlflow_the_scores_of_both(
    home: Path, tiny: Path, words: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    overrides = [
        *("serving.smoke_test=false", "serving.check_kernels=false", "eval.report=false"),
        *("eval.name=text", f"eval.path={words}", "eval.windows=2", "eval.seq_len=32"),
        f"eval.lm_eval.tasks={task}",
    ]
    result = quantize_model("rtn_w4a16", str(tiny), str(home / "out"), overrides)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    source = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(home / "out", dtype=torch.float32)
    expected = {
        "lm_eval.questions.acc": right_answers(quantized, tokenizer),
        "lm_eval.questions.acc.source": right_answers(source, tokenizer),
    }
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    told = client.get_run(result["mlflow"]["run"]).data
    for name, value in expected.items():
        assert told.metrics[name] == pytest.approx(value) == pytest.approx(result["scores"][name])
    assert "lm_eval" not in told.tags
    # where it is not installed, nothing fails and the run says so
    monkeypatch.setattr(finishing, "is_installed", lambda: False)
    result = quantize_model("rtn_w4a16", str(tiny), str(home / "again"), overrides)
    told = client.get_run(result["mlflow"]["run"]).data
    assert (result["scores"], told.tags["lm_eval"]) == ({}, MISSING)
