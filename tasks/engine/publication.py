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

from tasks.engine.disk import writing_to
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.source import Source
from tasks.engine.store import Store, run_lock, write_text

# lies in every export: what it was made of and what was measured
REPORT = "blockquant.json"


def work_identity(job: Job, output: Path | None) -> str:
    """What makes two runs the same work: recipe, files of text, source, output, what is left out.

    The source counts by its path: to digest it first would hold up a run. Where that decides, its
    digest is compared too: by ``published_by``, and where a run of MLflow is gone on in.
    """
    save = [job.recipe.save.save_sgl, job.recipe.save.save_trans]
    recipe, source = job.recipe.canonical(), str(job.source.path)
    work = [recipe, source, str(output), job.plan.ignore, save, job.texts]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:32]


def source_state(source: Source) -> dict[str, str]:
    """What a source is known by where its digest may not be known yet: ``files``, ``digest``."""
    digest = source.known_digest()
    return {"files": source.files_mark()} | ({} if digest is None else {"digest": digest})


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


def begin(store: Path, output: Path, identity: str, source: str = "") -> None:
    """Note that the work ``identity``, of a source by its digest, is to publish at ``output``."""
    record = _record(store, output)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, f"{identity}\n{source}")


def begun(store: Path, output: Path) -> str | None:
    """Return the identity of the work that published at ``output`` and has not ended."""
    found = _recorded(store, output)
    return None if found is None else found[0]


def published_by(job: Job, output: Path) -> bool:
    """Whether this very work, of the source as it is now, published at ``output`` and not ended."""
    identity, source = _recorded(job.store.root, output) or (None, "")
    if identity != work_identity(job, output):
        return False
    try:
        return source in ("", job.source.digest(job.source.tensors))
    except OSError:
        # a hub's weights that are not here: publishing compares the bytes
        return True


def end(store: Path, output: Path | None, identity: str) -> None:
    """Note that the work is done: from now on its output is in the way of any other run."""
    if output is not None:
        _record(store, output).unlink(missing_ok=True)
    _work(store, identity).unlink(missing_ok=True)


def note_work(store: Path, identity: str) -> None:
    """Note that a work is under way, until it ends: what it made lies in the store meanwhile."""
    record = _work(store, identity)
    with writing_to(store):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()


def under_way(store: Path, identity: str) -> bool:
    """Whether a work was begun here and did not end, be it that nobody is at it now."""
    return _work(store, identity).exists()


def _work(store: Path, identity: str) -> Path:
    return store / "publishing" / f"work-{identity}"


def _record(store: Path, output: Path) -> Path:
    return store / "publishing" / publication_key(output)


def _recorded(store: Path, output: Path) -> tuple[str, str] | None:
    try:
        identity, _, source = _record(store, output).read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return identity, source
