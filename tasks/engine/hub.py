"""Models by hub id: what the hub says of one without its weights, and its download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine.disk import is_full, no_room
from tasks.engine.errors import InputError
from tasks.engine.source import DTYPES, Source, TensorInfo, open_source, read_config, used

# pickles and code are never fetched
_SMALL_FILES = ["*.json", "tokenizer*", "*.jinja", "merges.txt", "vocab*"]


def is_hub_id(named: str) -> bool:
    """Whether a model's name is a hub id: no such folder here, and one slash inside."""
    folder = Path(named).expanduser()
    local = folder.exists() or folder.is_absolute() or named.startswith((".", "~"))
    return not local and named.count("/") == 1


def look_up(hub_id: str, digest_memo: Path | None = None) -> Source:
    """Open a hub model: from the local cache where it is whole, else from its headers alone.

    Small files are downloaded, weights are not; :func:`fetched` downloads them.

    Raises:
        InputError: the hub cannot be reached, does not know the model, or has no safetensors.
        DiskFullError: the disk of the hub's cache has no room.
    """
    folder = _snapshot(hub_id, _SMALL_FILES)
    config = read_config(folder)
    try:
        return open_source(folder, digest_memo, hub_id)
    except InputError:
        # not all weights are here
        return Source(folder, config, _remote_tensors(hub_id), digest_memo, hub_id)


def fetched(source: Source, hub_id: str) -> Source:
    """Return the source with its weights on this machine.

    Raises:
        InputError: the download failed.
        DiskFullError: the disk of the hub's cache has no room.
    """
    if all((source.path / info.file).is_file() for info in source.tensors.values()):
        return source
    # not all safetensors there are: some repositories have a second copy, of another layout
    weights = sorted({info.file for info in source.tensors.values()})
    return open_source(_snapshot(hub_id, [*_SMALL_FILES, *weights]), source.digest_memo, hub_id)


def _remote_tensors(hub_id: str) -> dict[str, TensorInfo]:
    from huggingface_hub import HfApi

    try:
        files = HfApi().get_safetensors_metadata(hub_id).files_metadata
    except Exception as error:  # offline, gated, no safetensors
        raise _not_to_be_had(hub_id, error) from error
    tensors = {}
    for file, described in files.items():
        for name, info in described.tensors.items():
            dtype = DTYPES.get(info.dtype)
            if dtype is None:
                raise InputError(f"model {hub_id}: {name} has the dtype {info.dtype}, not known")
            tensors[name] = TensorInfo(file, dtype, tuple(info.shape))
    return used(tensors)


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, constants

    try:
        return Path(HfApi().snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: all mean that it is not to be had
        if is_full(error):
            raise no_room(constants.HF_HUB_CACHE) from error
        raise _not_to_be_had(hub_id, error) from error


def _not_to_be_had(hub_id: str, error: Any) -> InputError:
    return InputError(
        f"model {hub_id}: no such folder here, and the hub cannot give it "
        f"({type(error).__name__}); give a local folder of safetensors"
    )
