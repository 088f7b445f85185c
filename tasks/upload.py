"""Copy a published checkpoint to a store of objects, or any other place that fsspec reaches."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from tasks.engine.errors import InputError, RunError, one_line
from tasks.engine.store import checksum

# lies beside the files: which are there with which checksums, and whether they are all
MANIFEST = "blockquant-upload.json"


def check_upload(url: str | None) -> None:
    """Check that ``url`` names a place that can be read, with nothing but an upload of ours in it.

    Raises:
        InputError: it does not, or it holds a password.
    """
    if url is None:
        return
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"--upload {parts.scheme}://...@{parts.hostname}: an address with a password would be "
            "written into logs; give credentials by the environment, as AWS_ACCESS_KEY_ID"
        )
    if not parts.scheme or not (parts.netloc or parts.path.strip("/")):
        raise InputError(f"--upload {url}: no address; write s3://BUCKET/FOLDER")
    try:
        fsspec.get_filesystem_class(parts.scheme)
    except (ImportError, ValueError) as error:
        raise InputError(f"--upload {url}: {one_line(error)}") from error
    try:
        place, root = fsspec.core.url_to_fs(url.rstrip("/"))
        _there(place, root, url)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--upload {url}: cannot be read ({one_line(error)}); mend the address, or the "
            "credentials in the environment"
        ) from error


def upload(folder: Path, url: str) -> dict[str, Any]:
    """Bring all files of ``folder`` to ``url``; those that are there already stay.

    A manifest says after each file which are there, and last that they are all: killed half-way,
    the next upload goes on.

    Returns:
        ``url``, and how many files were ``sent`` and ``kept``.

    Raises:
        RunError: the place does not take them; the local checkpoint stays as it is.
    """
    try:
        return _upload(folder, url.rstrip("/"))
    except InputError:
        raise
    # each file system has errors of its own
    except Exception as error:
        raise RunError(
            f"--upload {url}: {one_line(error)}; the checkpoint is whole in {folder}, and the same "
            "command goes on with the upload"
        ) from error


def _upload(folder: Path, url: str) -> dict[str, Any]:
    place, root = fsspec.core.url_to_fs(url)
    there = _there(place, root, url)
    sent = kept = 0
    ours = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    old = sorted(set(there) - set(ours))
    if old:
        # with their names: those whose files stay, should it end here, are removed the next time
        _note(place, root, there, complete=False)
    for name in old:
        with suppress(FileNotFoundError):
            place.rm_file(f"{root}/{name}")
        del there[name]
    for name, path in sorted(ours.items()):
        digest, target = checksum(path), f"{root}/{name}"
        if there.get(name) == digest and _size(place, target) == path.stat().st_size:
            kept += 1
            continue
        there.pop(name, None)
        _note(place, root, there, complete=False)
        place.makedirs(target.rpartition("/")[0], exist_ok=True)
        place.put_file(str(path), target)
        place.invalidate_cache()
        if _size(place, target) != path.stat().st_size:
            raise OSError(f"{name} did not arrive whole")
        there[name], sent = digest, sent + 1
    _note(place, root, there, complete=True)
    return {"url": url, "sent": sent, "kept": kept}


def _there(place: Any, root: str, url: str) -> dict[str, str]:
    """Checksums of the files that earlier uploads brought."""
    place.invalidate_cache()
    try:
        with place.open(f"{root}/{MANIFEST}", "rb") as file:
            files = json.loads(file.read())["files"]
        # a name that leads elsewhere is not ours, and not removed
        return {n: str(d) for n, d in files.items() if ".." not in n.split("/") and n[:1] != "/"}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    if place.exists(root) and place.find(root):
        raise InputError(
            f"--upload {url}: holds files, but none of an upload ({MANIFEST}); give another place"
        )
    return {}


def _note(place: Any, root: str, files: dict[str, str], complete: bool) -> None:
    place.makedirs(root, exist_ok=True)
    record = {"complete": complete, "files": files}
    place.pipe_file(f"{root}/{MANIFEST}", json.dumps(record, indent=1, sort_keys=True).encode())


def _size(place: Any, path: str) -> int | None:
    try:
        return int(place.info(path)["size"])
    except FileNotFoundError:
        return None
