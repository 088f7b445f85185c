"""Entries of the store are complete or absent, whatever happened to their files."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
import xxhash
from filelock import FileLock, Timeout

import tasks.engine.store as module
from tasks.engine.draft import link_or_copy
from tasks.engine.store import (
    MANIFEST,
    Entry,
    Store,
    load_tensors,
    run_lock,
    write_text,
)

KEY = "ab" + "0" * 62
OTHER = "cd" + "1" * 62


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, key: str = KEY, seed: int = 0) -> Entry:
    """An entry of two files, one of them in a folder, and a small value."""
    draw = torch.Generator().manual_seed(seed)
    with store.lock(key), store.draft(key) as draft:
        draft.save_tensors("weights.safetensors", {"w": torch.randn(8, 16, generator=draw)})
        (draft.folder / "inner").mkdir()
        (draft.folder / "inner" / "note.txt").write_text("a note")
        return store.commit(key, "made", draft, {"n": 3, "names": ["a", "b"]})


def test_nothing_is_created_by_looking(store: Store) -> None:
    assert store.get(KEY) is None
    assert store.entries() == []
    assert not store.root.exists()


def test_an_entry_comes_back_as_it_was_put(store: Store) -> None:
    made = put(store)
    found = Store(store.root).get(KEY)
    assert found == made
    assert found.value == {"n": 3, "names": ["a", "b"]}
    assert found.task == "made"
    expected = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_tensors(found.file("weights.safetensors"))["w"], expected)
    assert found.file("inner/note.txt").read_text() == "a note"
    assert sorted(found.files) == ["inner/note.txt", "weights.safetensors"]
    assert found.size == sum(p.stat().st_size for p in map(found.file, found.files))
    for name, stored in found.files.items():
        content = found.file(name).read_bytes()
        assert stored.checksum == xxhash.xxh3_128_hexdigest(content)
    with pytest.raises(KeyError, match=r"no file 'absent'"):
        found.file("absent")


def test_a_draft_is_nothing_before_its_commit(store: Store) -> None:
    with store.lock(KEY), store.draft(KEY) as draft:
        draft.save_tensors("weights.safetensors", {"w": torch.ones(2)})
        assert store.get(KEY) is None
        assert store.entries() == []
    assert store.get(KEY) is None
    assert list((store.root / "staging").iterdir()) == []


def test_a_failing_draft_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="stop"), store.draft(KEY) as draft:
        (draft.folder / "half").write_bytes(b"half")
        raise RuntimeError("stop")
    assert list((store.root / "staging").iterdir()) == []
    with store.draft(KEY) as draft:
        assert list(draft.folder.iterdir()) == []


def test_the_entry_appears_by_one_rename(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[tuple[Path, Path]] = []
    rename = os.rename

    def watch(source: Path, target: Path) -> None:
        # all that will be the entry is in the folder already, the manifest too
        assert store.get(KEY) is None
        assert (Path(source) / MANIFEST).is_file()
        renamed.append((Path(source), Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    entry = put(store)
    assert renamed == [(store.root / "staging" / KEY, entry.folder)]


def test_a_commit_that_dies_before_its_rename_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(OSError, match="No space"):
            put(store)
    assert store.get(KEY) is None
    assert put(store) == store.get(KEY)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "file gone": lambda e: (e / "weights.safetensors").unlink(),
    "file cut": lambda e: os.truncate(e / "weights.safetensors", 100),
    "file emptied": lambda e: os.truncate(e / "weights.safetensors", 0),
    "file longer": lambda e: (e / "inner/note.txt").write_text("a note and more"),
    "file flipped": lambda e: flip_last_byte(e / "weights.safetensors"),
    "file is a folder": lambda e: (
        (e / "inner/note.txt").unlink(),
        (e / "inner/note.txt").mkdir(),
    ),
    "manifest gone": lambda e: (e / MANIFEST).unlink(),
    "manifest emptied": lambda e: (e / MANIFEST).write_text(""),
    "manifest cut": lambda e: os.truncate(e / MANIFEST, 200),
    "manifest binary": lambda e: (e / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "manifest a list": lambda e: (e / MANIFEST).write_text("[]"),
    "manifest a number": lambda e: (e / MANIFEST).write_text("7"),
    "manifest value changed": lambda e: (e / MANIFEST).write_text(
        (e / MANIFEST).read_text().replace('"n": 3', '"n": 4')
    ),
    "manifest of another": lambda e: (e / MANIFEST).write_text(
        (e / MANIFEST).read_text().replace(KEY, OTHER)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("seen", [True, False], ids=["by the same process", "by another"])
def test_damage_reads_as_absent(store: Store, damage: Callable[[Path], object], seen: bool) -> None:
    folder = put(store).folder
    if seen:
        assert store.get(KEY) is not None
    damage(folder)
    looking = store if seen else Store(store.root)
    assert looking.get(KEY) is None
    # and it can be made again
    assert put(looking) == looking.get(KEY)


def test_damage_of_the_same_size_and_time_is_found_by_another_process(store: Store) -> None:
    path = put(store).file("weights.safetensors")
    status = path.stat()
    flip_last_byte(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Store(store.root).get(KEY) is None


def test_an_entry_in_another_entrys_place_is_absent(store: Store) -> None:
    folder = put(store).folder
    store.folder(OTHER).parent.mkdir(parents=True)
    os.rename(folder, store.folder(OTHER))
    assert store.get(OTHER) is None


def test_checksums_are_taken_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)
    taken: list[Path] = []
    real = module.checksum
    monkeypatch.setattr(module, "checksum", lambda path: (taken.append(path), real(path))[1])
    for _ in range(3):
        assert store.get(KEY) is not None
    assert taken == [], "they were taken when it was written"
    other = Store(store.root)
    for _ in range(3):
        assert other.get(KEY) is not None
    assert len(taken) == 2
    path = store.folder(KEY) / "weights.safetensors"
    os.utime(path, ns=(1, 1))
    assert store.get(KEY) is not None
    assert taken[2:] == [path]


def test_threads_that_ask_together_have_a_file_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    other, begun, go_on = Store(store.root), Event(), Event()
    taken: list[Path] = []
    real = module.checksum

    def checksum(path: Path) -> str:
        taken.append(path)
        begun.set()
        assert go_on.wait(10)
        return real(path)

    monkeypatch.setattr(module, "checksum", checksum)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(other.get, KEY)
        assert begun.wait(10)
        second = threads.submit(other.get, KEY)
        go_on.set()
        assert first.result() == second.result() == store.get(KEY)
    assert len(taken) == len(set(taken)) == 2


def test_a_file_that_could_not_be_read_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    other = Store(store.root)
    with monkeypatch.context() as patch:
        patch.setattr(module, "checksum", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.get(KEY)
    assert other.get(KEY) == store.get(KEY)


def test_what_seems_whole_is_of_its_sizes(store: Store) -> None:
    assert not store.seems_whole(KEY)
    folder = put(store).folder
    assert store.seems_whole(KEY)
    weights = folder / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(bytes([data[0] ^ 1, *data[1:]]))
    assert store.seems_whole(KEY) and store.get(KEY) is None
    weights.write_bytes(data[:-1])
    assert not store.seems_whole(KEY)
    weights.unlink()
    assert not store.seems_whole(KEY)


def test_committing_again_replaces(store: Store) -> None:
    first, second = put(store, seed=0), put(store, seed=1)
    name = "weights.safetensors"
    assert first.files[name].checksum != second.files[name].checksum
    assert store.get(KEY) == second
    assert list((store.root / "trash").iterdir()) == []


def test_tensors_are_written_whatever_their_layout(store: Store) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    with store.draft(KEY) as draft:
        draft.save_tensors("a", {"t": weight.t(), "v": weight[1:]})
        draft.save_tensors("b", {"v": weight[1:].clone(), "t": weight.t().clone()})
        assert (draft.folder / "a").read_bytes() == (draft.folder / "b").read_bytes()
        assert torch.equal(load_tensors(draft.folder / "b")["t"], weight.t())


def test_links_fall_back_to_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    linked = link_or_copy(source, tmp_path / "a" / "linked")
    assert linked.samefile(source)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = link_or_copy(source, tmp_path / "b" / "copied")
    assert not copied.samefile(source)
    assert copied.read_bytes() == b"content"


def test_text_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    write_text(path, "before")

    def die(source: Path, target: Path) -> None:
        raise OSError("stop")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="stop"):
        write_text(path, "after")
    assert path.read_text() == "before"


# locks


def _hold(root: Path, ready: Path) -> None:
    with Store(root).lock(KEY), Store(root).draft(KEY) as draft:
        (draft.folder / "half").write_bytes(b"half")
        ready.write_text("held")
        time.sleep(300)


def test_a_lock_dies_with_its_process(store: Store, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = multiprocessing.get_context("fork").Process(target=_hold, args=(store.root, ready))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lock = FileLock(store.root / "locks" / f"{KEY}.lock")
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        # what a living process is writing is not collected
        store.collect(older_than_s=0)
        assert (store.root / "staging" / KEY / "half").exists()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        start = time.monotonic()
        with store.lock(KEY):
            assert time.monotonic() - start < 5
        assert (store.root / "staging" / KEY / "half").exists()
        assert put(store) == store.get(KEY)
        assert list((store.root / "staging").iterdir()) == []
    finally:
        child.kill()
        child.join()


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_and_die(root: Path, point: str) -> None:
    store = Store(root)
    if point == "manifest":
        module.write_text = _die
    if point == "rename":
        os.rename = _die
    with store.lock(KEY), store.draft(KEY) as draft:
        (draft.folder / "data").write_bytes(b"x" * 1000)
        if point == "data":
            _die()
        store.commit(KEY, "made", draft, {})


@pytest.mark.parametrize("point", ["data", "manifest", "rename"])
def test_a_killed_writer_leaves_nothing_that_reads(store: Store, point: str) -> None:
    writer = multiprocessing.get_context("fork").Process(
        target=_write_and_die, args=(store.root, point)
    )
    writer.start()
    writer.join(timeout=60)
    assert writer.exitcode == -signal.SIGKILL
    assert (store.root / "staging" / KEY / "data").exists()
    assert store.entries() == []
    assert store.get(KEY) is None
    assert store.collect(older_than_s=0) == (0, 0)
    assert list((store.root / "staging").iterdir()) == []


# collecting


def age(entry: Entry) -> None:
    """Have an entry been made, and not used since, a thousand seconds ago."""
    manifest, past = entry.folder / MANIFEST, time.time() - 1000
    record = json.loads(manifest.read_text())["record"] | {"created": past}
    write_text(manifest, module.sealed(record))
    os.utime(manifest, (past, past))


def test_collect_leaves_what_was_used_since(store: Store) -> None:
    used, old = put(store, KEY), put(store, OTHER)
    for entry in (used, old):
        age(entry)
    found = store.get(KEY)
    assert found is not None and found.created < time.time() - 900
    assert store.collect(older_than_s=500) == (1, old.size)
    assert store.get(KEY) == found


def test_collect_removes_what_is_old(store: Store) -> None:
    old, new = put(store, KEY), put(store, OTHER)
    age(old)
    records = store.root / "prefect"
    records.mkdir()
    for key in (KEY, OTHER, "stray"):
        (records / key).write_text("{}")
    assert [e.key for e in store.entries()] == [KEY, OTHER]
    assert store.collect(older_than_s=500) == (1, old.size)
    assert store.get(KEY) is None
    assert not store.folder(KEY).exists()
    assert store.get(OTHER) == new
    # Prefect's records go with their entries
    assert [p.name for p in records.iterdir()] == [OTHER]


def test_collect_leaves_what_is_locked(store: Store) -> None:
    put(store)
    with store.lock(KEY):
        assert store.collect(older_than_s=0) == (0, 0)
    assert store.get(KEY) is not None
    assert store.collect(older_than_s=0)[0] == 1


def test_collect_removes_damaged_entries_and_leftovers(store: Store) -> None:
    folder = put(store).folder
    (folder / MANIFEST).unlink()
    leftover = store.root / "trash" / f"{KEY}-1-1"
    leftover.mkdir(parents=True)
    (leftover / "file").write_bytes(b"x")
    store.collect(older_than_s=0)
    # no key will ever lead to it, so it would lie there for good
    assert not folder.exists()
    assert not leftover.exists()


def test_collect_removes_old_logs_digests_and_locks_of_nothing(store: Store) -> None:
    put(store)
    with store.lock("gone"):
        pass
    for folder in ("logs", "digests"):
        (store.root / folder).mkdir()
        for name, age in (("old", 1000), ("new", 10)):
            (store.root / folder / name).write_text("")
            os.utime(store.root / folder / name, (time.time() - age,) * 2)
    with store.lock("held"):
        store.collect(older_than_s=500)
        assert sorted(p.stem for p in (store.root / "locks").iterdir()) == sorted([KEY, "held"])
    for folder in ("logs", "digests"):
        assert [p.name for p in (store.root / folder).iterdir()] == ["new"]


def test_collect_removes_old_folders_of_logs(store: Store) -> None:
    for name, age in (("old", 1000), ("under-way", 10)):
        folder = store.root / "logs" / f"sweep-{name}"
        folder.mkdir(parents=True)
        (folder / "child.log").write_text("")
        os.utime(folder / "child.log", (time.time() - age,) * 2)
        os.utime(folder, (time.time() - 1000,) * 2)
    store.collect(older_than_s=500)
    assert [p.name for p in (store.root / "logs").iterdir()] == ["sweep-under-way"]


def test_collect_removes_old_publications_and_locks_of_journals(store: Store) -> None:
    records, journals = store.root / "publishing", store.root / "journal"
    records.mkdir(parents=True)
    journals.mkdir()
    for name, age in (("old", 1000), ("new", 10), ("held", 1000)):
        (records / name).write_text("work")
        os.utime(records / name, (time.time() - age,) * 2)
    kept = ["busy.lock", "busy.telling", "kept.lock", "kept.sqlite", "kept.telling"]
    for name in (*kept, "sent.lock", "sent.telling"):
        (journals / name).write_text("")
    busy = FileLock(journals / "busy.lock"), FileLock(journals / "busy.telling")
    with store.lock(run_lock("held")), busy[0], busy[1]:
        store.collect(older_than_s=500)
    assert sorted(p.name for p in records.iterdir()) == ["held", "new"]
    assert sorted(p.name for p in journals.iterdir()) == kept


def test_lock_waits_no_longer_than_asked(store: Store) -> None:
    with store.lock(KEY), pytest.raises(TimeoutError), store.lock(KEY, timeout_s=0):
        pass


def test_scratch_goes_with_its_process_or_with_the_next(store: Store) -> None:
    left = store.root / "staging" / "ahead-1-2"
    other = store.root / "staging" / "else-1-2"
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "file").write_text("left by a process that was killed")
    with store.scratch("ahead") as first:
        assert not left.exists() and other.exists()
        first.mkdir()
        (first / "file").write_text("in use")
        with store.scratch("ahead") as second:
            assert second != first and (first / "file").exists()
        assert store.collect(0)[0] == 0 and (first / "file").exists()
    assert not first.exists()
