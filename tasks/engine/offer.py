"""A checkpoint that is offered to the registry, and the folder where it lies."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tasks.engine.output import holds, take_place

log = logging.getLogger("blockquant")


@dataclass(frozen=True)
class Offer:
    """A checkpoint that is to be registered, and to be champion if the gate holds.

    Attributes:
        model: name of the registered model.
        content: digest of what was published: the same again is the same version.
        identity: of the work that made it.
        location: the folder where it lies.
        facts: what else the version says of itself.
        figures: what was measured, as ``gate.Figures`` has it.
        limits: what is asked, as ``gate.Limits`` has it.
        place: the folder whose place it takes once it is champion, empty where it has its own.
        named: whether the recipe names the model, so that its champion may be of another source.
    """

    model: str
    content: str
    identity: str
    location: str
    facts: Mapping[str, str]
    figures: Mapping[str, Any]
    limits: Mapping[str, Any]
    place: str = ""
    named: bool = False

    @property
    def digest(self) -> str:
        """Differs where another decision may come of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def in_place(offered: Offer) -> Offer:
    """Let a champion that waited beside its output take that place, where it lies here."""
    if not offered.place:
        return offered
    try:
        moved = take_place(
            Path(offered.location), Path(offered.place), offered.identity, offered.content
        )
    except OSError as error:
        log.warning("%s stays where it is: %s", offered.location, error)
        return offered
    return replace(offered, location=offered.place, place="") if moved else offered


def lost(offered: Offer, here: bool = True) -> str | None:
    """Why a checkpoint is not where it is said to lie, None where it is, or on another machine.

    Args:
        offered: the checkpoint, after it took its place if it may.
        here: whether this machine has the folders under these names: then one whose parent is
            there and that is not there itself was removed. Else it may never have been here.
    """
    folders = [Path(name) for name in (offered.location, offered.place) if name]
    if any(holds(folder, offered.identity, offered.content) for folder in folders):
        return None
    for folder in folders:
        if folder.exists():
            return f"another checkpoint lies at {folder} by now"
    if here and folders[0].parent.is_dir():
        return f"{folders[0]} is no longer there"
    return None
