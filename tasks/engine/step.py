"""A step of the flow: a Prefect task whose result is an entry of the store under a lineage key.

Prefect's cache holds the entry's small manifest only and is asked after the store: where the entry
is not whole, the task runs again whatever Prefect remembers.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, cast

import torch
from safetensors import SafetensorError

from tasks.engine.disk import writing_to
from tasks.engine.doubts import Doubt, settle
from tasks.engine.draft import Draft
from tasks.engine.errors import one_line
from tasks.engine.job import Job, keep_result
from tasks.engine.lineage import code_digest, lineage_key, quantizer_imports
from tasks.engine.phases import AHEAD, IN_TASK, WAITED, WRITTEN
from tasks.engine.residency import DeviceMemoryError, ran_out_of_memory
from tasks.engine.store import Entry
from tasks.engine.transfer import reached, working_on
from tasks.engine.values import resolved

log = logging.getLogger("blockquant")

Parameters = ParamSpec("Parameters")
RETRIES = 2
FIRST_DELAY_S = 1


@dataclass(frozen=True, eq=False)
class Made:
    """What a step computed before its task writes it.

    Attributes:
        draft: holds its tensors.
        value: its small values, as the step gave them.
        ready: reached on the device once all of it is computed.
        begun: reached before.
        doubts: what is to be settled before it is told.
    """

    draft: Draft
    value: dict[str, Any]
    ready: torch.cuda.Event | None
    doubts: tuple[Doubt, ...] = ()
    begun: torch.cuda.Event | None = None


class Upcoming(Protocol):
    """What is computed by others than its task."""

    def take(self) -> Made:
        """Wait for it; after a failure, which is raised, it is made again."""

    def halt(self) -> None:
        """Have what follows computed with less on the device."""


@dataclass(frozen=True)
class Result:
    """A step's entry, whether it was found instead of made, and with how much on the device.

    Attributes:
        entry: in the store.
        cached: whether it was found.
        lean: the job that keeps less on the device, if the step had to be made with it.
    """

    entry: Entry
    cached: bool
    lean: Job | None = None

    @property
    def key(self) -> str:
        """The entry's lineage key."""
        return self.entry.key

    @property
    def value(self) -> dict[str, Any]:
        """The entry's small values."""
        return self.entry.value


@dataclass(frozen=True)
class Step(Generic[Parameters]):
    """One kind of cached step; calling it runs it as a Prefect task, or finds its result."""

    name: str
    version: int
    depends_on: Callable[Concatenate[Job, Parameters], Mapping[str, Any]]
    compute: Callable[Concatenate[Job, Draft, Parameters], dict[str, Any]]
    code: tuple[str, ...]
    kept: bool = False

    def label(self, block: int | None) -> str:
        """What a run of it is called: by its name, and its block if it has one."""
        return self.name if block is None else f"{self.name}[block {block}]"

    def key(self, job: Job, *args: Parameters.args, **kwargs: Parameters.kwargs) -> str:
        """Return the lineage key of the result."""
        return lineage_key(
            f"{self.name}/{self.version}",
            code_digest(*quantizer_imports(self.compute.__module__), *self.code),
            {"machine": job.fingerprint, **self.depends_on(job, *args, **kwargs)},
        )

    def __call__(self, job: Job, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Run the step under Prefect and return its entry."""
        return self.run(job, None, *args, **kwargs)

    def make(self, job: Job, key: str, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        """Compute the result and write nothing; the steps that come next find it in memory."""
        draft = Draft(job.store.root / "staging" / key, held=True)
        with job.phases.measured(AHEAD), working_on(job.device, self.name):
            begun = reached(job.device)
            value = self.compute(job, draft, *args, **kwargs)
            if self.kept:
                keep_result(job, key, draft)
            job.held[key] = tuple(sorted(draft.saved))
            return Made(draft, value, reached(job.device), job.doubts.take(), begun)

    def run(
        self,
        job: Job,
        ahead: Upcoming | None,
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        """Run the step under Prefect, which may note what others compute; return its entry.

        Where the device has no room, it is tried again with less kept there: the same bytes.

        Raises:
            DeviceMemoryError: there was no room for that either.
        """
        from prefect import Task
        from prefect.cache_policies import CacheKeyFnPolicy
        from prefect.tasks import exponential_backoff

        key = self.key(job, *args, **kwargs)
        records = job.store.root / "prefect"
        records.mkdir(parents=True, exist_ok=True)
        found = job.store.get(key)
        _drop_damaged_record(records / key, {"key": key, "step": self.name})
        ran: list[bool] = []
        jobs = [job]
        label = self.label(cast(int | None, kwargs.get("block")))

        def body() -> dict[str, Any]:
            with _out_of_memory(label, jobs, ahead):
                return self._make(key, ran, jobs[-1], ahead, *args, **kwargs)

        # no tags: for each, a task asks the server for a slot and waits, found or made
        task = Task(
            body,
            name=self.name,
            task_run_name=label,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key),
            refresh_cache=found is None,
            persist_result=True,
            result_storage=records,
            result_serializer="json",
            retries=RETRIES,
            retry_delay_seconds=exponential_backoff(FIRST_DELAY_S),
            retry_jitter_factor=0.5,
            retry_condition_fn=_passes_or_fits(jobs),
        )
        task()
        entry = job.store.get(key) if ran or found is None else found
        if entry is None:
            raise OSError(f"store {job.store.root}: the entry {key} vanished while it was used")
        return Result(entry, cached=not ran, lean=jobs[-1] if jobs[1:] else None)

    def _make(
        self,
        key: str,
        ran: list[bool],
        job: Job,
        ahead: Upcoming | None,
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> dict[str, Any]:
        with job.store.lock(key):
            # another process may have made it while this one waited
            if job.store.get(key) is None:
                ran.append(True)
                with writing_to(job.store.root), job.store.draft(key) as draft:
                    made = None
                    if ahead is None:
                        with job.phases.measured(IN_TASK), working_on(job.device, self.name):
                            value = resolved(self.compute(job, draft, *args, **kwargs))
                            settle(job.doubts.take())
                            if self.kept:
                                keep_result(job, key, draft)
                    else:
                        with job.phases.measured(WAITED):
                            made = ahead.take()
                        draft.take(made.draft)
                        value = made.value
                    with job.phases.measured(WRITTEN):
                        job.store.commit(key, self.name, draft, value)
                        if made is not None:
                            made.draft.drop()
        return {"key": key, "step": self.name}


def step(
    *,
    depends_on: Callable[Concatenate[Job, Parameters], Mapping[str, Any]],
    version: int = 1,
    code: tuple[str, ...] = (),
    kept: bool = False,
) -> Callable[[Callable[Concatenate[Job, Draft, Parameters], dict[str, Any]]], Step[Parameters]]:
    """Make a cached step of a function ``(job, draft, ...) -> small values``.

    Among the values may be tensors and work for later, see :mod:`tasks.engine.values`.

    Args:
        depends_on: of the same arguments without the draft: the parts of the recipe and the keys
            of the inputs that decide the result.
        code: modules of ``quantizers/`` that decide the result, beside those that the function's
            own module imports.
        version: to be raised when the step's own code changes what it computes.
        kept: whether the tensors of the newest result stay in memory for the steps that come next.
    """

    def wrap(
        compute: Callable[Concatenate[Job, Draft, Parameters], dict[str, Any]],
    ) -> Step[Parameters]:
        return Step(compute.__name__, version, depends_on, compute, code, kept)

    return wrap


def action(
    function: Callable[Parameters, Any], *, name: str | None = None
) -> Callable[Parameters, Any]:
    """Make an uncached Prefect task of a function that acts on the world."""
    from prefect import Task
    from prefect.cache_policies import NO_CACHE

    def act(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
        # no parameters: Prefect would look through all that they hold for what is still to come
        return Task(
            lambda: function(*args, **kwargs),
            name=name or function.__name__,
            cache_policy=NO_CACHE,
            persist_result=False,
        )()

    return act


@contextmanager
def _out_of_memory(label: str, jobs: list[Job], ahead: Upcoming | None) -> Iterator[None]:
    """Where the device has no room, let go of what is there and put a leaner job behind the last.

    Raises:
        DeviceMemoryError: in place of torch's error, whose frames would keep tensors alive.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        said = one_line(error)
        traceback.clear_frames(error.__traceback__)
    else:
        return
    if ahead is not None:
        ahead.halt()
    leaner = jobs[-1].leaner()
    if leaner is None:
        raise DeviceMemoryError(
            f"{label}: {jobs[-1].device} has too little memory for one block even with all else "
            f"on the host; use a device with more, or a shorter calib.seq_len ({said})"
        )
    jobs.append(leaner)
    log.warning("%s: %s is full; tried again with less kept on it", label, leaner.device)
    raise DeviceMemoryError(f"{label}: {leaner.device} is full ({said})")


def _passes_or_fits(jobs: list[Job]) -> Callable[[Any, Any, Any], bool]:
    """A failure that may pass by itself, or one of memory for which there is a leaner job."""
    tried = [len(jobs)]

    def condition(task: Any, task_run: Any, state: Any) -> bool:
        if len(jobs) > tried[0]:
            tried[0] = len(jobs)
            return True
        return is_transient(task, task_run, state)

    return condition


def is_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Say whether a failure may pass by itself: a disk's may, a wrong number does not."""
    del task, task_run
    try:
        state.result()
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
        return False
    except (OSError, SafetensorError):
        return True
    except BaseException:
        return False
    return False


def _drop_damaged_record(path: Path, result: Mapping[str, Any]) -> None:
    """Remove a Prefect record that is not the one we write: Prefect would fail, or run its code."""
    from prefect.serializers import JSONSerializer

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        serializer = JSONSerializer().model_dump(mode="json")
        ours = record["metadata"]["serializer"] == serializer
        if ours and json.loads(record["result"]) == result:
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    path.unlink(missing_ok=True)
