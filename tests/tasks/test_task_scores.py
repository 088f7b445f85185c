"""Scores of tasks: what transformers finds of the same questions, for source and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.data_schema import TaskScores
from flows import finishing
from flows.quantize_model import quantize_model
from tasks.engine.checkpoint import checkpoint_of
from tasks.engine.errors import InputError
from tasks.engine.job import Job
from tasks.engine.source import open_source
from tasks.engine.task_list import MISSING, require_tasks
from tasks.task_scores import (
    continuation_scores,
    scores,
    scoring_model,
    task_scores,
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


HERE, DATA = "questions.jsonl", "data/questions.jsonl"
# what a task says of its data, and which file that is, relative to where the command runs: {here}
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "of a split": ({"data_files": {"test": HERE}}, HERE),
    "wherever it lies": ({"data_files": {"test": "{here}/" + HERE}}, HERE),
    "an address of it": ({"data_files": {"test": "file://{here}/" + HERE}}, HERE),
    "of a split, several": ({"data_files": {"test": ["other.jsonl", HERE]}}, HERE),
    "a name": ({"data_files": HERE}, HERE),
    "names": ({"data_files": ["other.jsonl", HERE]}, HERE),
    "each with its split": ({"data_files": [{"split": "test", "path": HERE}]}, HERE),
    "a pattern": ({"data_files": {"test": "*/que*.jsonl"}}, DATA),
    "a folder": ({"data_dir": "data"}, DATA),
    "in a folder": ({"data_dir": "data", "data_files": {"test": HERE}}, DATA),
    "a data set": ({"dataset_path": "data"}, DATA),
    "in a data set": ({"dataset_path": "data", "data_files": HERE}, DATA),
}


def write_questions(file: Path, question: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"question": question}) + "\n")


@pytest.fixture
def key_of(job_of: Callable[..., Job], tiny: Path, tmp_path: Path) -> Callable[..., str]:
    """The key of the scores of a task that says this of its data."""

    def key(dataset_path: str = "json", **said: Any) -> str:
        described = {"task": "t", "dataset_path": dataset_path, "dataset_kwargs": said}
        file = tmp_path / "task.yml"
        file.write_text(yaml.safe_dump(described | {"output_type": "multiple_choice"}))
        job = job_of(tiny, "rtn_w4a16", f"eval.lm_eval.tasks={file}")
        return task_scores.key(job, "an export's key", job.evaluation)

    return key


@pytest.mark.parametrize(("said", "file"), NAMED.values(), ids=NAMED.keys())
def test_scores_are_those_of_the_questions_in_a_file(
    key_of: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
    file: str,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    said = json.loads(json.dumps(said).replace("{here}", str(here)))
    for name in (HERE, DATA, "other.jsonl"):
        write_questions(here / name, f"{name}, before")

    def asked() -> list[str]:
        path = said.get("dataset_path", "json")
        given = {name: value for name, value in said.items() if name != "dataset_path"}
        read = datasets.load_dataset(path, **given, cache_dir=str(tmp_path / "cache"))
        return [row["question"] for rows in read.values() for row in rows]

    before, questions = key_of(**said), asked()
    assert key_of(**said) == before
    write_questions(here / file, "after")
    # it is the file that is read
    assert asked() == ["after" if q == f"{file}, before" else q for q in questions] != questions
    assert key_of(**said) != before


@pytest.mark.parametrize(
    ("dataset", "name"), [("json", f"https://host.invalid/{HERE}"), ("org/data", HERE)]
)
def test_of_questions_elsewhere_the_name_counts(
    key_of: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = key_of(dataset, data_files={"test": name})
    write_questions(tmp_path / HERE, "another file of that name")
    assert key_of(dataset, data_files={"test": name}) == before
    assert key_of(dataset, data_files={"test": f"{name}.gz"}) != before


def test_scores_are_found_again_from_another_folder(
    key_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for name in ("here", "there"):
        write_questions(tmp_path / name / HERE, "the same")
        monkeypatch.chdir(tmp_path / name)
        keys.append(key_of(data_files=[HERE, str(tmp_path / "here" / HERE)]))
    assert keys[0] == keys[1]


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
