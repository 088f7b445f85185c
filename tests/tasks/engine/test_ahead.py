"""Steps computed ahead of their tasks: in order, one at a time; failures are the tasks'."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

import tasks.engine.step as module
import tasks.engine.store as files
from tasks.engine.ahead import DEPTH, Call, Plan, in_turn
from tasks.engine.phases import AHEAD, ORCHESTRATED, WAITED, WRITTEN, Phases
from tasks.engine.residency import DeviceMemoryError
from tasks.engine.step import Result, step
from tasks.engine.store import Draft, Store, load_tensors
from tasks.engine.team import ALONE, Team

pytestmark = [
    pytest.mark.usefixtures("services"),
    pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send"),
]
COUNT = 2 * DEPTH


@dataclass
class Work:
    """What steps need of a job; where each number was computed, and failures to come."""

    store: Store
    on_gpu: bool = True
    lean: bool = False
    device: str = "cpu"
    fingerprint: dict[str, str] = field(default_factory=lambda: {"device": "cpu"})
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    phases: Phases = field(default_factory=Phases)
    team: Team = ALONE
    sums: dict[str, int] = field(default_factory=dict)
    threads: dict[int, list[str]] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    leaner_jobs: list[Work] = field(default_factory=list)
    computing: Lock = field(default_factory=Lock)

    def leaner(self) -> Work | None:
        return self.leaner_jobs.pop(0) if self.leaner_jobs else None


@step(depends_on=lambda job, before, block: {"before": before, "block": block})
def add(job: Any, draft: Draft, before: str, block: int) -> dict[str, Any]:
    """The sum of all blocks' numbers so far, which only memory holds."""
    assert job.computing.acquire(blocking=False), "two at a time"
    time.sleep(0.005)
    job.computing.release()
    ahead = threading.current_thread().name.startswith("blockquant-ahead")
    job.threads.setdefault(block, []).append("ahead" if ahead else "task")
    if block in job.failures:
        raise job.failures.pop(block)
    key = add.key(job, before, block=block)
    job.sums[key] = job.sums.get(before, 0) + block
    draft.save_tensors("sum.safetensors", {"sum": torch.tensor(job.sums[key])})
    return {"sum": job.sums[key]}


def plan() -> Plan:
    key = ""
    for block in range(COUNT):
        key = yield Call(add, (key,), block)


def run(work: Any, lean: list[bool] | None = None) -> Iterator[Result]:
    """Run the plan as the flow does."""
    job = work
    with in_turn(work, plan(), lambda: bool(lean)) as calls:
        for call, ahead in calls:
            result = call.step.run(job, ahead, *call.args, block=call.block)
            if result.lean is not None and lean is not None:
                lean.append(True)
                job = result.lean
            yield result


def sums(results: list[Result]) -> list[int]:
    values = [result.value["sum"] for result in results]
    files = [load_tensors(result.entry.file("sum.safetensors"))["sum"] for result in results]
    assert [int(number) for number in files] == values
    return values


EXPECTED = [block * (block + 1) // 2 for block in range(COUNT)]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    return Work(Store(tmp_path / "store"))


def test_all_are_computed_ahead_and_written_in_order(work: Work) -> None:
    assert sums(list(run(work))) == EXPECTED
    assert work.threads == {block: ["ahead"] for block in range(COUNT)}
    assert work.held == {}
    kinds = {kind: seconds for kind, seconds in work.phases.of(60.0).items() if seconds > 0}
    assert set(kinds) == {AHEAD, WAITED, WRITTEN, ORCHESTRATED}
    assert "blockquant-ahead" not in {thread.name[:16] for thread in threading.enumerate()}


def test_no_further_than_its_depth(work: Work) -> None:
    results = run(work)
    next(results)
    # the first is written, and DEPTH at most were begun
    assert len(work.threads) <= DEPTH
    results.close()  # type: ignore[attr-defined]
    assert len(work.threads) <= DEPTH
    assert [entry.value for entry in work.store.entries()] == [{"sum": 0}]


def test_a_cpu_computes_nothing_ahead(work: Work) -> None:
    work.on_gpu = False
    assert sums(list(run(work))) == EXPECTED
    assert work.threads == {block: ["task"] for block in range(COUNT)}


def test_what_is_found_is_not_computed(work: Work) -> None:
    list(run(work))
    again = Work(work.store)
    results = list(run(again))
    assert all(result.cached for result in results)
    assert again.threads == {}


def test_a_failure_is_the_task_s_and_what_was_begun_is_made_there(work: Work) -> None:
    work.failures[3] = OSError("the disk was away")
    assert sums(list(run(work))) == EXPECTED
    assert work.threads[3] == ["ahead", "task"]
    assert all(work.threads[block] == ["ahead"] for block in range(3))
    # those that were begun with it
    later = [work.threads[block] for block in range(4, COUNT)]
    assert all(len(threads) == 1 for threads in later)
    assert later[0] == ["task"]
    # and after them it goes on ahead
    assert later[-1] == ["ahead"]


def test_what_stays_wrong_ends_the_run_where_it_is_wrong(work: Work) -> None:
    work.failures[3] = ValueError("no number")
    done = []
    with pytest.raises(ValueError, match="no number"):
        for result in run(work):
            done.append(result)
    assert sums(done) == EXPECTED[:3]
    assert len(work.store.entries()) == 3


def test_a_full_device_computes_nothing_more_ahead(work: Work) -> None:
    work.failures[2] = torch.OutOfMemoryError("CUDA out of memory.")
    leaner = Work(work.store, lean=True, sums=work.sums)
    work.leaner_jobs.append(leaner)
    assert sums(list(run(work, []))) == EXPECTED
    assert work.threads[2] == ["ahead"]
    assert set(work.threads) == {0, 1, 2}
    assert leaner.threads == {block: ["task"] for block in range(2, COUNT)}


def test_a_full_device_with_nothing_left_to_move_is_one_line(work: Work) -> None:
    work.failures[0] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(DeviceMemoryError, match=r"^add\[block 0\]: cpu has too little memory"):
        list(run(work))


def test_what_another_process_makes_is_left_to_it(work: Work) -> None:
    key, keys = "", []
    for block in range(COUNT):
        key = add.key(work, key, block=block)  # type: ignore[arg-type]
        keys.append(key)
    results = run(work)
    with work.store.lock(keys[2]):
        first = [next(results), next(results)]
        assert 2 not in work.threads
    assert sums([*first, *results]) == EXPECTED
    assert work.threads[2] == ["task"]


def test_files_are_written_beside_and_nothing_is_left(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    write = files._write

    def watched(path: Path, saved: Any) -> None:
        threads.append(threading.current_thread().name)
        write(path, saved)

    monkeypatch.setattr(files, "_write", watched)
    results = run(work)
    next(results)
    staging = work.store.root / "staging"
    (place,) = (folder for folder in staging.iterdir() if folder.name.startswith("ahead-"))
    # whoever collects leaves it alone
    assert work.store.is_locked(place.name)
    assert sums([*results]) == EXPECTED[1:]
    assert len(threads) == COUNT and all(n.startswith("blockquant-host") for n in threads)
    assert list(staging.iterdir()) == []
    assert not work.store.is_locked(place.name)


def test_a_file_that_could_not_be_written_ahead_is_written_by_the_task(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, threads = files._write, []

    def fails(path: Path, saved: Any) -> None:
        threads.append(threading.current_thread().name)
        if path.parent.parent.name.startswith("ahead-") and len(threads) == 3:
            raise OSError("the disk was away")
        write(path, saved)

    monkeypatch.setattr(files, "_write", fails)
    assert sums(list(run(work))) == EXPECTED
    # computed once, written by the task at its second try
    assert work.threads == {block: ["ahead"] for block in range(COUNT)}
    assert sum(not name.startswith("blockquant-host") for name in threads) == 1


def test_a_checksum_is_that_of_the_file_whoever_wrote_it(work: Work) -> None:
    list(run(work))
    for entry in work.store.entries():
        again = Store(work.store.root)
        assert again.get(entry.key) == entry
        assert files.checksum(entry.file("sum.safetensors")) == (
            entry.files["sum.safetensors"].checksum
        )
