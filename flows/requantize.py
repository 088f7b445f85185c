"""The nightly flow: quantize again where the source, the recipe or blockquant's version is new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed

from flows.logs import heard_by_prefect
from flows.quantize_model import quantize_model
from tasks.changes import news, waiting
from tasks.check import check, request_of
from tasks.engine.errors import InputError
from tasks.engine.journal import send_kept
from tasks.engine.settings import settings


@flow(name="requantize", flow_run_name="requantize with {recipe}", validate_parameters=False)
def requantize(
    recipe: str,
    model: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    memory: int | None = None,
    store: str | None = None,
    keep_incompatible: bool = False,
    upload: str | None = None,
) -> Any:
    """Compare the published checkpoint's report with what would be made now; replace it if it must.

    The old checkpoint stays until the new one takes its place by one rename; where it is a
    champion, until the gate lets the new one be champion, which waits beside it.

    Args:
        recipe: a recipe file, or the name of one that ships.
        model: a checkpoint folder or a hub id; the recipe's ``model.path`` where it is not given.
        output: the folder to publish; the recipe's ``save.save_path`` where it is not given.
        overrides: ``key.path=value`` each, over the recipe.
        device: cpu, cuda or cuda:N.
        memory: bytes that may be used on the device.
        store: the folder of results; the user's own where it is not given.
        keep_incompatible: leave linears unquantized whose sizes do not fit, instead of refusing.
        upload: where to copy the published folder to, such as ``s3://bucket/folder``.

    Returns:
        What quantize_model returns; a state Completed named Skipped where nothing is new.

    Raises:
        InputError: the request cannot be worked with, or the recipe publishes nothing.
    """
    heard_by_prefect()
    parameters: dict[str, Any] = {
        "model": model,
        "output": output,
        "overrides": overrides,
        "device": device,
        "memory": memory,
        "store": store,
        "keep_incompatible": keep_incompatible,
        "overwrite": True,
        "upload": upload,
    }
    asked = request_of(recipe, **parameters)
    folder = asked.output
    if folder is None:
        raise InputError("save: nothing is published, so there is nothing to compare with")
    place = settings(Path(store) if store else None)
    # what another night could not tell, whether or not anything is new
    send_kept(place)
    # nothing may be new: what there is room for is checked where something is
    job, _ = check(asked, download=True, room=False)
    reason, found = news(job, folder), folder
    if reason is not None and (refused := waiting(job, folder)) is not None:
        reason, found = None, refused
    if reason is None:
        said = f"nothing to do: {found} is of this source, this recipe and this version"
        if found != folder:
            said += f"; the gate did not let it take the place of {folder}"
        get_run_logger().info(said)
        return Completed(name="Skipped", message=said, data={"checkpoint": str(found)})
    get_run_logger().info("quantizing into %s: %s", folder, reason)
    return quantize_model(recipe, **parameters | {"output": str(folder)})
