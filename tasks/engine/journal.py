"""What MLflow is to be told, kept on disk until its server has it.

Every message is written to a small database in the store first, and a thread of its own sends them
in order. So a server that is away or slow neither stops nor slows a quantization, and nothing is
lost: what is left is sent by the next run of the same work or by ``blockquant sync``. A message may
be sent twice, after a kill or a lost answer; each says the same when it is said again.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from filelock import Timeout

from tasks.engine.delivery import DECISION, OPEN, Away, Halt, Sender, deliver
from tasks.engine.errors import masked
from tasks.engine.messages import ADDRESS, Journal, journal_of, journals
from tasks.engine.offer import Offer
from tasks.engine.settings import Settings
from tasks.engine.tracking import Point

log = logging.getLogger("blockquant")

_Messages = list[tuple[str, dict[str, Any]]]

# how long a run's end may wait for what is still to be sent
END_S = 20.0
LOST = "its process ended and could not say why; the same work, run again, goes on"


def decision_in(journal: Journal) -> dict[str, Any] | None:
    """What the gate decided last of what a journal told, as ``registry.offer`` gives it."""
    found = journal.fact(DECISION)
    decided: dict[str, Any] | None = None if found is None else json.loads(found)
    return decided


@dataclass
class ToldRun:
    """A run of MLflow that is told of through its journal: nothing here waits for a server."""

    settings: Settings
    journal: Journal
    _sender: Sender = field(init=False, repr=False)
    # what is written down together later
    _collected: _Messages | None = field(default=None, init=False)
    _write: Callable[[_Messages], None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Have a sender of its own."""
        self._sender = Sender(self.settings, self.journal)
        self._write = self._write_now

    @property
    def id(self) -> str | None:
        """MLflow's id of the run, None as long as the server did not give one."""
        return self.journal.fact("run")

    @property
    def away(self) -> str | None:
        """Why not all could be sent last, None where it could."""
        return self._sender.away

    def open(
        self,
        identity: str,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        even_finished: bool = False,
        parent: str | None = None,
        source: Mapping[str, str] | None = None,
    ) -> None:
        """Open the run, or go on in the one that was not finished; in that of ``parent``.

        One that was of another ``source`` is not gone on in.
        """
        self._add(
            "open",
            identity=identity,
            name=name,
            parameters=dict(parameters),
            tags=dict(tags),
            even_finished=even_finished,
            parent=parent,
            source=None if source is None else dict(source),
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

    def log_attempt(self, points: Iterable[Point]) -> None:
        """Tell metric values of what may be tried again: other ones stand at the next step."""
        self._add("log_attempt", points=[asdict(point) for point in points])

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
        self._sender.flush(END_S)
        return self.journal.count()

    def close(self) -> int:
        """Send what can be sent, and nothing more from then on; how many messages are kept."""
        self._sender.stop(END_S)
        return self.journal.count()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is told meanwhile down at once, at the end: each time waits for the disk."""
        assert self._collected is None
        self._collected = []
        try:
            yield
        finally:
            collected, self._collected = self._collected, None
            self._write(collected)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Have a thread write down what is told meanwhile; at the end, or before, it is waited for.

        Raises:
            Exception: it could not be written.
        """
        written: deque[Future[None]] = deque()

        def later(messages: _Messages) -> None:
            while written and written[0].done():
                written.popleft().result()
            written.append(thread.submit(self._write_now, messages))

        with ThreadPoolExecutor(1, thread_name_prefix="blockquant-journal") as thread:
            self._write = later
            try:
                yield
            finally:
                self._write = self._write_now
        for one in written:
            one.result()

    def _add(self, kind: str, **body: Any) -> None:
        if self._collected is not None:
            self._collected.append((kind, body))
        else:
            self._write([(kind, body)])

    def _write_now(self, messages: _Messages) -> None:
        self.journal.add_all(messages)
        self._sender.ask()


@contextmanager
def told_run(settings: Settings, identity: str) -> Iterator[ToldRun]:
    """A run to tell of; at the end, what is not sent yet is kept and said.

    Another process may send of the same journal meanwhile: ``blockquant sync``.

    Raises:
        Timeout: another process tells of the same work.
    """
    journal = journal_of(settings, identity)
    with journal.telling().acquire(timeout=END_S):
        run = ToldRun(settings, journal)
        try:
            yield run
        finally:
            left = run.close()
            if left:
                log.warning("%d messages to MLflow are kept; send them with: blockquant sync", left)
            else:
                _drop(journal)


def _drop(journal: Journal) -> None:
    """Remove what is sent and ended, unless another process is at it: that one does."""
    try:
        with journal.lock().acquire(timeout=0):
            journal.drop()
    except Timeout:
        pass


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


def synchronize(journal: Journal, settings: Settings, halt: Halt | None = None) -> Sent:
    """Send what a journal has left, to the server that had the first of it.

    A run that was left open by a process that is gone has failed.
    """
    address = journal.fact(ADDRESS)
    elsewhere = address is not None and not journal.is_for(settings.tracking_uri)
    place = replace(settings, tracking_uri=address) if elsewhere and address else settings
    try:
        with journal.lock().acquire(timeout=0):
            _require_database(place.tracking_uri, elsewhere)
            deliver(journal, place, halt)
            decision = decision_in(journal)
            if halt is not None and halt.called:
                return Sent("there was no time for more")
            if not _end(journal, place, halt):
                return Sent("a run tells of it right now")
            return Sent(None, decision)
    except Timeout:
        return Sent("a run sends it right now")
    except Away as error:
        return Sent(f"it belongs to {address}: {error}" if elsewhere else str(error))


def _require_database(uri: str, elsewhere: bool) -> None:
    """Make no database anew where an earlier one was."""
    local = elsewhere and uri.startswith("sqlite:///")
    if local and not Path(uri.removeprefix("sqlite:///")).exists():
        raise Away("that database is gone")


def _end(journal: Journal, settings: Settings, halt: Halt | None) -> bool:
    """Remove a journal if all is sent and no run may tell more."""
    try:
        with journal.telling().acquire(timeout=0):
            if journal.fact(OPEN) == "yes" and not journal.count():
                journal.add_all([("fail", {"reason": LOST, "time_ms": _now_ms()})])
                deliver(journal, settings, halt)
            if journal.count():
                return False
            journal.drop()
            return True
    except Timeout:
        return not journal.count()


def send_kept(settings: Settings, within_s: float = END_S) -> None:
    """Send what earlier runs of a store could not, for so long at most; it never fails."""
    halt = Halt()
    sending = Thread(target=_send_all, args=(settings, halt), name="to MLflow", daemon=True)
    sending.start()
    sending.join(within_s)
    halt.call()


def _send_all(settings: Settings, halt: Halt) -> None:
    try:
        for journal in journals(settings.store):
            if halt.called:
                return
            reason = synchronize(journal, settings, halt).reason
            if reason is not None:
                log.warning("messages to MLflow are still kept: %s", reason)
    except Exception as error:
        log.warning("MLflow is not told what is left of earlier runs: %s", type(error).__name__)


def _now_ms() -> int:
    return int(time.time() * 1000)
