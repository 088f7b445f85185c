"""Messages to MLflow on disk: a small database for each run's, until its server has them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.engine.disk import writing_to
from tasks.engine.draft import link_or_copy
from tasks.engine.errors import masked
from tasks.engine.settings import Settings

# facts of a journal: which server had its first message, and its address where that has no secret
SERVER = "server"
ADDRESS = "address"


@dataclass(frozen=True)
class Message:
    """One thing to tell: the method of Run that tells it, and its arguments."""

    number: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """Messages about one work, in a database of their own; files among them lie beside it."""

    path: Path

    @property
    def identity(self) -> str:
        """Of the work that it tells of."""
        return self.path.stem.partition("-")[0]

    @property
    def files(self) -> Path:
        """The folder of files that are to be sent."""
        return self.path.with_suffix(".files")

    def lock(self) -> FileLock:
        """Who holds it sends; it dies with its process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_suffix(".lock"), thread_local=False)

    def telling(self) -> FileLock:
        """Who holds it may add messages: as long as it is held the journal stays."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_suffix(".telling"), thread_local=False)

    def is_for(self, uri: str) -> bool:
        """Whether a tracking server may have the messages: no other had one of them yet."""
        return self.fact(SERVER) in (None, server_of(uri))

    def add_all(self, messages: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Write messages down together: all of them, or none."""
        rows = [(kind, json.dumps(body)) for kind, body in messages]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.executemany("INSERT INTO message (kind, body) VALUES (?, ?)", rows)

    def first(self) -> Message | None:
        """The message that is to be sent next."""
        row = self._row("SELECT number, kind, body FROM message ORDER BY number LIMIT 1")
        return None if row is None else Message(row[0], row[1], json.loads(row[2]))

    def sent(self, message: Message, facts: Mapping[str, str] | None = None) -> None:
        """Strike a message out, and keep what was learned by sending it."""
        with self._open() as database:
            database.execute("DELETE FROM message WHERE number = ?", (message.number,))
            for name, value in (facts or {}).items():
                database.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    def set_aside(self, message: Message, reason: str) -> Path:
        """Write a message that no server takes into a log, and strike it out."""
        kept = self.path.parent.parent / "logs" / f"mlflow-refused-{self.path.stem}.jsonl"
        line = {"run": self.fact("run"), **asdict(message), "reason": reason}
        kept.parent.mkdir(parents=True, exist_ok=True)
        with writing_to(kept.parent), kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sent(message)
        return kept

    def count(self) -> int:
        """How many messages are left."""
        row = self._row("SELECT COUNT(*) FROM message")
        return 0 if row is None else int(row[0])

    def fact(self, name: str) -> str | None:
        """What was learned before."""
        row = self._row("SELECT value FROM fact WHERE name = ?", name)
        return None if row is None else str(row[0])

    def keep(self, path: Path) -> Path:
        """Keep a file until it is sent, under its name."""
        folder = self.files / f"{time.time_ns():x}"
        with writing_to(self.path.parent):
            folder.mkdir(parents=True)
            return link_or_copy(path, folder / path.name)

    def drop(self) -> None:
        """Remove what is sent and ended."""
        shutil.rmtree(self.files, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def _row(self, query: str, *values: str) -> Any:
        """The first row of an answer; None too where there is no journal, which is not made."""
        try:
            with self._open("rw") as database:
                return database.execute(query, values).fetchone()
        except sqlite3.OperationalError:
            # it is dropped by who has sent all of it
            if self.path.exists():
                raise
            return None

    @contextmanager
    def _open(self, mode: str = "rwc") -> Iterator[sqlite3.Connection]:
        place = f"{self.path.absolute().as_uri()}?mode={mode}"
        with (
            writing_to(self.path.parent),
            closing(sqlite3.connect(place, timeout=60, uri=True)) as database,
            database,
        ):
            database.execute(
                "CREATE TABLE IF NOT EXISTS message "
                "(number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, body TEXT)"
            )
            database.execute("CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT)")
            yield database


def journals(store: Path) -> list[Journal]:
    """All journals of a store, the oldest first."""
    ages: dict[Path, float] = {}
    for path in (store / "journal").glob("*.sqlite"):
        # one that is sent meanwhile is gone
        with suppress(FileNotFoundError):
            ages[path] = path.stat().st_mtime
    return [Journal(path) for path in sorted(ages, key=ages.__getitem__)]


def journal_of(settings: Settings, identity: str) -> Journal:
    """The journal of a work for a tracking server: another address has another one."""
    folder = settings.store / "journal"
    first = Journal(folder / f"{identity}.sqlite")
    own = Journal(folder / f"{identity}-{server_of(settings.tracking_uri)[:12]}.sqlite")
    taken = first.path.exists() and not first.is_for(settings.tracking_uri)
    return own if taken or own.path.exists() else first


def server_of(uri: str) -> str:
    """What a tracking server is known by; its address may hold a password."""
    return hashlib.sha256(masked(uri).encode()).hexdigest()


def facts_of_server(uri: str) -> dict[str, str]:
    """Facts that say whose a journal is, and where to send it if that may be written down."""
    return {SERVER: server_of(uri)} | ({ADDRESS: uri} if masked(uri) == uri else {})
