"""What commands share: their options, the two consoles, exit statuses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tasks.engine.errors import InputError

DONE, FAILED, BAD_INPUT = 0, 1, 2
# as shells and Typer say it
INTERRUPTED = 130
# fewer bytes than that without a unit are a number whose unit was forgotten
LEAST_BYTES = 10**6

out = Console()
err = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Folder or hub id.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Folder to publish.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value over the recipe; repeatable.")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Folder of results.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N; cuda:0,cuda:1.")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Budget on the device, such as 40GiB.")
]
KeepOption = Annotated[
    bool,
    typer.Option("--keep-incompatible", help="Leave linears unquantized whose sizes do not fit."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
UploadOption = Annotated[
    str | None, typer.Option("--upload", help="Copy the output to s3://BUCKET/FOLDER or the like.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ParallelOption = Annotated[
    int | None, typer.Option("--tensor-parallel", min=1, help="GPUs to spread the model over.")
]


def bytes_of(text: str | None) -> int | None:
    """Read a size such as ``40GiB``.

    Raises:
        InputError: it is none.
    """
    if text is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        asked = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        asked = 0
    if asked < 1:
        raise InputError(f"--memory {text}: not a size; write 40GiB or 500MB")
    if text.strip().isdecimal() and asked < LEAST_BYTES:
        raise InputError(f"--memory {text}: are bytes; write {text.strip()}GiB or another unit")
    return asked
