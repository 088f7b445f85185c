"""The weekly flow: what is old in the store goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed

from tasks.engine.errors import InputError
from tasks.engine.settings import settings
from tasks.engine.store import DAY_S, Store


@flow(name="tidy", validate_parameters=False)
def tidy(store: str | None = None, days: float = 30.0) -> Any:
    """Remove results that were not used for some days; what is published stays.

    Args:
        store: the folder of results; the user's own where it is not given.
        days: what was used since stays.

    Returns:
        A state Completed that says how many results were removed, and of how many bytes.

    Raises:
        InputError: days is negative.
    """
    if days < 0:
        raise InputError(f"days: {days} is negative; give 0 or more")
    place = settings(Path(store) if store else None)
    removed, freed = Store(place.store).collect(days * DAY_S)
    said = f"removed {removed} results, {freed / 1e6:.1f} MB, from {place.store}"
    get_run_logger().info(said)
    return Completed(message=said, data={"removed": removed, "bytes": freed})
