"""A step of the flow: a Prefect task whose result is an entry of the store under a lineage key.

Prefect's cache holds the entry's small manifest only and is asked after the store: where the entry
is not whole, the task runs again whatever Prefect remembers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec

from prefect import Task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.serializers import JSONSerializer
from prefect.tasks import exponential_backoff
from safetensors import SafetensorError

from tasks.engine.job import Job
from tasks.engine.lineage import code_digest, lineage_key, quantizer_imports
from tasks.engine.store import Draft, Entry

Parameters = ParamSpec("Parameters")
RETRIES = 2
FIRST_DELAY_S = 1


@dataclass(frozen=True)
class Result:
    """A step's entry, and whether it was found instead of made."""

    entry: Entry
    cached: bool

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
    tags: tuple[str, ...]

    def key(self, job: Job, *args: Parameters.args, **kwargs: Parameters.kwargs) -> str:
        """Return the lineage key of the result."""
        return lineage_key(
            f"{self.name}/{self.version}",
            code_digest(*quantizer_imports(self.compute.__module__), *self.code),
            {"machine": job.fingerprint, **self.depends_on(job, *args, **kwargs)},
        )

    def __call__(self, job: Job, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Run the step under Prefect and return its entry."""
        key = self.key(job, *args, **kwargs)
        records = job.store.root / "prefect"
        records.mkdir(parents=True, exist_ok=True)
        whole = job.store.get(key) is not None
        _drop_damaged_record(records / key, {"key": key, "step": self.name})
        ran: list[bool] = []

        def body() -> dict[str, Any]:
            return self._make(key, ran, job, *args, **kwargs)

        block = kwargs.get("block")
        task = Task(
            body,
            name=self.name,
            task_run_name=self.name if block is None else f"{self.name}[block {block}]",
            tags=list(self.tags),
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key),
            refresh_cache=not whole,
            persist_result=True,
            result_storage=records,
            result_serializer="json",
            retries=RETRIES,
            retry_delay_seconds=exponential_backoff(FIRST_DELAY_S),
            retry_jitter_factor=0.5,
            retry_condition_fn=is_transient,
        )
        task()
        entry = job.store.get(key)
        if entry is None:
            raise OSError(f"store {job.store.root}: the entry {key} vanished while it was used")
        return Result(entry, cached=not ran)

    def _make(
        self,
        key: str,
        ran: list[bool],
        job: Job,
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> dict[str, Any]:
        with job.store.lock(key):
            # another process may have made it while this one waited
            if job.store.get(key) is None:
                ran.append(True)
                with job.store.draft(key) as draft:
                    value = self.compute(job, draft, *args, **kwargs)
                    job.store.commit(key, self.name, draft, value)
        return {"key": key, "step": self.name}


def step(
    *,
    depends_on: Callable[Concatenate[Job, Parameters], Mapping[str, Any]],
    version: int = 1,
    code: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
) -> Callable[[Callable[Concatenate[Job, Draft, Parameters], dict[str, Any]]], Step[Parameters]]:
    """Make a cached step of a function ``(job, draft, ...) -> small values``.

    Args:
        depends_on: of the same arguments without the draft: the parts of the recipe and the keys
            of the inputs that decide the result.
        code: modules of ``quantizers/`` that decide the result, beside those that the function's
            own module imports.
        version: to be raised when the step's own code changes what it computes.
        tags: Prefect tags.
    """

    def wrap(
        compute: Callable[Concatenate[Job, Draft, Parameters], dict[str, Any]],
    ) -> Step[Parameters]:
        return Step(compute.__name__, version, depends_on, compute, code, tags)

    return wrap


def action(
    function: Callable[Parameters, Any], *, name: str | None = None, retries: int = 0
) -> Callable[Parameters, Any]:
    """Make an uncached Prefect task of a function that acts on the world."""
    return Task(
        function,
        name=name or function.__name__,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=retries,
        retry_delay_seconds=exponential_backoff(FIRST_DELAY_S),
        retry_condition_fn=is_transient,
    )


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
