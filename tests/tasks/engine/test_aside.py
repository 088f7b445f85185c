"""What a thread makes beside the blocks is what its task would have made, and leaves nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.course import Course
from tasks.engine.aside import made_aside
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.store import load_tensors
from tasks.outside import outside
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf

pytestmark = pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send")

made_by: list[str] = []


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_tensors(file)
    return found


def _depends_on(job: Job, name: str) -> dict[str, Any]:
    return {"name": name}


@step(depends_on=_depends_on)
def written(job: Job, draft: Draft, name: str) -> dict[str, Any]:
    """Two tensors, and who wrote them."""
    made_by.append(threading.current_thread().name)
    draft.save_tensors("numbers.safetensors", {"numbers": torch.arange(5)})
    if name == "fails once" and len(made_by) == 1:
        raise OSError("the disk was away")
    return {"count": 5}


@pytest.fixture
def job(job_of: JobOf, tmp_path: Path) -> Job:
    made_by.clear()
    return job_of(make_checkpoint(tmp_path / "model", "llama"), "rtn_w4a16")


def staged(job: Job) -> list[Path]:
    return list((job.store.root / "staging").glob("*"))


@pytest.mark.usefixtures("services")
def test_its_task_takes_what_a_thread_made(job: Job) -> None:
    with made_aside(job, written, "x") as aside:
        result = Course().run(written, job, "x", ahead=aside)
    assert len(made_by) == 1 and made_by[0] != threading.main_thread().name
    assert result.value == {"count": 5} and not result.cached
    assert torch.equal(tensors_of(result.entry.folder)["numbers"], torch.arange(5))
    assert staged(job) == []


@pytest.mark.usefixtures("services")
def test_what_is_found_is_not_made(job: Job) -> None:
    Course().run(written, job, "x")
    with made_aside(job, written, "x") as aside:
        assert Course().run(written, job, "x", ahead=aside).cached
    assert len(made_by) == 1


@pytest.mark.usefixtures("services")
def test_what_was_found_and_then_lost_is_made(job: Job) -> None:
    entry = Course().run(written, job, "x").entry
    with made_aside(job, written, "x") as aside:
        # the thread is through
        assert aside._begun is not None and aside._begun.result() is None
        job.store.remove(entry.key)
        assert not Course().run(written, job, "x", ahead=aside).cached
    assert len(made_by) == 2


@pytest.mark.usefixtures("services")
def test_what_failed_leaves_nothing_and_is_made_anew(job: Job) -> None:
    with made_aside(job, written, "fails once") as aside:
        assert aside._begun is not None and isinstance(aside._begun.exception(10), OSError)
        assert staged(job) == [], "a disk that was full has room again"
        assert Course().run(written, job, "fails once", ahead=aside).value == {"count": 5}
    assert len(made_by) == 2 and staged(job) == []


def test_nothing_is_left_where_nobody_takes_it(job: Job) -> None:
    with pytest.raises(KeyError), made_aside(job, written, "x"):
        raise KeyError
    assert len(made_by) == 1 and staged(job) == [] and job.store.entries() == []


@pytest.mark.usefixtures("services")
def test_the_tensors_outside_of_the_blocks(job: Job) -> None:
    plain = Course().run(outside, job).entry
    source = tensors_of(job.source.path)
    beside = {name: t for name, t in source.items() if ".layers." not in name}
    kept = tensors_of(plain.folder)
    assert set(kept) == set(beside) and len(beside) >= 2
    assert all(torch.equal(kept[name], beside[name]) for name in beside)
    first = {p.name: p.read_bytes() for p in plain.folder.glob("*.safetensors")}
    job.store.remove(plain.key)
    with made_aside(job, outside) as aside:
        again = Course().run(outside, job, ahead=aside).entry
    assert {p.name: p.read_bytes() for p in again.folder.glob("*.safetensors")} == first
