"""A task of multiple choice for lm-evaluation-harness, described in a file of the test's own."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

QUESTIONS = [
    {"question": "The people", "answers": ["saw the way", "of"], "right": 0},
    {"question": "One day the world", "answers": ["was good", "and and and", "the"], "right": 2},
    {"question": "Over time", "answers": ["work", "some of the same", "a"], "right": 1},
]


def make_task(folder: Path) -> Path:
    """Write the questions and the task `questions` that asks them."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    described = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = folder / "questions.yml"
    path.write_text(yaml.safe_dump(described))
    return path
