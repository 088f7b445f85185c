"""Whether a published checkpoint is to be made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.changes import news
from tasks.engine.job import Job
from tasks.engine.publication import REPORT, begin, end
from tasks.engine.served_windows import WINDOWS, ServedWindows, windows_text
from tasks.engine.source import CONFIG
from tasks.engine.store import write_text
from tasks.publish import QUANTIZED, TRANSFORMED
from tasks.report import source_digests, without_places
from tests.models import make_checkpoint

JobOf = Callable[..., Job]
FINE = ("quant.weight.group_size=64",)
EVALUATED = 20


@pytest.fixture
def published(tmp_path: Path, job_of: JobOf) -> tuple[Path, Path]:
    """A model, and a folder with what a report says of its origin; 20 windows were evaluated on."""
    model = make_checkpoint(tmp_path / "model")
    job = job_of(model, "rtn_w4a16", *FINE)
    report = {
        "recipe": without_places(job.recipe.canonical()),
        "source": {"name": "any", **source_digests(job)},
        "texts": job.texts,
        "versions": {"blockquant": version("blockquant"), "torch": "another"},
        "ignored": list(job.plan.ignored),
        "metrics": {"tokens": EVALUATED * (job.evaluation.seq_len - 1)},
        "tensor_parallel": 1,
    }
    output = tmp_path / "out"
    output.mkdir()
    (output / REPORT).write_text(json.dumps(report))
    (output / CONFIG).write_text("{}")
    put_windows(output, 16)
    return model, output


def put_windows(output: Path, count: int) -> None:
    windows = ServedWindows(torch.zeros(count, 8, dtype=torch.int64), (2.5,) * count)
    write_text(output / WINDOWS, windows_text(windows))


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


@pytest.mark.parametrize(
    ("lies", "asked", "said"),
    [
        ([TRANSFORMED], ["save_trans=true", "save_sgl=true"], "save.save_sgl is new"),
        ([TRANSFORMED], ["save_trans=true", "save_sgl=false"], None),
        ([QUANTIZED], ["save_trans=true", "save_sgl=true"], "save.save_trans is new"),
        ([QUANTIZED], ["save_trans=true", "save_sgl=false"], "save.save_sgl is new"),
        ([QUANTIZED, TRANSFORMED], ["save_trans=true", "save_sgl=true"], None),
        ([QUANTIZED, TRANSFORMED], [], "save.save_trans is new"),
    ],
)
def test_what_is_to_be_published_is_new(
    published: tuple[Path, Path],
    job_of: JobOf,
    lies: list[str],
    asked: list[str],
    said: str | None,
) -> None:
    model, output = published
    if QUANTIZED not in lies:
        (output / CONFIG).unlink()
        (output / WINDOWS).unlink()
    for folder in lies:
        (output / folder).mkdir(exist_ok=True)
        (output / folder / CONFIG).write_text("{}")
    job = job_of(model, "rtn_w4a16", *FINE, *(f"save.{key}" for key in asked))
    assert news(job, output) == said


def test_over_how_many_gpus_it_is_served_is_new(
    published: tuple[Path, Path], job_of: JobOf
) -> None:
    model, output = published
    job = job_of(model, "rtn_w4a16", *FINE, "serving.tensor_parallel=2")
    assert news(job, output) == "serving.tensor_parallel is new, it was 1"
    edit(output, tensor_parallel=2)
    assert news(job, output) is None


@pytest.mark.parametrize(
    ("lie", "asked", "published_now"),
    [
        *((16, 0, 0), (0, 16, 16), (16, 8, 8), (8, 16, 16), (0, 0, 0), (8, 8, 8)),
        # there were no more to be had
        *((20, 64, 20), (16, 64, 20)),
    ],
)
def test_the_number_of_windows_is_new(
    published: tuple[Path, Path], job_of: JobOf, lie: int, asked: int, published_now: int
) -> None:
    model, output = published
    (output / WINDOWS).unlink()
    if lie:
        put_windows(output, lie)
    job = job_of(model, "rtn_w4a16", *FINE, f"serving.windows={asked}")
    told = f"{published_now} evaluation windows are to be published, {lie} are there"
    assert news(job, output) == (None if lie == published_now else told)


@pytest.mark.parametrize("asked", [0, 16])
def test_windows_that_are_damaged(published: tuple[Path, Path], job_of: JobOf, asked: int) -> None:
    model, output = published
    (output / WINDOWS).write_text("{")
    job = job_of(model, "rtn_w4a16", *FINE, f"serving.windows={asked}")
    assert news(job, output) == f"{WINDOWS} of the published checkpoint cannot be read"


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
