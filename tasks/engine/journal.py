"""What MLflow is to be told, kept on disk until its server has it.

Every message is written to a small database in the store first, and a thread of its own sends them
in order. So a server that is away or slow neither stops nor slows a quantization, and nothing is
lost: what is left is sent by the next run of the same work or by ``blockquant sync``. A message may
be sent twice, after a kill or a lost answer; each says the same when it is said again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.engine.disk import writing_to
from tasks.engine.errors import masked
from tasks.engine.registry import Offer, offer
from tasks.engine.settings import Settings
from tasks.engine.store import link_or_copy
from tasks.engine.tracking import Point, Run, open_run

log = logging.getLogger("blockquant")

# what was learned of a checkpoint that was offered to the registry
DECISION = "decision"
# a server that did not answer is not asked again for so long
AWAY_S = 30.0
# how long a run's end may wait for what is still to be sent
END_S = 20.0
# what a server says of messages that it will never take
_REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "MALFORMED_REQUEST",
)
# what one says that has no registry, or lets nobody write there: its runs are told all the same
_NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "PERMISSION_DENIED")


@dataclass(frozen=True)
class Message:
    """One thing to tell: the method of Run that tells it, and its arguments."""

    number: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """Messages about one run, in a database of their own; files among them lie beside it."""

    path: Path

    @property
    def files(self) -> Path:
        """The folder of files that are to be sent."""
        return self.path.with_suffix(".files")

    def lock(self) -> FileLock:
        """Who holds it sends; it dies with its process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_suffix(".lock"), thread_local=False)

    def add(self, kind: str, body: Mapping[str, Any]) -> None:
        """Write a message down."""
        with self._open() as database:
            database.execute(
                "INSERT INTO message (kind, body) VALUES (?, ?)", (kind, json.dumps(body))
            )

    def first(self) -> Message | None:
        """The message that is to be sent next."""
        with self._open() as database:
            row = database.execute(
                "SELECT number, kind, body FROM message ORDER BY number LIMIT 1"
            ).fetchone()
        return None if row is None else Message(row[0], row[1], json.loads(row[2]))

    def sent(self, message: Message, facts: Mapping[str, str] | None = None) -> None:
        """Strike a message out, and keep what was learned by sending it."""
        with self._open() as database:
            database.execute("DELETE FROM message WHERE number = ?", (message.number,))
            for name, value in (facts or {}).items():
                database.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    def count(self) -> int:
        """How many messages are left."""
        with self._open() as database:
            return int(database.execute("SELECT COUNT(*) FROM message").fetchone()[0])

    def fact(self, name: str) -> str | None:
        """What was learned before."""
        with self._open() as database:
            row = database.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
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

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            writing_to(self.path.parent),
            closing(sqlite3.connect(self.path, timeout=60)) as database,
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
    found = sorted((store / "journal").glob("*.sqlite"), key=lambda path: path.stat().st_mtime)
    return [Journal(path) for path in found]


def decision_in(journal: Journal) -> dict[str, Any] | None:
    """What the gate decided last of what a journal told, as ``registry.offer`` gives it."""
    found = journal.fact(DECISION)
    decided: dict[str, Any] | None = None if found is None else json.loads(found)
    return decided


class Away(Exception):
    """The server did not take a message for now."""


def deliver(journal: Journal, settings: Settings) -> None:
    """Send all messages in order; the caller holds the journal's lock.

    Raises:
        Away: one could not be sent; it and those after it are kept.
    """
    server = hashlib.sha256(masked(settings.tracking_uri).encode()).hexdigest()
    if journal.fact("server") not in (None, server):
        raise Away("it belongs to another tracking server; set MLFLOW_TRACKING_URI to that")
    while (message := journal.first()) is not None:
        try:
            facts = _send(journal, settings, message)
        except Exception as error:
            if not _is_refusal(error, message.kind):
                raise Away(f"{type(error).__name__}") from error
            log.warning("MLflow refuses a message (%s): %s", message.kind, _line(error))
            facts = {}
        journal.sent(message, facts | {"server": server})


def _send(journal: Journal, settings: Settings, message: Message) -> dict[str, str]:
    body = dict(message.body)
    if message.kind == "open":
        run = open_run(settings, **body)
        return {"run": run.id, "experiment": run.experiment}
    run = Run(settings.tracking_uri, journal.fact("run") or "", journal.fact("experiment") or "")
    if message.kind == "offer":
        return {DECISION: json.dumps(offer(run, settings, Offer(**body)))}
    if message.kind in ("log_points", "log_first_points", "log_changed_points"):
        body["points"] = [Point(**point) for point in body["points"]]
    if message.kind == "log_file":
        body["path"] = Path(body["path"])
    getattr(run, message.kind)(**body)
    return {}


def _is_refusal(error: Exception, kind: str) -> bool:
    code = getattr(error, "error_code", None)
    return code in _REFUSALS or (kind == "offer" and code in _NO_REGISTRY)


def _line(error: Exception) -> str:
    return masked(" ".join(str(error).split()))[:300]


@dataclass
class ToldRun:
    """A run of MLflow that is told of through its journal: nothing here waits for a server."""

    settings: Settings
    journal: Journal
    _sender: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _asked_again_at: float = 0.0
    away: str | None = None

    @property
    def id(self) -> str | None:
        """MLflow's id of the run, None as long as the server did not give one."""
        return self.journal.fact("run")

    def open(
        self,
        identity: str,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        even_finished: bool = False,
        parent: str | None = None,
    ) -> None:
        """Open the run, or go on in the one that was not finished; in that of ``parent``."""
        self._add(
            "open",
            identity=identity,
            name=name,
            parameters=dict(parameters),
            tags=dict(tags),
            even_finished=even_finished,
            parent=parent,
            time_ms=_now_ms(),
        )

    def log_points(self, points: Iterable[Point]) -> None:
        """Tell metric values."""
        self._add("log_points", points=[asdict(point) for point in points])

    def log_first_points(self, points: Iterable[Point]) -> None:
        """Tell metric values that stay as they were told first."""
        self._add("log_first_points", points=[asdict(point) for point in points])

    def log_changed_points(self, points: Iterable[Point]) -> None:
        """Tell metric values that may have been told before."""
        self._add("log_changed_points", points=[asdict(point) for point in points])

    def adopt(self, identity: str) -> None:
        """Tell that all runs that are parts of this work are nested in this one."""
        self._add("adopt", identity=identity)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tell tags."""
        self._add("set_tags", tags=dict(tags))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        self._add("log_file", path=str(self.journal.keep(path)), folder=folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Keep rows as a table."""
        self._add("log_table", rows=[dict(row) for row in rows], file=file)

    def log_text(self, text: str, file: str) -> None:
        """Keep a text as an artifact."""
        self._add("log_text", text=text, file=file)

    def log_json(self, content: Mapping[str, Any], file: str) -> None:
        """Keep values as a JSON artifact."""
        self._add("log_json", content=dict(content), file=file)

    def log_input(self, name: str, digest: str, source: Mapping[str, Any], context: str) -> None:
        """Tell of a data set."""
        self._add("log_input", name=name, digest=digest, source=dict(source), context=context)

    def offer(self, offered: Offer) -> None:
        """Tell of a checkpoint that is to be registered, and to be champion if the gate holds."""
        self._add("offer", **asdict(offered))

    @property
    def decision(self) -> dict[str, Any] | None:
        """What the gate decided, None as long as all is not sent: another decision may wait."""
        return None if self.journal.count() else decision_in(self.journal)

    def finish(self) -> None:
        """Tell that the run is done."""
        self._add("finish", time_ms=_now_ms())

    def fail(self, reason: str) -> None:
        """Tell that the run failed, and why."""
        self._add("fail", reason=reason, time_ms=_now_ms())

    def flush(self) -> int:
        """Send what can be sent within END_S; how many messages are left."""
        wait([self._sender.submit(self._deliver, True)], END_S)
        return self.journal.count()

    def close(self) -> int:
        """Flush, but for a server that was away a moment ago, and send nothing more."""
        left = self.journal.count() if self.away else self.flush()
        self._sender.shutdown(wait=False, cancel_futures=True)
        return left

    def _add(self, kind: str, **body: Any) -> None:
        self.journal.add(kind, body)
        self._sender.submit(self._deliver)

    def _deliver(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() < self._asked_again_at:
            return
        try:
            deliver(self.journal, self.settings)
            self.away = None
        except Away as error:
            self._asked_again_at = time.monotonic() + AWAY_S
            if self.away is None:
                log.warning(
                    "MLflow does not answer (%s): what it is to be told is kept, and sent later",
                    error,
                )
            self.away = str(error)


@contextmanager
def told_run(settings: Settings, identity: str) -> Iterator[ToldRun]:
    """A run to tell of; at the end, what is not sent yet is kept and said.

    Another process that sends of the same journal goes first for a while: ``blockquant sync``.
    """
    journal = Journal(settings.store / "journal" / f"{identity}.sqlite")
    with journal.lock().acquire(timeout=END_S):
        run = ToldRun(settings, journal)
        try:
            yield run
        finally:
            left = run.close()
            if left:
                log.warning("%d messages to MLflow are kept; send them with: blockquant sync", left)
            else:
                journal.drop()


def told(run: ToldRun) -> dict[str, Any]:
    """Where a run can be looked at; waits a little for what is still being sent.

    ``run`` is None, and ``left`` more than 0, as long as the server is away.
    """
    left = run.flush()
    return {"uri": masked(run.settings.tracking_uri), "run": run.id, "left": left}


@dataclass(frozen=True)
class Sent:
    """What came of sending a journal's rest.

    Attributes:
        reason: why not all is sent, None where it is.
        decision: what the gate decided, None where nothing was offered to it.
    """

    reason: str | None
    decision: dict[str, Any] | None = None


def synchronize(journal: Journal, settings: Settings) -> Sent:
    """Send what a journal has left."""
    try:
        with journal.lock().acquire(timeout=0):
            deliver(journal, settings)
            decision = decision_in(journal)
            journal.drop()
            return Sent(None, decision)
    except Timeout:
        return Sent("a run sends it right now")
    except Away as error:
        return Sent(str(error))


def _now_ms() -> int:
    return int(time.time() * 1000)
