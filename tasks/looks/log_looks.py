"""Keep the pictures of a run, and the page that holds them, in MLflow."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.engine.errors import one_line
from tasks.engine.journal import ToldRun
from tasks.engine.store import Entry
from tasks.looks.page import PAGE, page
from tasks.looks.pictures import pictures
from tasks.register import error_rows

log = logging.getLogger("blockquant")

FOLDER = "looks"


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


def log_looks(run: ToldRun, looked: Looked, served: Mapping[str, Any]) -> None:
    """Draw what was measured and keep it; what cannot be drawn is no reason to fail.

    Args:
        run: the open run.
        looked: what is looked at.
        served: what came of serving the checkpoint.
    """
    try:
        drawn = pictures(error_rows(looked.blocks), looked.blocks, looked.decided, looked.count)
        text = page(looked.report, served, drawn, looked.sampled)
    except Exception as error:
        log.warning("no pictures of this run: %s", one_line(error))
        log.debug("not drawn", exc_info=error)
        return
    _keep(run, drawn, FOLDER)
    run.log_text(text, PAGE)


def _keep(run: ToldRun, files: Mapping[str, bytes], folder: str) -> None:
    """Keep contents as artifacts under their names."""
    with tempfile.TemporaryDirectory(prefix="blockquant-") as place:
        for name, content in files.items():
            path = Path(place) / name
            path.write_bytes(content)
            run.log_file(path, folder)
