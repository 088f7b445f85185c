"""Whether a store and an output can lie where they are asked for; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tasks.engine.errors import InputError
from tasks.engine.output import staging_folder
from tasks.engine.publication import REPORT
from tasks.engine.source import free_bytes

# bytes of a name and of a path, as Linux has them; below a path are files of ours
LONGEST_NAME = 255
LONGEST_PATH = 4095 - 2 * 256


def check_store(store: Path) -> None:
    """Check that a store can lie in a folder.

    Raises:
        InputError: its name is too long, or its folder cannot be written to.
    """
    _check_names("store", store, store)
    _check_writable("store", store, store)


def check_output(output: Path) -> None:
    """Check that a folder can be published at a place.

    Raises:
        InputError: it has no name or one too long, is a link or a file, or cannot be written.
    """
    if output.name in ("", ".."):
        raise InputError(f"--output {output}: has no name of its own; give a new folder's name")
    _check_names("output", output, staging_folder(output))
    if output.is_symlink():
        raise InputError(
            f"--output {output}: is a symbolic link; give the folder that it leads to, or another"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; give a folder's name")
    _check_writable("output", output, output.absolute().parent)


def check_apart(output: Path, model: Path) -> None:
    """Check that nothing is published inside of the model that is read.

    Raises:
        InputError: it would be.
    """
    if model.resolve() in output.resolve().parents:
        raise InputError(f"--output {output}: lies in the model's folder {model}; give another")


def check_replaced(output: Path, kept: Mapping[str, Path]) -> None:
    """Check that replacing an output takes away nothing else.

    Args:
        output: a folder; nothing is checked where it is not there.
        kept: what the run reads, by its name.

    Raises:
        InputError: it holds something of these, or is no export.
    """
    if not output.exists():
        return
    for what, place in kept.items():
        if place.resolve().is_relative_to(output.resolve()):
            raise InputError(
                f"--output {output}: replacing it would remove the {what} {place}; "
                "give another folder"
            )
    if any(output.iterdir()) and not (output / REPORT).is_file():
        raise InputError(
            f"--output {output}: is no export of blockquant (no {REPORT} in it) and is not "
            "replaced; give another folder, or empty it"
        )


def check_disk(option: str, place: Path, needed: int) -> None:
    """Check that a disk has room for so many bytes.

    Raises:
        InputError: it has not.
    """
    free = free_bytes(place)
    if free < needed:
        raise InputError(
            f"--{option} {place}: the export takes {needed / 1e6:.1f} MB, but "
            f"{free / 1e6:.1f} MB are free; free some or give another folder"
        )


def _check_names(option: str, place: Path, written: Path) -> None:
    """Refuse names that no disk takes; ``written`` is the longest that ``place`` leads to."""
    longest = max(len(os.fsencode(name)) for name in written.parts)
    if longest > LONGEST_NAME or len(os.fsencode(written)) > LONGEST_PATH:
        raise InputError(f"--{option} {place}: is too long a name; give a shorter one")


def _check_writable(option: str, place: Path, folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--{option} {place}: {folder} cannot be written to; give another folder")
