"""Publish a checkpoint: the export with its report and model card, as a whole."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.engine.disk import writing_to
from tasks.engine.draft import link_or_copy
from tasks.engine.errors import InputError
from tasks.engine.output import (
    content_of,
    held,
    replace_folder,
    replaced_folder,
    restore,
    staging_folder,
    waiting_folder,
)
from tasks.engine.publication import REPORT, begin
from tasks.engine.served_windows import WINDOWS, ServedWindows, windows_text
from tasks.engine.serving.server import launch_command
from tasks.engine.store import Entry, Store, checksum
from tasks.report import report_text

CARD = "README.md"


# where in an output the quantized checkpoint lies, and the model before rounding
QUANTIZED = "."
TRANSFORMED = "transformed_model"
# SGLang's own default
SGLANG_PORT = 30000


def publish(
    store: Store,
    identity: str,
    entries: Mapping[str, Entry],
    report: Mapping[str, Any],
    output: Path,
    overwrite: bool,
    windows: ServedWindows | None = None,
    waits: bool = False,
) -> str:
    """Put exports, by their folders in it, at ``output``: it is there as a whole, or not at all.

    Files are hard links to the store where both lie on one disk, else copies whose checksums are
    compared. ``windows`` are to be scored by a server. A folder that holds these very bytes
    already stays: a run that was killed after publishing, or another one of the same work, put it
    there. A checkpoint that ``waits`` replaces no other one: it lies beside the output, named
    after its content, until the gate lets it take that place.

    Returns:
        The folder where it lies.

    Raises:
        InputError: ``output`` appeared meanwhile, and it may not be overwritten.
        OSError: a copy is not what was exported.
        DiskFullError: the output's disk has no room.
    """
    output = output.absolute()
    with writing_to(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        with held(output):
            try:
                restore(output)
                _make_ready(entries, report, staging_folder(output), windows)
                return str(_put(store, identity, report, output, overwrite, waits))
            finally:
                shutil.rmtree(staging_folder(output), ignore_errors=True)


def _make_ready(
    entries: Mapping[str, Entry],
    report: Mapping[str, Any],
    staging: Path,
    windows: ServedWindows | None,
) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for folder, entry in entries.items():
        (staging / folder).mkdir(exist_ok=True)
        for name, stored in entry.files.items():
            copied = link_or_copy(entry.file(name), staging / folder / name)
            if not copied.samefile(entry.file(name)) and checksum(copied) != stored.checksum:
                raise OSError(f"{copied}: the copy differs from the export; is the disk full?")
    (staging / REPORT).write_text(report_text(report), encoding="utf-8")
    (staging / CARD).write_text(model_card(report), encoding="utf-8")
    if windows is not None:
        (staging / WINDOWS).write_text(windows_text(windows), encoding="utf-8")


def _put(
    store: Store,
    identity: str,
    report: Mapping[str, Any],
    output: Path,
    overwrite: bool,
    waits: bool,
) -> Path:
    """Put what is ready at the output, or beside it; the folder where it lies."""
    staging = staging_folder(output)
    if _same_files(staging, output):
        shutil.rmtree(replaced_folder(output), ignore_errors=True)
        return output
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists already; give another or use --overwrite")
    place = output
    if waits and output.exists():
        place = waiting_folder(output, content_of(identity, report_text(report)))
    begin(store.root, output, identity, str(report["source"]["digest"]))
    if not _same_files(staging, place):
        replace_folder(staging, place)
    return place


def _same_files(one: Path, other: Path) -> bool:
    names = _files(one)
    if not other.is_dir() or names != _files(other):
        return False
    return all(
        (one / name).samefile(other / name) or checksum(one / name) == checksum(other / name)
        for name in names
    )


def _files(folder: Path) -> set[Path]:
    """Paths of all files in a folder and its folders, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


def model_card(report: Mapping[str, Any]) -> str:
    """Write the model card of an export from its report."""
    metrics = report["metrics"]
    layout, how = "safetensors", "transformed, not quantized"
    if report["format"] is not None:
        layout, how = f"compressed-tensors, {report['format']}", f"quantized to {report['scheme']}"
    rows = [
        ("scheme", report["scheme"]),
        ("method", report["method"]),
        ("format", layout),
        ("source", f"{report['source']['name']} (digest {report['source']['digest']})"),
        ("size", f"{report['bytes'] / 1e6:.1f} MB"),
        ("calibrated on", report["calibration"] or "nothing"),
        ("evaluated on", report["evaluation"]),
        ("NLL, source", f"{metrics['reference_nll']:.4f}"),
        ("NLL, this model", f"{metrics['nll']:.4f} ({metrics['nll_increase']:+.4f})"),
        ("KL to the source", f"{metrics['kl']:.5f}"),
        ("top-1 agreement", f"{metrics['top1_agreement']:.2%}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    launch = launch_line(Path("."), report)
    serving = report["unserved"] if launch is None else f"Serve it:\n\n```\n{launch}\n```"
    return f"""---
tags: [blockquant, compressed-tensors, {report["scheme"].lower().replace(" ", "-")}]
---
# {report["source"]["name"]}, {how}

Made with blockquant {report["versions"]["blockquant"]}; the figures were
measured on this checkpoint after reopening it from disk, with activations quantized as SGLang does.

| | |
|---|---|
{table}

{serving}

`{REPORT}` holds the recipe, the versions, the metrics and the error of every linear. Where
`{WINDOWS}` lies beside it, `blockquant serve-check` asks a server to score the tokens in it.
"""


def launch_line(checkpoint: Path, report: Mapping[str, Any]) -> str | None:
    """The command that serves a published folder with SGLang on this machine, if that serves it."""
    if report["unserved"]:
        return None
    folder = checkpoint / (QUANTIZED if report["format"] else TRANSFORMED)
    parallel = int(report["tensor_parallel"])
    return shlex.join(launch_command("python", folder, SGLANG_PORT, parallel))
