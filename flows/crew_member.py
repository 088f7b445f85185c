"""One process of a crew: ``python -m flows.crew_member SEAT FILE``, which a run starts.

It plans the same passes as the flow and computes what it is told to, where that is calibrated in
step with the others. The first one then writes the files of results and says what their values are;
the others write nothing but their share of the hidden states.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from configs.loading import parse_recipe
from flows.block_plan import Pass
from flows.crew_process import Failure
from flows.crew_start import TRACE, Seat, trace_of
from flows.loading import load
from flows.shift import END_S, Assignment, meet
from quantizers.statistics import add_batch, empty_statistics
from tasks.check import Request, check_device, checked_job
from tasks.engine.ahead import Call, Host, Plan
from tasks.engine.doubts import settle
from tasks.engine.errors import one_line
from tasks.engine.job import Job
from tasks.engine.rehearsal import fetch_first, rehearse
from tasks.engine.residency import forget_peaks, peaks, vacate
from tasks.engine.step import Made
from tasks.engine.streams import drop_boundaries, drop_embedding
from tasks.engine.team import Team
from tasks.engine.transfer import Leash, beside, idle_s, working_on
from tasks.engine.values import resolved

log = logging.getLogger("blockquant")

# steps that a device may be behind of what it was asked for
AHEAD_STEPS = 2
# the same where a block is begun, which takes the most memory: no more than the pass through the
# one before, so that what is exported of that one has left the device
AHEAD_OF_PASS = 1


def job_of(given: Assignment, rank: int, devices: Sequence[str]) -> Job:
    """The flow's job, on this process's device."""
    request = Request(
        parse_recipe(given.recipe, "the recipe"),
        given.model,
        None,
        Path(given.store),
        devices[rank],
        given.memory,
        given.keep_incompatible,
    )
    return replace(checked_job(request), team=Team(rank, len(devices), devices[rank]))


class Work:
    """What is computed of one pass."""

    def __init__(self, job: Job, passed: Pass) -> None:
        """Plan it; nothing is computed."""
        self.job = passed.job(job)
        self._plan = passed.plan(self.job)
        self._calls = self._plan.calls()
        self._call: Call | None = next(self._calls, None)
        self._calibrated = passed.calibrated
        self._block = 0

    @property
    def ahead(self) -> int:
        """How many steps the device may be behind as the next one is asked for."""
        passes = self._calibrated and self._call is not None and self._call.block != self._block
        return AHEAD_OF_PASS if passes else AHEAD_STEPS

    def make(self, calls: Sequence[tuple[str, str]], lean: bool) -> Made:
        """Compute the result of a call.

        Args:
            calls: what those are called that follow, and the keys of their results, which the flow
                knows; the last one's result is computed.
            lean: whether less is kept on the device.

        Raises:
            LookupError: the plan is another than the flow's.
        """
        if lean and not self.job.lean:
            self.job = self.job.leaner() or self.job
        made: Made | None = None
        for number, (label, key) in enumerate(calls, start=1):
            call = self._call
            if call is None or call.step.label(call.block) != label:
                raise LookupError(f"no {label} comes next in this pass: the processes disagree")
            if number == len(calls):
                if call.block:
                    # what was read for a first block that was found
                    drop_embedding(self.job)
                made = call.step.make(self.job, key, *call.args, block=call.block)
                self._block = call.block
            self._call = _sent(self._calls, key)
        assert made is not None
        return made

    def end(self) -> None:
        """Drop the hidden states of a pass that is through."""
        if self._call is None:
            for stream in self._plan.streams:
                drop_boundaries(self.job, stream)
            self.job.memo.clear()


def warm(device: str) -> None:
    """Have a GPU and its libraries ready, which no block waits for then."""
    if device == "cpu":
        return
    # what a device cannot do, or has no room for, is found where it is needed
    with suppress(Exception), torch.cuda.device(device):
        x = torch.zeros(1, 16, 128, dtype=torch.bfloat16, device=device)
        torch.mm(x[0], x[0].t(), out_dtype=torch.float32)
        scaled_dot_product_attention(x[None], x[None], x[None])
        add_batch(empty_statistics(128, x.device), x)


def prepared(job: Job, first: bool) -> None:
    """Have a GPU load what the job's steps ask of it, and what the first block takes if need be."""
    if not job.on_gpu:
        return
    for prepare in (rehearse, fetch_first) if first else (rehearse,):
        try:
            with working_on(job.device, prepare.__name__):
                prepare(job)
        except Exception as error:
            # it is met again where it is needed
            log.warning("%s on %s: %s", prepare.__name__, job.device, one_line(error))
            job.memo.clear()
        vacate(job.device)
        forget_peaks(job.device)


def _sent(calls: Plan, key: str) -> Call | None:
    """The call after one whose result has a key; None where there is none."""
    try:
        return calls.send(key)
    except StopIteration:
        return None


class Saying:
    """Says lines of JSON, each whole, from any thread."""

    def __init__(self, file: int) -> None:
        """Say them to an open file."""
        self._file = file
        self._lock = threading.Lock()

    def __call__(self, message: dict[str, Any]) -> None:
        """Say one."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._file, line) :]


class Forwarded(logging.Handler):
    """Has the flow log what this process would."""

    def __init__(self, say: Saying, rank: int) -> None:
        """Say it there, and which process says so."""
        super().__init__()
        self._say = say
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Say one record."""
        self._say({"log": record.getMessage(), "level": record.levelno, "rank": self._rank})


class Voice:
    """Says, in their order, that results are written, while the next are computed."""

    def __init__(self, job: Job, say: Saying) -> None:
        """Say it to the flow."""
        self._job = job
        self._say = say
        self._host = Host(job)
        self._last: torch.cuda.Event | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockquant-voice")

    def tell(self, key: str, made: Made, place: Path, seconds: float) -> tuple[Future[Any], ...]:
        """Have a result written below a folder and told; where it cannot be, this process ends.

        Returns:
            What is done once the device need keep nothing of it for the host.
        """
        begun, fetched = self._host.begun(made, place / key)
        self._thread.submit(_or_fail, self._say, partial(self._tell, key, begun, seconds))
        return fetched

    def _tell(self, key: str, made: Made, seconds: float) -> None:
        written = made.draft.wait().items()
        files = {name: self._job.store.describe(path).checksum for name, path in written}
        with beside(self._job.device, made.ready):
            settle(made.doubts)
            value = resolved(made.value)
        found = {"files": files, "value": value, "peaks": peaks(self._job.device)}
        found["idle"] = idle_s(self._last, made.begun)
        self._last = made.ready
        self._say({"made": key, "seconds": seconds, **found})

    def end(self) -> None:
        """Wait until all is told."""
        self._thread.shutdown()


def work(job: Job, told: Iterator[dict[str, Any]], say: Saying) -> None:
    """Do what is told."""
    current: Work | None = None
    place = Path()
    voice = Voice(job, say)
    leash = Leash()
    try:
        for message in told:
            if "end" in message:
                break
            if "pass" in message:
                if current is not None:
                    current.end()
                current, place = Work(job, Pass.of(message["pass"])), Path(message["place"])
            elif current is not None:
                leash.wait(current.ahead)
                start = time.perf_counter()
                made = current.make(message["make"], message["lean"])
                fetched: tuple[Future[Any], ...] = ()
                if current.job.team.rank == 0:
                    _, key = message["make"][-1]
                    fetched = voice.tell(key, made, place, time.perf_counter() - start)
                leash.ask(made.ready, fetched)
    finally:
        # a failure comes after what was made before it, which may have failed too
        voice.end()
    if current is not None:
        current.end()


def messages(folder: Path) -> Iterator[dict[str, Any]]:
    """What the flow's process says; once that is gone this one ends, whatever it waits for.

    Args:
        folder: of the crew's files, which nobody else removes then.
    """
    heard: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def read() -> None:
        # not through sys.stdin: its buffer is locked while it waits, which ends Python in an abort
        with os.fdopen(os.dup(0), "rb") as lines:
            message: dict[str, Any] = {}
            for line in lines:
                message = json.loads(line)
                heard.put(message)
        if "end" in message:
            time.sleep(END_S)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return iter(heard.get, None)


@contextmanager
def _traced(rank: int) -> Iterator[None]:
    """Have torch's profiler look on, where that is asked for."""
    if not (path := os.environ.get(TRACE)):
        yield
        return
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=every) as profiler:
        yield
    profiler.export_chrome_trace(str(trace_of(path, rank)))


def _or_fail(say: Saying, do: Callable[[], None]) -> None:
    """Do something; where it fails that is told, and this process ends."""
    try:
        do()
    except BaseException as error:
        # also what libraries raise that panic: nobody else would hear of it
        say({"failed": asdict(Failure.of(error))})
        os._exit(1)


def main() -> None:
    """Work until there is no more; a failure is told in a line."""
    # who asks the device waits no longer than this for those who write and tell
    sys.setswitchinterval(0.0005)
    given = json.loads(sys.argv[1])
    seat, say = Seat(**(given | {"devices": tuple(given["devices"])})), Saying(int(sys.argv[2]))
    told = messages(Path(seat.meeting).parent)

    def run() -> None:
        devices = [check_device(name) for name in seat.devices]
        with ThreadPoolExecutor(1) as beside_it:
            warmed = beside_it.submit(warm, devices[seat.rank])
            if seat.calibrated:
                # what a decoder is built of
                load("transformers.models.auto.modeling_auto")
                load("transformers.modeling_utils")
            warmed.result()
        meet(seat.rank, devices, seat.meeting)
        # the first exchange takes seconds
        Team(seat.rank, len(devices), devices[seat.rank]).summed_(
            torch.zeros(1, device=devices[seat.rank])
        )
        message = next(told)
        if "job" not in message:
            return
        assignment = Assignment(**message["job"])
        torch.set_num_threads(assignment.threads)
        job = job_of(assignment, seat.rank, devices)
        log.setLevel(logging.INFO)
        log.addHandler(Forwarded(say, seat.rank))
        # the flow is still at its texts
        _ = job.plan
        if assignment.calibrated:
            _ = job.decoder
        prepared(job, assignment.first)
        with _traced(seat.rank):
            work(job, told, say)

    _or_fail(say, run)
    # not by the way of interpreters: what others of us still exchange is no more waited for
    os._exit(0)


if __name__ == "__main__":
    main()
