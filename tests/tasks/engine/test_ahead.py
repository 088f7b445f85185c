"""Calls that others than their tasks compute: in order, no more than may be begun, noted once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tasks.engine.draft as files
import tasks.engine.step as module
from tasks.engine.ahead import Call, Host, Plan, begun_ahead, in_turn, keyed
from tasks.engine.doubts import Doubts
from tasks.engine.draft import Draft
from tasks.engine.phases import AHEAD, IN_TASK, ORCHESTRATED, WAITED, WRITTEN, Phases
from tasks.engine.residency import DeviceMemoryError
from tasks.engine.step import Made, Result, step
from tasks.engine.store import Store, checksum, load_tensors
from tasks.engine.team import ALONE, Team
from tasks.engine.values import Later, resolved

pytestmark = [
    pytest.mark.usefixtures("services"),
    pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send"),
]
COUNT, DEPTH = 8, 3
EXPECTED = [block * (block + 1) // 2 for block in range(COUNT)]


@dataclass
class Work:
    """What steps need of a job, and what was computed."""

    store: Store
    on_gpu: bool = False
    lean: bool = False
    device: str = "cpu"
    fingerprint: dict[str, str] = field(default_factory=lambda: {"device": "cpu"})
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: Doubts = field(default_factory=Doubts)
    phases: Phases = field(default_factory=Phases)
    team: Team = ALONE
    sums: dict[str, int] = field(default_factory=dict)
    computed: list[int] = field(default_factory=list)
    digested: list[int] = field(default_factory=list)
    failures: dict[int, BaseException] = field(default_factory=dict)
    leaner_jobs: list[Work] = field(default_factory=list)

    def leaner(self) -> Work | None:
        return self.leaner_jobs.pop(0) if self.leaner_jobs else None

    def digest_ahead(self, block: int) -> None:
        self.digested.append(block)


@step(depends_on=lambda job, before, block: {"before": before, "block": block})
def add(job: Any, draft: Draft, before: str, block: int) -> dict[str, Any]:
    """The sum of all blocks' numbers so far, which only memory holds."""
    job.computed.append(block)
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


@dataclass
class Other:
    """Makes results at once when they are begun, as another process does beside the flow.

    Attributes:
        begun: which blocks.
        halted: how often it was told that the device is full.
    """

    work: Any
    place: Path
    begun: list[int] = field(default_factory=list)
    halted: int = 0

    def begin(self, job: Any, call: Call, key: str) -> Promised:
        self.begun.append(call.block)

        def make() -> Made:
            made = call.step.make(self.work, key, *call.args, block=call.block)
            written, _ = Host(self.work).begun(made, self.place / key)
            paths = written.draft.wait()
            return Made(Draft.written(self.place / key, paths), made.value, None)

        return Promised(self, make)


@dataclass
class Promised:
    other: Other
    make: Callable[[], Made]
    made: Made | None = None

    def take(self) -> Made:
        self.made = self.made or self.make()
        return self.made

    def halt(self) -> None:
        self.other.halted += 1


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    return Work(Store(tmp_path / "store"))


@pytest.fixture
def other(work: Work, tmp_path: Path) -> Other:
    return Other(Work(work.store), tmp_path / "ahead")


def run(work: Any, other: Other) -> Iterator[Result]:
    """Run the plan as the flow does."""
    job = work
    for call, ahead in begun_ahead(work, plan(), other.begin, DEPTH):
        result = call.step.run(job, ahead, *call.args, block=call.block)
        job = result.lean or job
        yield result


def sums(results: list[Result]) -> list[int]:
    values = [result.value["sum"] for result in results]
    read = [load_tensors(result.entry.file("sum.safetensors"))["sum"] for result in results]
    assert [int(number) for number in read] == values
    return values


def test_what_others_make_is_noted_in_its_order(work: Work, other: Other) -> None:
    assert sums(list(run(work, other))) == EXPECTED
    assert work.computed == [] and other.work.computed == list(range(COUNT))
    kinds = {kind for kind, seconds in work.phases.of(60.0).items() if seconds > 0}
    assert kinds == {WAITED, WRITTEN, ORCHESTRATED}
    assert other.work.phases.seconds[AHEAD] > 0
    # of what was taken nothing is left beside
    assert [path for path in other.place.rglob("*") if path.is_file()] == []


def test_no_more_are_begun_than_may_be(work: Work, other: Other) -> None:
    results = run(work, other)
    next(results)
    assert other.begun == list(range(DEPTH))
    next(results)
    assert other.begun == list(range(DEPTH + 1))
    results.close()  # type: ignore[attr-defined]
    assert [entry.value for entry in work.store.entries()] == [{"sum": 0}, {"sum": 1}]


def test_each_block_is_digested_while_the_one_before_it_is_planned(work: Work) -> None:
    job: Any = work
    assert [call.block for call, _ in keyed(job, plan())] == list(range(COUNT))
    assert work.digested == list(range(1, COUNT + 1))


def test_where_nobody_else_computes_the_tasks_do(work: Work) -> None:
    job: Any = work
    results = []
    with in_turn(job, plan()) as calls:
        for call, ahead in calls:
            assert ahead is None
            results.append(call.step.run(job, ahead, *call.args, block=call.block))
    assert sums(results) == EXPECTED
    assert work.computed == list(range(COUNT))
    assert work.phases.seconds[IN_TASK] > 0


def test_what_is_found_is_taken_from_nobody(work: Work, other: Other) -> None:
    list(run(work, other))
    again = Other(Work(work.store), other.place)
    assert all(result.cached for result in run(Work(work.store), again))
    assert again.work.computed == []


def test_a_failure_that_may_pass_is_tried_again(work: Work, other: Other) -> None:
    other.work.failures[3] = OSError("the disk was away")
    assert sums(list(run(work, other))) == EXPECTED
    assert other.work.computed == [0, 1, 2, 3, 3, 4, 5, 6, 7]


def test_what_was_made_is_not_made_again_where_it_could_not_be_noted(
    work: Work, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, tried = Store.commit, []

    def seldom(store: Store, key: str, task: str, draft: Draft, value: dict[str, Any]) -> Any:
        tried.append(key)
        if len(tried) == 3:
            raise OSError("the disk was away")
        return commit(store, key, task, draft, value)

    monkeypatch.setattr(Store, "commit", seldom)
    assert sums(list(run(work, other))) == EXPECTED
    assert tried[2] == tried[3] and len(tried) == COUNT + 1
    assert other.work.computed == list(range(COUNT))


def test_what_stays_wrong_ends_the_run_where_it_is_wrong(work: Work, other: Other) -> None:
    other.work.failures[3] = ValueError("no number")
    done = []
    with pytest.raises(ValueError, match="no number"):
        for result in run(work, other):
            done.append(result)
    assert sums(done) == EXPECTED[:3]
    assert len(work.store.entries()) == 3


def test_a_full_device_is_told_to_who_computes(work: Work, other: Other) -> None:
    other.work.failures[2] = torch.OutOfMemoryError("CUDA out of memory.")
    work.leaner_jobs.append(Work(work.store, lean=True))
    results = list(run(work, other))
    assert sums(results) == EXPECTED
    assert other.halted == 1
    assert [result.lean is not None for result in results] == [n == 2 for n in range(COUNT)]


def test_a_full_device_with_nothing_left_to_move_is_one_line(work: Work, other: Other) -> None:
    other.work.failures[0] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(DeviceMemoryError, match=r"^add\[block 0\]: cpu has too little memory"):
        list(run(work, other))


def test_files_are_written_by_threads_and_know_their_checksums(
    work: Work, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    write = files._write

    def watched(path: Path, saved: Any) -> None:
        threads.append(threading.current_thread().name)
        write(path, saved)

    monkeypatch.setattr(files, "_write", watched)
    assert sums(list(run(work, other))) == EXPECTED
    assert len(threads) == COUNT and all(n.startswith("blockquant-write") for n in threads)
    for entry in work.store.entries():
        assert Store(work.store.root).get(entry.key) == entry
        assert checksum(entry.file("sum.safetensors")) == entry.files["sum.safetensors"].checksum


def test_a_file_that_could_not_be_written_is_told_when_it_is_waited_for(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, saved: Any) -> None:
        raise OSError("the disk was away")

    monkeypatch.setattr(files, "_write", fails)
    job: Any = work
    made = add.make(job, "key", "", block=0)
    begun, _ = Host(job).begun(made, tmp_path / "key")
    with pytest.raises(OSError, match="the disk was away"):
        begun.draft.wait()


def test_what_a_device_made_is_fetched_whatever_the_disk_is_at(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), files._write

    def slowly(path: Path, saved: Any) -> None:
        assert go_on.wait(30)
        write(path, saved)

    monkeypatch.setattr(files, "_write", slowly)
    job: Any = work
    host, begun = Host(job), []
    for block in range(COUNT):
        key, place = f"key{block}", tmp_path / f"key{block}"
        made, fetched = host.begun(add.make(job, key, "", block=block), place)
        (copy,) = fetched
        assert copy.result(10).tensors["sum"].device.type == "cpu"
        assert not made.draft.saved, "it would be held on the device"
        assert not place.exists() or not list(place.iterdir())
        begun.append(made)
    go_on.set()
    for block, made in enumerate(begun):
        ((_, path),) = made.draft.wait().items()
        assert int(load_tensors(path)["sum"]) == block


def test_a_tensor_that_a_value_is_worked_out_of_is_let_go_then(work: Work, tmp_path: Path) -> None:
    job: Any = work
    codes, go_on = torch.ones(3), threading.Event()
    gone = weakref.ref(codes)

    def digest(of: Tensor) -> str:
        assert go_on.wait(30)
        return str(int(of.sum()))

    made = replace(
        add.make(job, "key", "", block=0), value={"digest": Later(partial(digest, codes))}
    )
    begun, kept = Host(job).begun(made, tmp_path / "key")
    del codes, made
    assert gone() is not None and not all(future.done() for future in kept)
    go_on.set()
    for future in kept:
        future.result(10)
    gc.collect()
    assert gone() is None
    assert resolved(begun.value) == {"digest": "3"}
