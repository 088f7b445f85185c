"""A store of results: one folder per lineage key, complete or absent.

An entry is written to a staging folder and renamed into place; its manifest, written last, names
every file with its size and xxh3-128 checksum. A damaged or half-written entry reads as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from tasks.engine.draft import Draft

MANIFEST = "manifest.json"
DAY_S = 86400


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and xxh3-128 checksum."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Entry:
    """A finished result: small values in ``value``, tensors and files in ``folder``."""

    key: str
    task: str
    folder: Path
    value: dict[str, Any]
    created: float
    files: dict[str, StoredFile] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return the path of one of the entry's files."""
        if name not in self.files:
            raise KeyError(f"{self.task} {self.key}: no file {name!r}")
        return self.folder / name

    @property
    def size(self) -> int:
        """Bytes of all files of the entry."""
        return sum(f.size for f in self.files.values())


class Store:
    """Entries by lineage key below ``root``."""

    def __init__(self, root: Path) -> None:
        """Use ``root``; nothing is created before the first write."""
        self.root = Path(root).absolute()
        # checksums that this process has taken, by what changes when a file does
        self._checksums: dict[tuple[int, ...], str] = {}
        self._taking: dict[tuple[int, ...], threading.Lock] = {}

    def __repr__(self) -> str:
        """Name the folder."""
        return f"Store({str(self.root)!r})"

    def folder(self, key: str) -> Path:
        """Return where the entry of ``key`` lies."""
        return self.root / "entries" / key[:2] / key

    def get(self, key: str) -> Entry | None:
        """Return the entry of ``key`` when it is whole, else None; damage is never an error.

        It counts as used then, whatever its age.
        """
        entry = self._seen(key)
        if entry is None or not all(self._is_whole(entry, name) for name in entry.files):
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.folder / MANIFEST)
        return entry

    def seems_whole(self, key: str) -> bool:
        """Whether the entry of ``key`` is there, its files of their sizes: their bytes not read."""
        entry = self._seen(key)
        return entry is not None and all(_has_its_size(entry, name) for name in entry.files)

    def _seen(self, key: str) -> Entry | None:
        entry = _read_manifest(self.folder(key))
        return entry if entry is not None and entry.key == key else None

    @contextlib.contextmanager
    def lock(self, key: str, timeout_s: float = -1) -> Iterator[None]:
        """Hold ``key`` for this process; the operating system frees it when the process dies.

        Args:
            key: what to hold.
            timeout_s: how long to wait for another process; for ever where it is negative.

        Raises:
            TimeoutError: another process still holds it.
        """
        with FileLock(self._lock_file(key), timeout=timeout_s):
            yield

    def is_locked(self, key: str) -> bool:
        """Whether somebody holds ``key`` now."""
        try:
            with self.lock(key, 0):
                return False
        except Timeout:
            return True

    @contextlib.contextmanager
    def scratch(self, kind: str) -> Iterator[Path]:
        """A folder of this process, made by who first writes to it, that goes once it is left.

        What processes that died have left of the same kind goes before.
        """
        staging = self.root / "staging"
        for left in staging.glob(f"{kind}-*"):
            with contextlib.suppress(Timeout), FileLock(self._lock_file(left.name), timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        place = staging / f"{kind}-{os.getpid()}-{time.monotonic_ns()}"
        # held before it is there
        with self.lock(place.name):
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def draft(self, key: str) -> Iterator[Draft]:
        """Give a fresh staging folder for ``key``; to be called with the key's lock held."""
        folder = self.root / "staging" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield Draft(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, key: str, task: str, draft: Draft, value: dict[str, Any]) -> Entry:
        """Publish ``draft`` under ``key`` by one rename and return the entry."""
        names = sorted(
            str(p.relative_to(draft.folder)) for p in draft.folder.rglob("*") if p.is_file()
        )
        files = {name: self.describe(draft.folder / name) for name in names}
        entry = Entry(key, task, self.folder(key), value, time.time(), files)
        record = asdict(entry) | {"folder": None}
        write_text(draft.folder / MANIFEST, sealed(record))
        self.remove(key)
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(draft.folder, entry.folder)
        return entry

    def remove(self, key: str) -> None:
        """Remove the entry of ``key`` if there is one: out of its place first, then deleted."""
        folder = self.folder(key)
        if not folder.exists():
            return
        trash = self.root / "trash" / f"{key}-{os.getpid()}-{time.monotonic_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        # another process may take it away first
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _is_whole(self, entry: Entry, name: str) -> bool:
        try:
            described = _has_its_size(entry, name) and self.describe(entry.folder / name)
            return described == entry.files[name]
        except OSError:
            return False

    def describe(self, path: Path) -> StoredFile:
        """Size and checksum of a file, which is read once: a hard link to it is the same file."""
        mark = mark_of(path)
        # another thread that asks meanwhile waits for this one
        with self._taking.setdefault(mark, threading.Lock()):
            if mark not in self._checksums:
                self._checksums[mark] = checksum(path)
        _, _, size, _ = mark
        return StoredFile(size, self._checksums[mark])

    def note(self, path: Path, found: str) -> None:
        """Remember the checksum of a file that another process of ours has taken."""
        self._checksums[mark_of(path)] = found

    def entries(self) -> list[Entry]:
        """List the entries that have a readable manifest, oldest first."""
        folders = sorted((self.root / "entries").glob("*/*"))
        found = [e for e in map(_read_manifest, folders) if e is not None]
        return sorted(found, key=lambda e: e.created)

    def collect(self, older_than_s: float) -> tuple[int, int]:
        """Remove what is older than some seconds, and what dead processes left behind.

        Remembered digests, logs and records of work that was not ended have an age, entries that of
        their last use; the locks of what is gone go too. What another process is making stays.

        Returns:
            How many entries were removed, and the bytes they held.
        """
        removed = freed = 0
        for entry in self.entries():
            if _age_s(entry.folder / MANIFEST) < older_than_s:
                continue
            with contextlib.suppress(Timeout), FileLock(self._lock_file(entry.key), timeout=0):
                self.remove(entry.key)
                removed, freed = removed + 1, freed + entry.size
        self._collect_leftovers()
        for place in [*(self.root / "digests").glob("*"), *(self.root / "logs").glob("*")]:
            if _age_s(place) >= older_than_s:
                _remove(place)
        for record in (self.root / "publishing").glob("*"):
            with contextlib.suppress(Timeout), FileLock(self._lock_file(run_lock(record.name)), 0):
                if _age_s(record) >= older_than_s:
                    record.unlink(missing_ok=True)
        self._collect_records({entry.key for entry in self.entries()})
        return removed, freed

    def _collect_leftovers(self) -> None:
        folders = (self.root / "entries").glob("*/*")
        broken = [folder for folder in folders if _read_manifest(folder) is None]
        leftovers = [*(self.root / "staging").glob("*"), *(self.root / "trash").glob("*")]
        for leftover in [*leftovers, *broken]:
            with contextlib.suppress(Timeout), FileLock(self._lock_file(leftover.name), timeout=0):
                # a broken entry may have been made again meanwhile
                if leftover in leftovers or _read_manifest(leftover) is None:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _collect_records(self, kept: set[str]) -> None:
        for record in (self.root / "prefect").glob("*"):
            if record.name not in kept:
                record.unlink(missing_ok=True)
        # of journals, those that have something to tell keep theirs
        journals = self.root / "journal"
        locks = [*journals.glob("*.lock"), *journals.glob("*.telling")]
        told = [lock for lock in locks if not _tells(lock)]
        for lock in [*(self.root / "locks").glob("*"), *told]:
            if lock.stem not in kept:
                # whoever waits for a lock whose file is gone takes a new one: filelock sees to it
                with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
                    lock.unlink(missing_ok=True)

    def _lock_file(self, key: str) -> Path:
        path = self.root / "locks" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def run_lock(record: str) -> str:
    """Name of the lock that a run holds which may publish what a record is of."""
    return f"{record}-run"


def _tells(lock: Path) -> bool:
    return lock.with_suffix(".sqlite").exists()


def _age_s(place: Path) -> float:
    """Seconds since a file changed, or the newest one in a folder; 0 for what is gone."""
    try:
        changed = [path.stat().st_mtime for path in [place, *place.rglob("*")]]
    except FileNotFoundError:
        return 0.0
    return time.time() - max(changed)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name and rename it: ``path`` is whole or absent."""
    # threads write the same one, too
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sealed(record: Mapping[str, Any]) -> str:
    """Return ``record`` as JSON with its own checksum: damage would still read as JSON."""
    return json.dumps({"checksum": _seal(record), "record": record}, indent=1, sort_keys=True)


def unsealed(text: str) -> dict[str, Any]:
    """Return the record of :func:`sealed`.

    Raises:
        ValueError: not a record, or not the one that was written.
    """
    parsed = json.loads(text)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("record"), dict):
        raise ValueError("not a sealed record")
    record: dict[str, Any] = parsed["record"]
    if parsed.get("checksum") != _seal(record):
        raise ValueError("the record was damaged")
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def checksum(path: Path) -> str:
    """Return the xxh3-128 checksum of a file's bytes."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file."""
    with safe_open(path, framework="pt", device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _has_its_size(entry: Entry, name: str) -> bool:
    try:
        return (entry.folder / name).stat().st_size == entry.files[name].size
    except OSError:
        return False


def mark_of(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_manifest(folder: Path) -> Entry | None:
    try:
        record = unsealed((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: StoredFile(**described) for name, described in record.pop("files").items()}
        return Entry(**(record | {"folder": folder, "files": files}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
