"""Publications that were begun and not ended.

A run that dies between the publishing rename and its last word to MLflow finds, when it is run
again, an output folder that is its own: this record says so. Any other folder is in the way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.store import Store, run_lock, write_text

# lies in every export: what it was made of and what was measured
REPORT = "blockquant.json"


def work_identity(job: Job, output: Path | None) -> str:
    """What makes two runs the same work: recipe, source, output, what is left out and published."""
    save = [job.recipe.save.save_sgl, job.recipe.save.save_trans]
    work = [job.recipe.canonical(), str(job.source.path), str(output), job.plan.ignore, save]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:32]


def publication_key(output: Path | str) -> str:
    """Name of the lock and of the record of publishing at ``output``."""
    return hashlib.sha256(f"publication {output}".encode()).hexdigest()


@contextmanager
def alone(store: Store, output: Path | str) -> Iterator[None]:
    """Be the only run of this store that works for ``output``, or for a name where there is none.

    Raises:
        RunError: another process does already.
    """
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(run_lock(publication_key(output)), timeout_s=0))
        except TimeoutError as error:
            raise RunError(
                f"--output {output}: another run works for it right now; wait until it ends, or "
                "give another folder"
            ) from error
        yield


def begin(store: Path, output: Path, identity: str) -> None:
    """Note that the work ``identity`` is about to publish at ``output``."""
    record = _record(store, output)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, identity)


def begun(store: Path, output: Path) -> str | None:
    """Return the identity of the work that published at ``output`` and has not ended."""
    try:
        return _record(store, output).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def end(store: Path, output: Path) -> None:
    """Note that the work is done: from now on its output is in the way of any other run."""
    _record(store, output).unlink(missing_ok=True)


def _record(store: Path, output: Path) -> Path:
    return store / "publishing" / publication_key(output)
