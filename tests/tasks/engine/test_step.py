"""A step is computed once, whatever happens to what Prefect and the store remember of it."""

from __future__ import annotations

import base64
import errno
import gc
import json
import logging
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.schemas.objects import State
from prefect.states import Completed
from safetensors import SafetensorError

import tasks.engine.step as module
from tasks.engine import lineage
from tasks.engine.disk import DiskFullError
from tasks.engine.doubts import Doubts
from tasks.engine.draft import Draft
from tasks.engine.errors import InputError, NonFiniteWeightError, RunError
from tasks.engine.lineage import code_digest
from tasks.engine.phases import Phases
from tasks.engine.residency import DeviceMemoryError
from tasks.engine.step import Step, action, step
from tasks.engine.store import MANIFEST, Entry, Store, load_tensors
from tasks.engine.team import ALONE, Team

pytestmark = [
    pytest.mark.usefixtures("services"),
    pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send"),
]


@dataclass
class Work:
    """What a step needs of a job, what was computed, and failures to come."""

    store: Store
    fingerprint: dict[str, str] = field(default_factory=lambda: {"device": "cpu"})
    computed: list[int] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    device: str = "cuda:0"
    leaner_jobs: list[Work] = field(default_factory=list)
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: Doubts = field(default_factory=Doubts)
    phases: Phases = field(default_factory=Phases)
    team: Team = ALONE
    lean: bool = False

    def leaner(self) -> Work | None:
        return self.leaner_jobs.pop(0) if self.leaner_jobs else None


@step(depends_on=lambda job, number: {"number": number})
def square(job: Any, draft: Draft, number: int) -> dict[str, Any]:
    job.computed.append(number)
    draft.save_tensors("square.safetensors", {"square": torch.tensor(number**2)})
    if job.failures:
        raise job.failures.pop(0)
    return {"square": number**2}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    return Work(Store(tmp_path / "store"))


def test_a_result_is_made_once_and_then_found(work: Work) -> None:
    made = square(work, 3)
    assert (made.cached, made.value, work.computed) == (False, {"square": 9}, [3])
    assert made.key == square.key(work, 3) == made.entry.key
    assert int(load_tensors(made.entry.file("square.safetensors"))["square"]) == 9
    assert made.entry.task == "square"
    found = square(work, 3)
    assert (found.cached, found.entry, work.computed) == (True, made.entry, [3])
    # by another process too
    again = Work(Store(work.store.root))
    assert square(again, 3).cached
    assert again.computed == []
    assert not square(work, 4).cached
    assert square(work, 4).value == {"square": 16}


def test_prefect_keeps_a_small_record_of_each_result(work: Work) -> None:
    key = square(work, 3).key
    (record,) = (work.store.root / "prefect").iterdir()
    assert record.name == key
    assert "square" in record.read_text()
    assert record.stat().st_size < 4096


def flip_tensor(folder: Path) -> None:
    path = folder / "square.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "tensor flipped": flip_tensor,
    "tensor gone": lambda folder: (folder / "square.safetensors").unlink(),
    "manifest gone": lambda folder: (folder / MANIFEST).unlink(),
    "manifest cut": lambda folder: os.truncate(folder / MANIFEST, 50),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_made_again_although_prefect_remembers(
    work: Work, damage: Callable[[Path], object]
) -> None:
    folder = square(work, 3).entry.folder
    assert square(work, 3).cached
    damage(folder)
    again = square(work, 3)
    assert (again.cached, work.computed) == (False, [3, 3])
    assert int(load_tensors(again.entry.file("square.safetensors"))["square"]) == 9
    assert square(work, 3).cached


RECORDS: dict[str, Callable[[Path], object]] = {
    "gone": lambda record: record.unlink(),
    "emptied": lambda record: record.write_text(""),
    "cut": lambda record: os.truncate(record, record.stat().st_size // 2),
    "binary": lambda record: record.write_bytes(b"\xff\xfe\x00"),
    "a number": lambda record: record.write_text("7"),
    "of another kind": lambda record: record.write_text('{"made": "by hand"}'),
    "without its result": lambda record: record.write_text(
        json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "result"})
    ),
    "a name flipped": lambda record: record.write_text(
        record.read_text().replace("metadata", "metadatb")
    ),
}


@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS.keys())
def test_a_damaged_record_of_prefect_costs_nothing(
    work: Work, damage: Callable[[Path], object]
) -> None:
    made = square(work, 3)
    damage(work.store.root / "prefect" / made.key)
    found = square(work, 3)
    assert (found.cached, found.entry, work.computed) == (True, made.entry, [3])


class Mark:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def a_pickle(record: dict[str, Any], mark: Path) -> None:
    record["metadata"]["serializer"] = {"type": "pickle", "picklelib": "cloudpickle"}
    record["result"] = base64.b64encode(pickle.dumps(Mark(mark))).decode()


def a_call(record: dict[str, Any], mark: Path) -> None:
    # how Prefect writes exceptions: a name to import, and what to call it with
    record["result"] = json.dumps({"__exc_type__": "os.mkdir", "message": str(mark)})


@pytest.mark.parametrize("damage", [a_pickle, a_call])
def test_a_record_runs_no_code(
    work: Work, tmp_path: Path, damage: Callable[[dict[str, Any], Path], None]
) -> None:
    made = square(work, 3)
    path, mark = work.store.root / "prefect" / made.key, tmp_path / "mark"
    record = json.loads(path.read_text())
    damage(record, mark)
    path.write_text(json.dumps(record))
    found = square(work, 3)
    assert (found.cached, found.entry, work.computed) == (True, made.entry, [3])
    assert not mark.exists()


@pytest.mark.parametrize(
    "failure", [OSError(5, "Input/output error"), TimeoutError(), SafetensorError("cut")], ids=repr
)
def test_what_may_pass_is_tried_again(work: Work, failure: BaseException) -> None:
    work.failures = [failure, failure]
    assert square(work, 3).value == {"square": 9}
    assert work.computed == [3, 3, 3]


def test_it_is_not_tried_for_ever(work: Work) -> None:
    work.failures = [OSError(errno.EIO, "Input/output error")] * 9
    with pytest.raises(OSError, match="Input/output error"):
        square(work, 3)
    assert len(work.computed) == 1 + module.RETRIES
    assert_nothing_left(work)
    work.failures = []
    assert not square(work, 3).cached


@pytest.mark.parametrize(
    "failure",
    [
        *(ValueError("wrong"), RunError("wrong"), InputError("wrong")),
        *(NonFiniteWeightError("wrong"), KeyError("wrong")),
        *(FileNotFoundError(2, "wrong"), PermissionError(13, "wrong")),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_what_stays_wrong_is_not(work: Work, failure: BaseException) -> None:
    work.failures = [failure]
    with pytest.raises(type(failure), match="wrong"):
        square(work, 3)
    assert work.computed == [3]
    assert_nothing_left(work)


def assert_nothing_left(work: Work) -> None:
    assert work.store.entries() == []
    assert list((work.store.root / "staging").iterdir()) == []
    assert not (work.store.root / "prefect" / square.key(work, 3)).exists()
    # what Prefect writes of a failure is no pickle
    for record in (work.store.root / "prefect").iterdir():
        assert json.loads(record.read_text())["metadata"]["serializer"]["type"] == "json"


def test_actions_are_done_each_time(work: Work) -> None:
    failures = [OSError(5, "Input/output error")]
    done: list[int] = []

    def act(number: int) -> int:
        done.append(number)
        if failures:
            raise failures.pop()
        return number * 2

    with pytest.raises(OSError):
        action(act)(3)
    assert action(act)(3) == 6
    assert done == [3, 3]
    failures.append(OSError(5, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        action(act)(4)


def test_an_action_is_given_what_it_was_asked_with(work: Work) -> None:
    # Prefect would look for results to come in all that its parameters hold
    state: State[int] = Completed(data=3)
    given = {"deep": [state]}
    seen: list[Any] = []
    action(lambda first, *, second: seen.extend((first, second)), name="act")(state, second=given)
    assert seen[0] is state and seen[1] is given and given["deep"] == [state]


def test_what_is_found_is_read_once(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    square(work, 3)
    asked: list[str] = []
    get = Store.get

    def counted(self: Store, key: str) -> Entry | None:
        asked.append(key)
        return get(self, key)

    monkeypatch.setattr(Store, "get", counted)
    assert square(work, 3).cached
    assert asked == [square.key(work, 3)]


# keys


def other(name: str = "square", **changes: Any) -> Step[...]:
    given = {
        **{"version": 1, "depends_on": lambda job, number: {"number": number}},
        **{"compute": square.compute, "code": ()},
    }
    return Step(name, **(given | changes))


def test_a_key_covers_what_decides_the_result(work: Work) -> None:
    base = square.key(work, 3)
    assert other().key(work, 3) == base
    assert other(kept=True).key(work, 3) == base
    keys = [
        base,
        square.key(work, 4),
        square.key(Work(work.store, {"device": "cuda"}), 3),
        other("cube").key(work, 3),
        other(version=2).key(work, 3),
        other(depends_on=lambda job, number: {"number": number, "of": "x"}).key(work, 3),
        other(code=("quantizers.packing",)).key(work, 3),
        other(code=("quantizers.rounding",)).key(work, 3),
    ]
    assert len(set(keys)) == len(keys)
    # where results lie does not matter
    assert square.key(Work(Store("/elsewhere")), 3) == base


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of quantizers/packing.py that keys are made of instead."""
    real = lineage._path
    copy = tmp_path / "packing.py"
    copy.write_text(real("quantizers.packing").read_text())
    monkeypatch.setattr(
        lineage, "_path", lambda name: copy if name == "quantizers.packing" else real(name)
    )
    code_digest.cache_clear()
    yield copy
    code_digest.cache_clear()


def test_a_key_covers_code_and_not_its_comments(work: Work, packing: Path) -> None:
    packs = other(code=("quantizers.packing",))
    before = (packs.key(work, 3), square.key(work, 3))
    text = packing.read_text()
    packing.write_text("# a comment\n" + text + "\n\n# another\n")
    code_digest.cache_clear()
    assert (packs.key(work, 3), square.key(work, 3)) == before
    assert "0x80" in text
    packing.write_text(text.replace("0x80", "0x7f"))
    code_digest.cache_clear()
    assert packs.key(work, 3) != before[0]
    assert square.key(work, 3) == before[1]


def full() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_is_tried_again_with_less_on_the_device(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    lean = Work(work.store)
    work.leaner_jobs, work.failures = [lean], [full()]
    caplog.set_level(logging.WARNING)
    made = square(work, 3)
    assert (work.computed, lean.computed) == ([3], [3])
    assert (made.value, made.cached, made.lean) == ({"square": 9}, False, lean)
    assert "square: cuda:0 is full; tried again with less kept on it" in caplog.text
    assert square(work, 3).lean is None


def test_out_of_memory_with_nothing_left_to_move_is_one_line(work: Work) -> None:
    lean = Work(work.store, failures=[full()])
    work.leaner_jobs, work.failures = [lean], [full()]
    with pytest.raises(DeviceMemoryError) as raised:
        square(work, 3)
    assert (work.computed, lean.computed) == ([3], [3])
    assert str(raised.value) == (
        "square: cuda:0 has too little memory for one block even with all else on the host; use a "
        "device with more, or a shorter calib.seq_len "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.)"
    )


def test_what_a_full_device_held_is_let_go_before_the_next_try(work: Work) -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    @step(depends_on=lambda job: {})
    def fill(job: Any, draft: Draft) -> dict[str, Any]:
        del draft
        if not held:
            tensor = torch.zeros(8)
            held.append(weakref.ref(tensor))
            raise full()
        gc.collect()
        alive.append(held[0]() is not None)
        return {}

    work.leaner_jobs = [Work(work.store)]
    fill(work)
    assert alive == [False]


def test_a_transient_fault_after_one_of_memory_is_tried_again_too(work: Work) -> None:
    lean = Work(work.store, failures=[OSError("Input/output error")])
    work.leaner_jobs, work.failures = [lean], [full()]
    assert square(work, 3).value == {"square": 9}
    assert (work.computed, lean.computed) == ([3], [3, 3])


def test_a_full_disk_is_not_tried_again(work: Work) -> None:
    work.failures = [OSError(errno.ENOSPC, "No space left on device")]
    with pytest.raises(DiskFullError, match="no room is left on its disk"):
        square(work, 3)
    assert work.computed == [3]
    assert not list((work.store.root / "staging").iterdir())
