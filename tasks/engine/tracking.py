"""One MLflow run per flow run, spoken to by its id and in batches."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.engine.errors import InputError, RunError, masked
from tasks.engine.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("blockquant")

EXPERIMENT = "blockquant"
IDENTITY_TAG = "blockquant.identity"
# the identity of the work that a run is a part of, and MLflow's own tag of it
PARENT_TAG = "blockquant.parent"
NESTED_TAG = "mlflow.parentRunId"
FAILURE_TAG = "failure"
# what a run was made of: the state of the source's files, and the digest of their tensors
FILES_TAG = "source.files"
DIGEST_TAG = "source.digest"
# what a server says of something that it does not have
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
LONGEST_PARAMETER = 6000
LARGEST_BATCH = 100
# MLflow's own but `file`: it refuses folders
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# what a tracking server does not take is kept and sent again: no use in waiting for it
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # it would print where a run is to be seen into what a command prints
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Point:
    """One metric value; ``time_ms`` stays the same when it is sent again, so nothing doubles."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class Run:
    """An open MLflow run."""

    uri: str
    id: str
    experiment: str

    def client(self) -> MlflowClient:
        """Return a client of the run's tracking server."""
        return _client(self.uri)

    def log_points(self, points: Iterable[Point]) -> None:
        """Send metric values in batches."""
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        for start in range(0, len(metrics), 1000):
            self.client().log_batch(self.id, metrics=metrics[start : start + 1000])

    def log_first_points(self, points: Iterable[Point]) -> None:
        """Send metric values of names that have none yet: times differ when a run goes on."""
        known = self.known_metrics()
        self.log_points(point for point in points if point.name not in known)

    def log_changed_points(self, points: Iterable[Point]) -> None:
        """Send metric values that differ from those told last: the same work may be done again."""
        known = self.client().get_run(self.id).data.metrics
        self.log_points(point for point in points if known.get(point.name) != point.value)

    def log_attempt(self, points: Iterable[Point]) -> None:
        """Send metric values of what may be tried again, all at the next step if one is other."""
        told = list(points)
        known = self.client().get_run(self.id).data.metrics
        if all(known.get(point.name) == point.value for point in told):
            return
        names = [point.name for point in told if point.name in known]
        before = [m.step for n in names for m in self.client().get_metric_history(self.id, n)]
        self.log_points(replace(point, step=max(before, default=-1) + 1) for point in told)

    def adopt(self, identity: str) -> None:
        """Nest the runs that were opened as parts of this work while its run was not known."""
        client = self.client()
        parts = client.search_runs([self.experiment], f"tags.`{PARENT_TAG}` = '{identity}'")
        for part in parts:
            if part.data.tags.get(NESTED_TAG) != self.id:
                client.set_tag(part.info.run_id, NESTED_TAG, self.id)

    def known_metrics(self) -> set[str]:
        """Names of the metrics that the run has already."""
        return set(self.client().get_run(self.id).data.metrics)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags in one call."""
        from mlflow.entities import RunTag

        self.client().log_batch(self.id, tags=[RunTag(k, v[:5000]) for k, v in tags.items()])

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        self.client().log_artifact(self.id, str(path), folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Keep rows as a table that the MLflow UI shows."""
        columns = list(rows[0]) if rows else []
        table = {
            "columns": columns,
            "data": [[row.get(column) for column in columns] for row in rows],
        }
        self.client().log_dict(self.id, table, file)

    def log_text(self, text: str, file: str) -> None:
        """Keep a text as an artifact."""
        self.client().log_text(self.id, text, file)

    def log_json(self, content: Mapping[str, Any], file: str) -> None:
        """Keep values as a JSON artifact."""
        self.client().log_dict(self.id, dict(content), file)

    def log_input(self, name: str, digest: str, source: Mapping[str, Any], context: str) -> None:
        """Record a data set as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        data = Dataset(name, digest[:36], "local", json.dumps(source))
        given = [DatasetInput(data, [InputTag("mlflow.data.context", context)])]
        try:
            self.client().log_inputs(self.id, datasets=given)
        except MlflowException:
            # another process was first with the same data set: MLflow finds it now
            self.client().log_inputs(self.id, datasets=given)

    def finish(self, time_ms: int | None = None) -> None:
        """Close the run as finished, by default now."""
        self.client().set_terminated(self.id, "FINISHED", time_ms)

    def fail(self, reason: str, time_ms: int | None = None) -> None:
        """Keep the run as failed, with its reason."""
        self.set_tags({FAILURE_TAG: reason})
        self.client().set_terminated(self.id, "FAILED", time_ms)


def check_uri(uri: str) -> None:
    """Check that MLflow can take ``uri`` for a tracking server or database; none is asked.

    Raises:
        InputError: it cannot.
    """
    dialect, separator, _ = uri.partition("://")
    if uri != "databricks" and not (separator and dialect.split("+")[0] in SCHEMES):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {masked(uri)} is no server or database that MLflow knows; write "
            "http://HOST:PORT or sqlite:////FOLDER/mlflow.db, or unset it"
        )


def open_run(
    settings: Settings,
    identity: str,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    even_finished: bool = False,
    parent: str | None = None,
    source: Mapping[str, str] | None = None,
    time_ms: int | None = None,
) -> Run:
    """Open the run of one quantization, or go on in the one that was not finished.

    Args:
        settings: where the tracking server or database is.
        identity: what makes two runs the same work: recipe, source and output.
        name: the run's name.
        parameters: the recipe's values, flat.
        tags: versions and digests.
        even_finished: go on in the newest run even if it was: the flow died right after.
        parent: identity of the work that this is a part of: the run is nested in that one's.
        source: the state of the source's ``files``, and its ``digest`` where that is known; a run
            of another source is not gone on in.
        time_ms: when it began, by default now.
    """
    from mlflow.entities import Param

    client = prepared_client(settings)
    experiment = _experiment(client, settings)
    found = client.search_runs(
        [experiment],
        f"tags.`{IDENTITY_TAG}` = '{identity}'"
        + (f" and tags.`{PARENT_TAG}` = '{parent}'" if parent else "")
        + ("" if even_finished else " and attributes.status != 'FINISHED'"),
        max_results=LARGEST_BATCH,
        order_by=["attributes.start_time DESC"],
    )
    unfinished = [run for run in found if _is_of(run.data.tags, source or {})]
    nested = {} if parent is None else _nested(client, experiment, parent)
    if unfinished:
        run_id = unfinished[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        if FAILURE_TAG in unfinished[0].data.tags:
            client.delete_tag(run_id, FAILURE_TAG)
    else:
        created = client.create_run(
            experiment, time_ms, tags={IDENTITY_TAG: identity, **nested}, run_name=name
        )
        run_id = created.info.run_id
    known = unfinished[0].data.params if unfinished else {}
    short = {name: _short(value) for name, value in sorted(parameters.items())}
    # a parameter cannot change: one that decides nothing may differ when a run goes on
    changed = {f"resumed.{n}": v for n, v in short.items() if n in known and known[n] != v}
    listed = [Param(name, value) for name, value in short.items() if name not in known]
    for start in range(0, len(listed), LARGEST_BATCH):
        client.log_batch(run_id, params=listed[start : start + LARGEST_BATCH])
    run = Run(settings.tracking_uri, run_id, experiment)
    of = {f"source.{name}": value for name, value in (source or {}).items()}
    run.set_tags({**tags, **changed, **nested, **of})
    return run


def _is_of(tags: Mapping[str, str], source: Mapping[str, str]) -> bool:
    """Whether a run was of the same files, or of others that hold the same."""
    files, digest = source.get("files"), source.get("digest")
    if files is None or tags.get(FILES_TAG) in (None, files):
        return True
    return digest is not None and tags.get(DIGEST_TAG) == digest


def _nested(client: MlflowClient, experiment: str, parent: str) -> dict[str, str]:
    """Tags of a part of the work ``parent``; without its run, as long as that is not known."""
    found = client.search_runs(
        [experiment],
        f"tags.`{IDENTITY_TAG}` = '{parent}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return {PARENT_TAG: parent, **({NESTED_TAG: found[0].info.run_id} if found else {})}


def existing_run(settings: Settings, run_id: str) -> Run:
    """Find a run by its id.

    Raises:
        InputError: the tracking server knows none of it.
        RunError: the tracking server does not answer.
    """
    from mlflow.exceptions import MlflowException

    check_uri(settings.tracking_uri)
    try:
        found = prepared_client(settings).get_run(run_id)
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code in UNKNOWN:
            raise InputError(
                f"--run {run_id}: the tracking server has no such run; give the id of quantize's "
                "run"
            ) from error
        raise RunError(
            f"MLflow at {masked(settings.tracking_uri)} does not answer ({type(error).__name__}); "
            "start it, or set MLFLOW_TRACKING_URI to where it is"
        ) from error
    return Run(settings.tracking_uri, run_id, str(found.info.experiment_id))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists of them: ``{"a": [{"b": 1}]}`` -> ``{"a.0.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:LONGEST_PARAMETER]


def _client(uri: str) -> MlflowClient:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # the journal says that a server is away
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # its migrations are no news to a person
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def answering(settings: Settings) -> Iterator[MlflowClient]:
    """A client for who only looks.

    Raises:
        RunError: the tracking server does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield prepared_client(settings)
    except MlflowException as error:
        raise RunError(
            f"MLflow at {masked(settings.tracking_uri)} cannot be asked "
            f"({(str(error).splitlines() or [''])[0][:80]}); start it, or set MLFLOW_TRACKING_URI"
        ) from error


def client_modules(uri: str) -> tuple[str, ...]:
    """Modules that a client imports, which takes seconds: of servers, and of databases."""
    remote = uri == "databricks" or uri.startswith(("http:", "https:"))
    return ("mlflow",) if remote else ("mlflow", "mlflow.store.tracking.sqlalchemy_store")


def prepared_client(settings: Settings) -> MlflowClient:
    """Return a client of the tracking server; a local database is created by one process only."""
    if not settings.tracking_uri.startswith("sqlite:///"):
        return _client(settings.tracking_uri)
    database = Path(settings.tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    # two processes that create the database at once corrupt it
    with FileLock(database.with_suffix(".lock")):
        if not database.exists():
            _create_database(database)
        client = _client(settings.tracking_uri)
        client.search_experiments(max_results=1)
    return client


def prepare_experiment(client: MlflowClient, settings: Settings) -> None:
    """Create the experiment where there is none, its artifacts in a folder of this machine."""
    if client.get_experiment_by_name(EXPERIMENT) is None:
        _experiment(client, settings)


def _create_database(database: Path) -> None:
    """Create and migrate the database under another name: killed half-way, it could not be used."""
    unfinished = database.with_name(f".{database.name}.new")
    for leftover in database.parent.glob(f"{unfinished.name}*"):
        leftover.unlink()
    _client(f"sqlite:///{unfinished}").search_experiments(max_results=1)
    os.replace(unfinished, database)


def restored(settings: Settings, experiment: str) -> bool:
    """Restore an experiment that was deleted in MLflow, with its runs; whether it was."""
    from mlflow.exceptions import MlflowException

    client = _client(settings.tracking_uri)
    try:
        if client.get_experiment(experiment).lifecycle_stage != "deleted":
            return False
    except MlflowException as error:
        if error.error_code in UNKNOWN:
            return False
        raise
    client.restore_experiment(experiment)
    log.warning("the experiment %s was deleted in MLflow: it is restored", EXPERIMENT)
    return True


def _experiment(client: MlflowClient, settings: Settings) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            restored(settings, str(found.experiment_id))
        return str(found.experiment_id)
    local = settings.tracking_uri.startswith("sqlite:")
    location = settings.artifact_root.as_uri() if local else None
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException:
        # another process was first
        created = client.get_experiment_by_name(EXPERIMENT)
        if created is None:
            raise
        return str(created.experiment_id)
