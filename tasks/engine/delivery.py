"""Sending what a journal holds, in order, by a thread that no server can hold up."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from filelock import Timeout

from tasks.engine.errors import masked, one_line
from tasks.engine.messages import Journal, Message, facts_of_server
from tasks.engine.offer import Offer
from tasks.engine.registry import NO_REGISTRY, offer
from tasks.engine.settings import Settings
from tasks.engine.tracking import EXPERIMENT, Point, Run, open_run, restored

log = logging.getLogger("blockquant")

# what was learned of a checkpoint that was offered to the registry
DECISION = "decision"
# whether MLflow takes the run for one that is under way
OPEN = "open"
_ENDS = ("finish", "fail")
# a server that did not answer is not asked again for so long
AWAY_S = 30.0
# how long a thread that has nothing in flight may take to end
_IDLE_S = 0.5
# what a server says of messages that it will never take
_REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "MALFORMED_REQUEST",
)
# the same by HTTP: malformed, too large, of no known type; not who may ask, what is busy or where
_REFUSED = (400, 411, 413, 414, 415, 422, 431)
# how MLflow's client says an answer of a proxy
_ANSWERED = re.compile(r"failed with error code (\d+) ")


class Away(Exception):
    """The server did not take a message for now."""


class Halt:
    """Once called, nothing more is sent or struck out: what is counted as kept then is kept."""

    def __init__(self) -> None:
        """Not called yet."""
        self.called = False
        self.lock = threading.Lock()

    def call(self) -> None:
        """Halt after the message that is on its way, which stays in the journal."""
        with self.lock:
            self.called = True


def deliver(journal: Journal, settings: Settings, halt: Halt | None = None) -> None:
    """Send all messages in order; the caller holds the journal's lock.

    Raises:
        Away: one could not be sent; it and those after it are kept.
    """
    if not journal.is_for(settings.tracking_uri):
        raise Away("it belongs to another tracking server; set MLFLOW_TRACKING_URI to that")
    halt = halt or Halt()
    while not halt.called and (message := journal.first()) is not None:
        refused, facts = None, {}
        try:
            facts = _send(journal, settings, message)
        except Exception as error:
            refused = _refusal(journal, settings, message, error)
            if refused is None:
                continue
        with halt.lock:
            if halt.called:
                return
            if refused is None:
                journal.sent(message, facts | facts_of_server(settings.tracking_uri))
            else:
                kept = journal.set_aside(message, refused)
                log.warning(
                    "MLflow refuses a message (%s), set aside in %s: %s",
                    message.kind,
                    kept,
                    refused,
                )


def _refusal(
    journal: Journal, settings: Settings, message: Message, error: Exception
) -> str | None:
    """Why a server never takes a message, None where it does now.

    Raises:
        Away: it may take it later.
    """
    if not is_refusal(error, message):
        raise Away(one_line(error)[:300]) from error
    line = masked(" ".join(str(error).split()))[:300]
    if message.kind == "open":
        # without its run nothing else can be told
        raise Away(
            f"it refuses to open the run: {line}; mend that in MLflow, such as by restoring the "
            f"experiment {EXPERIMENT} if it was deleted"
        ) from error
    try:
        if restored(settings, journal.fact("experiment") or ""):
            return None
    except Exception as unrestored:
        raise Away(one_line(unrestored)[:300]) from unrestored
    return line


def _send(journal: Journal, settings: Settings, message: Message) -> dict[str, str]:
    body = dict(message.body)
    if message.kind == "open":
        run = open_run(settings, **body)
        return {"run": run.id, "experiment": run.experiment, OPEN: "yes"}
    run = Run(settings.tracking_uri, journal.fact("run") or "", journal.fact("experiment") or "")
    if message.kind == "offer":
        return {DECISION: json.dumps(offer(run, settings, Offer(**body)))}
    if "points" in body:
        body["points"] = [Point(**point) for point in body["points"]]
    if message.kind == "log_file":
        body["path"] = Path(body["path"])
    getattr(run, message.kind)(**body)
    return {OPEN: "no"} if message.kind in _ENDS else {}


def is_refusal(error: Exception, message: Message) -> bool:
    """Whether the same message will be refused whenever it is sent."""
    code = getattr(error, "error_code", None)
    if code in _REFUSALS or (message.kind == "offer" and code in NO_REGISTRY):
        return True
    if message.kind == "log_file" and not Path(message.body["path"]).exists():
        return True
    return any(status in _REFUSED for status in _statuses(error))


def _statuses(error: BaseException | None) -> Iterator[int]:
    """HTTP statuses of an error and of those that led to it: of requests, boto and MLflow."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            yield int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        elif answer is not None:
            yield int(getattr(answer, "status_code", 0))
        if said := _ANSWERED.search(str(error)):
            yield int(said[1])
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class _Sending:
    """That all be sent now, waiting so long for another sender; None: when it is time for it."""

    wait_s: float | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Sender:
    """Sends a journal's messages beside the work; the process does not wait for it to end.

    It takes the journal's lock when nobody else sends, and gives it back when it sends no more.

    Attributes:
        away: why not all could be sent last, None where it could.
    """

    def __init__(self, settings: Settings, journal: Journal) -> None:
        """Nothing is done until it is asked."""
        self.away: str | None = None
        self._settings = settings
        self._journal = journal
        self._lock = journal.lock()
        self._halt = Halt()
        self._asked: SimpleQueue[_Sending | None] = SimpleQueue()
        # a daemon: Python waits for other threads at its end, whatever they wait for
        self._thread = threading.Thread(target=self._work, name="to MLflow", daemon=True)
        self._again_at = 0.0
        self._slow_until = 0.0

    def ask(self) -> None:
        """Send what is there, unless the server was away a moment ago."""
        self._put(_Sending())

    def flush(self, within_s: float) -> None:
        """Send what is there within so many seconds."""
        asked = _Sending(within_s)
        self._put(asked)
        if not asked.done.wait(within_s):
            self._slow_until = time.monotonic() + AWAY_S

    def stop(self, within_s: float) -> None:
        """Flush, but for a server that was away or slow a moment ago, and send nothing more."""
        if self.away is None and time.monotonic() >= self._slow_until:
            self.flush(within_s)
        self._halt.call()
        self._asked.put(None)
        if self._thread.ident is not None:
            self._thread.join(_IDLE_S)

    def _put(self, asked: _Sending) -> None:
        self._asked.put(asked)
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        try:
            while (asked := self._asked.get()) is not None and not self._halt.called:
                if asked.wait_s is not None or time.monotonic() >= self._again_at:
                    self._deliver(asked.wait_s or 0)
                asked.done.set()
        finally:
            self._lock.release()

    def _deliver(self, wait_s: float) -> None:
        try:
            if not self._lock.is_locked:
                self._lock.acquire(timeout=wait_s)
            deliver(self._journal, self._settings, self._halt)
            self.away = None
        except Timeout:
            # it may be done with the next message
            self.away = "another process sends it right now"
        except Exception as error:
            if self._halt.called:
                return
            self._again_at = time.monotonic() + AWAY_S
            reason = str(error) if isinstance(error, Away) else one_line(error)
            if self.away is None:
                log.warning(
                    "MLflow does not answer (%s): what it is to be told is kept, and sent later",
                    reason,
                )
            self.away = reason
