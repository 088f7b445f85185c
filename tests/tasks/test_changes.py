"""Whether a published checkpoint is to be made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tasks.changes import news
from tasks.engine.job import Job
from tasks.engine.publication import REPORT, begin, end
from tasks.engine.store import write_text
from tasks.report import source_digests, without_places
from tests.models import make_checkpoint

JobOf = Callable[..., Job]
FINE = ("quant.weight.group_size=64",)


@pytest.fixture
def published(tmp_path: Path, job_of: JobOf) -> tuple[Path, Path]:
    """A model, and a folder with what a report says of its origin."""
    model = make_checkpoint(tmp_path / "model")
    job = job_of(model, "rtn_w4a16", *FINE)
    report = {
        "recipe": without_places(job.recipe.canonical()),
        "source": {"name": "any", **source_digests(job)},
        "texts": job.texts,
        "versions": {"blockquant": version("blockquant"), "torch": "another"},
        "ignored": list(job.plan.ignored),
    }
    output = tmp_path / "out"
    output.mkdir()
    (output / REPORT).write_text(json.dumps(report))
    return model, output


def edit(output: Path, **changes: Any) -> None:
    write_text(output / REPORT, json.dumps(json.loads((output / REPORT).read_text()) | changes))


def test_nothing_is_new(published: tuple[Path, Path], job_of: JobOf) -> None:
    model, output = published
    assert news(job_of(model, "rtn_w4a16", *FINE), output) is None


def test_a_weight_is_new(published: tuple[Path, Path], job_of: JobOf) -> None:
    model, output = published
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert news(job_of(model, "rtn_w4a16", *FINE), output) == "the source model's digest is new"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_small_file_of_the_source_is_new(
    published: tuple[Path, Path], job_of: JobOf, name: str
) -> None:
    model, output = published
    read = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(read | {"bos_token_id": 7}))
    told = "the source model's config or tokenizer is new"
    assert news(job_of(model, "rtn_w4a16", *FINE), output) == told


def test_the_recipe_is_new(published: tuple[Path, Path], job_of: JobOf) -> None:
    model, output = published
    job = job_of(model, "rtn_w4a16", "quant.weight.group_size=32")
    assert news(job, output) == "the recipe is new (steps)"


def test_the_place_of_a_text_is_not_new(
    published: tuple[Path, Path], job_of: JobOf, tmp_path: Path
) -> None:
    model, output = published
    evaluated = "eval={{name: text, path: {}/words.txt, windows: 2, seq_len: 48}}"
    before = job_of(model, "rtn_w4a16", *FINE, evaluated.format(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        (folder / "words.txt").write_text("the river\n" * 400)
    edit(output, recipe=without_places(before.recipe.canonical()), texts=before.texts)
    assert news(job_of(model, "rtn_w4a16", *FINE, evaluated.format(elsewhere)), output) is None
    (elsewhere / "words.txt").write_text("the mountain\n" * 400)
    told = "a text that the recipe names is new"
    assert news(job_of(model, "rtn_w4a16", *FINE, evaluated.format(elsewhere)), output) == told
    assert news(job_of(model, "rtn_w4a16", *FINE), output) == "the recipe is new (eval)"


def test_the_code_is_new(published: tuple[Path, Path], job_of: JobOf) -> None:
    model, output = published
    edit(output, versions={"blockquant": "0.0.1"})
    assert "it was 0.0.1" in str(news(job_of(model, "rtn_w4a16", *FINE), output))


def test_other_linears_are_left_out(published: tuple[Path, Path], job_of: JobOf) -> None:
    model, output = published
    edit(output, ignored=["lm_head", "model.layers.0.mlp.down_proj"])
    assert news(job_of(model, "rtn_w4a16", *FINE), output) == "other linears are left out"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"source": 3}'])
def test_a_report_that_is_damaged(published: tuple[Path, Path], job_of: JobOf, text: str) -> None:
    model, output = published
    (output / REPORT).write_text(text)
    assert "cannot be read" in str(news(job_of(model, "rtn_w4a16", *FINE), output))


def test_what_was_not_ended_is_gone_on_with(
    published: tuple[Path, Path], job_of: JobOf, tmp_path: Path
) -> None:
    model, output = published
    job = job_of(model, "rtn_w4a16", *FINE)
    begin(job.store.root, output, "some work")
    assert news(job, output) == "the last publication was not ended"
    end(job.store.root, output, "some work")
    assert news(job, output) is None
    assert news(job, tmp_path / "nowhere") == "nothing is published yet"
