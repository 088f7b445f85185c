"""Keep the pictures of a run, and the page that holds them, in MLflow."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.engine.errors import one_line
from tasks.engine.journal import ToldRun
from tasks.engine.lineage import lineage_key
from tasks.engine.store import Entry, Store
from tasks.looks.page import PAGE, page
from tasks.looks.pictures import pictures
from tasks.register import error_rows

log = logging.getLogger("blockquant")

FOLDER = "looks"
# raised when pictures of the same numbers change
_VERSION = 2


@dataclass(frozen=True)
class Looked:
    """What is looked at.

    Attributes:
        report: what lies in the checkpoint as its report.
        blocks: the quantize entry of each block; none where nothing was quantized.
        decided: the entries of transforms, clips and learning, block after block.
        count: how many blocks the model has.
        sampled: what :mod:`tasks.sample_text` gave, None where none was asked for.
    """

    report: Mapping[str, Any]
    blocks: Sequence[Entry]
    decided: Sequence[Entry]
    count: int
    sampled: Mapping[str, Any] | None = None


def log_looks(store: Store, run: ToldRun, looked: Looked, served: Mapping[str, Any]) -> None:
    """Draw what was measured and keep it; what cannot be drawn is no reason to fail.

    Args:
        store: where pictures of the same numbers are found.
        run: the open run.
        looked: what is looked at.
        served: what came of serving the checkpoint.
    """
    try:
        drawn = drawn_once(store, looked)
        text = page(looked.report, served, drawn, looked.sampled)
    except Exception as error:
        log.warning("no pictures of this run: %s", one_line(error))
        log.debug("not drawn", exc_info=error)
        return
    _keep(run, drawn, FOLDER)
    run.log_text(text, PAGE)


def drawn_once(store: Store, looked: Looked) -> dict[str, bytes]:
    """All pictures by their file names: drawn, which takes seconds, or found in the store."""
    made_of = {
        "matplotlib": version("matplotlib"),
        "blocks": [entry.key for entry in looked.blocks],
        "decided": [entry.key for entry in looked.decided],
        "count": looked.count,
    }
    key = lineage_key(f"pictures/{_VERSION}", "", made_of)
    with store.lock(key):
        entry = store.get(key)
        if entry is None:
            rows = error_rows(looked.blocks)
            drawn = pictures(rows, looked.blocks, looked.decided, looked.count)
            with store.draft(key) as draft:
                for name, content in drawn.items():
                    (draft.folder / name).write_bytes(content)
                entry = store.commit(key, "pictures", draft, {})
    return {name: entry.file(name).read_bytes() for name in sorted(entry.files)}


def _keep(run: ToldRun, files: Mapping[str, bytes], folder: str) -> None:
    """Keep contents as artifacts under their names."""
    with tempfile.TemporaryDirectory(prefix="blockquant-") as place:
        for name, content in files.items():
            path = Path(place) / name
            path.write_bytes(content)
            run.log_file(path, folder)
