"""Which tasks of lm-evaluation-harness can be scored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from fsspec.implementations.local import LocalFileSystem

from configs.data_schema import TaskScores
from tasks.engine.errors import InputError
from tasks.engine.store import checksum

MISSING = "lm-eval is not installed: pip install 'blockquant[lm-eval]'"
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
FILES = (".yml", ".yaml")


def is_installed() -> bool:
    """Whether lm-evaluation-harness is here."""
    return find_spec("lm_eval") is not None


def require_tasks(section: TaskScores) -> None:
    """Refuse tasks that there are none of, or that have text written.

    Raises:
        InputError: names the task.
    """
    if not section.tasks or not is_installed():
        return
    for task in section.tasks:
        if task.endswith(FILES):
            kind = _read(task).get("output_type", "generate_until")
        else:
            kind = _known_kind(task)
        if kind not in SCORED:
            raise InputError(
                f"eval.lm_eval.tasks: {task} has text written ({kind}); name tasks that score "
                f"given answers ({', '.join(SCORED)})"
            )


def _known_kind(task: str) -> str:
    """The output type of a task that lm-eval ships, or of the first of a group."""
    manager = task_manager(defaults=True)
    if task not in manager.all_tasks:
        raise InputError(f"eval.lm_eval.tasks: lm-eval has no task {task}; see: lm-eval ls tasks")
    config = manager._index[task].cfg or {}
    # a group says nothing of it, and its members are seen when they are loaded
    return str(config.get("output_type", SCORED[0]))


@cache
def task_manager(defaults: bool) -> Any:
    """What knows of tasks; those that lm-eval ships take seconds to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _read(file: str) -> dict[str, Any]:
    """A task described in a file; its tags run nothing."""
    try:
        described = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"eval.lm_eval.tasks: {file}: not readable as YAML ({said})") from error
    if not isinstance(described, dict) or "task" not in described:
        raise InputError(f"eval.lm_eval.tasks: {file}: describes no task; it needs the key task")
    return described


def task_of(task: str) -> str | dict[str, Any]:
    """A task as lm-eval takes it: its name, or what a file says of it."""
    return _read(task) if task.endswith(FILES) else task


def task_lineage(task: str) -> str | dict[str, Any]:
    """What scores depend on of a task: its name, or what a file says of it and the data it names.

    Data on this machine counts by its bytes, other data by its name.
    """
    described = task_of(task)
    if isinstance(described, str):
        return described
    return {"described": described, "data": _data_of(described)}


def _data_of(described: Mapping[str, Any]) -> list[list[str]]:
    """Names and checksums of files here that ``datasets`` would read: it looks in these folders."""
    asked = described.get("dataset_kwargs") or {}
    data_set, folder = str(described.get("dataset_path") or ""), str(asked.get("data_dir") or "")
    names = _names(asked.get("data_files"))
    folders = []
    # a format such as json: with a slash it is a data set of a hub, or a folder
    if "/" not in data_set and (names or folder):
        folders.append(Path(folder))
    if data_set and Path(data_set).is_dir():
        folders.append(Path(data_set, folder))
    return [one for place in folders for name in names or ["**"] for one in _files(place, name)]


def _names(files: Any) -> list[str]:
    """Names of files, however they are given: one, several, or those of each split."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, dict):
        files = list(files.values())
    return [name for part in files for name in _names(part)] if isinstance(files, list) else []


def _files(folder: Path, name: str) -> list[list[str]]:
    """The files of a name, which may be a pattern, each with its checksum; none of an address."""
    pattern = name.removeprefix("file://")
    if "://" in pattern:
        return []
    start = folder.expanduser().resolve()
    found = LocalFileSystem().glob(os.path.join(start, pattern))
    base = os.sep if os.path.isabs(pattern) else start
    return [
        [os.path.relpath(file, base), checksum(Path(file))]
        for file in sorted(found)
        if os.path.isfile(file)
    ]
