"""A source checkpoint: a folder of safetensors files read tensor by tensor, never as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.engine.doubts import Doubt, settle
from tasks.engine.errors import InputError, NonFiniteWeightError
from tasks.engine.ranges import largest_magnitude, largest_of_all
from tasks.engine.store import sealed, unsealed, write_text
from tasks.engine.transfer import to_host

# a disk that is read ahead, or files in memory, are faster than one thread
DIGEST_THREADS = 4
# threads of a run digest different tensors of one file
_REMEMBERING = threading.Lock()
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, with its dtype and shape; no data."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint folder: its parsed ``config.json`` and a map of its tensors."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    digest_memo: Path | None = None
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """What people call the model: its hub id, or its folder's name."""
        return self.hub_id or self.path.name

    def read(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Read tensors by name, as stored (shape and dtype of the file), from mapped files.

        Raises:
            NonFiniteWeightError: a floating tensor holds NaN or Inf; names it.
        """
        read = self.read_unchecked(names, device)
        settle([self.doubt(read)])
        return read

    def read_unchecked(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Read tensors by name, whatever they hold."""
        wanted = sorted(names, key=lambda name: (self.tensors[name].file, name))
        read: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            opened: dict[str, Any] = {}
            for name in wanted:
                file = self.tensors[name].file
                if file not in opened:
                    opened[file] = stack.enter_context(
                        safe_open(self.path / file, framework="pt", device=device)
                    )
                read[name] = opened[file].get_tensor(name)
        return read

    def doubt(self, read: Mapping[str, Tensor]) -> Doubt:
        """Whether tensors that were read are finite, to be settled."""
        alike: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in read.items():
            if tensor.is_floating_point() and tensor.numel():
                alike[tensor.dtype][name] = tensor
        largest = [largest_of_all(list(named.values())).reshape(1) for named in alike.values()]
        # what is not well is looked for anew: nothing is kept for it
        return Doubt(torch.cat(largest or [torch.zeros(0)]), partial(self._damaged, list(read)))

    def _damaged(self, names: Iterable[str]) -> Exception:
        """What is to be said where one of some tensors is not finite."""
        for name, tensor in self.read_unchecked(names).items():
            numbers = tensor.is_floating_point() and tensor.numel()
            if numbers and not bool(largest_magnitude(tensor).isfinite()):
                return NonFiniteWeightError(
                    f"{self.path / self.tensors[name].file}: {name} holds NaN or Inf; the source "
                    "checkpoint is damaged, download it again"
                )
        return OSError(f"{self.path}: NaN or Inf was read, which its files do not hold")

    def digest(self, names: Iterable[str]) -> str:
        """Digest of the named tensors' names, dtypes, shapes and bytes, whatever the sharding.

        A tensor's own digest is remembered by its file's path, size, modification time and inode.
        """
        digests: dict[str, str] = {}
        for file, members in self._by_file(names).items():
            digests |= self._file_digests(file, members)
        whole = xxhash.xxh3_128()
        for name in sorted(digests):
            whole.update(f"{name}={digests[name]};".encode())
        return whole.hexdigest()

    def known_digest(self) -> str | None:
        """Digest of all tensors as far as it is remembered, None where it is not.

        It is taken where files are others than the store knows: that is rare, and must be told.
        """
        known = True
        for file, names in self._by_file(self.tensors).items():
            remembered = _recall(self.digest_memo, self._mark(file))
            known = known and set(names) <= set(remembered)
            if not remembered and _is_remembered(self.digest_memo, self._mark(file)):
                return self.digest(self.tensors)
        return self.digest(self.tensors) if known else None

    def files_mark(self) -> str:
        """Differs once a file of weights was written again, be it with the same bytes."""
        marks = [self._mark(file)[1:] for file in sorted(self._by_file(self.tensors))]
        return xxhash.xxh3_128_hexdigest(str(marks).encode())

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self.tensors[name].file, []).append(name)
        return by_file

    def _mark(self, file: str) -> list[Any]:
        path = (self.path / file).resolve()
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]

    def _file_digests(self, file: str, names: list[str]) -> dict[str, str]:
        mark = self._mark(file)
        remembered = _recall(self.digest_memo, mark)
        missing = [name for name in names if name not in remembered]
        if missing:
            with safe_open(mark[0], framework="pt") as opened:
                # mapped: they are read as they are digested
                mapped = [opened.get_tensor(name) for name in missing]
                with ThreadPoolExecutor(DIGEST_THREADS) as threads:
                    found = dict(zip(missing, threads.map(tensor_digest, mapped), strict=True))
            with _REMEMBERING:
                # another thread may have remembered others meanwhile
                _remember(self.digest_memo, mark, _recall(self.digest_memo, mark) | found)
            remembered |= found
        return {name: remembered[name] for name in names}


def tensor_digest(tensor: Tensor) -> str:
    """Digest (xxh3-128) of a tensor's dtype, shape and bytes."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = to_host(tensor).reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_source(path: Path, digest_memo: Path | None = None, hub_id: str | None = None) -> Source:
    """Open a checkpoint folder: read its config and the headers of its safetensors files.

    Raises:
        InputError: the folder or its files are missing, truncated, or not safetensors.
    """
    folder = one_spelling(path)
    if not folder.is_dir():
        if folder.is_file():
            raise InputError(f"model {path}: is a file; give the folder that it is in")
        raise InputError(f"model {path}: no such folder; give a folder with safetensors files")
    config = read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        tensors |= _read_header(folder, file)
    _check_index(folder, tensors)
    return Source(folder, config, used(tensors), digest_memo, hub_id)


def used(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Leave out the rotary tables of older checkpoints: they follow from the config."""
    return {n: info for n, info in tensors.items() if not n.endswith(".rotary_emb.inv_freq")}


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        InputError: missing, or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"model {folder}: no config.json; is this a transformers checkpoint?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object; copy it again")
    return config


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not a safetensors index ({error}); copy it again") from error


def _weight_files(folder: Path) -> list[str]:
    index = _read_index(folder)
    if index is not None:
        for file in sorted(set(index.values())):
            # a name with a folder in it could lead out of the checkpoint
            if Path(file).name != file or not (folder / file).is_file():
                raise InputError(
                    f"{folder / INDEX}: names the shard {file}, which is not in the folder; "
                    "download the missing shard"
                )
        return sorted(set(index.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
    hint = f" (found {pickles[0]}: pickles are never read)" if pickles else ""
    raise InputError(
        f"model {folder}: no {SINGLE} and no {INDEX}{hint}; save the model as safetensors"
    )


def _read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    try:
        with safe_open(path, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise InputError(f"{path}: {name} has the dtype {part.get_dtype()}, not known")
                found[name] = TensorInfo(file, dtype, tuple(part.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a whole safetensors file ({reason}); download it again"
        ) from error


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in (_read_index(folder) or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"{folder / INDEX}: says {name} is in {file}, which does not hold it; "
                "download the checkpoint again"
            )


def _memo_file(memo: Path, mark: list[Any]) -> Path:
    return memo / f"{xxhash.xxh3_64(str(mark[0]).encode()).hexdigest()}.json"


def _recall(memo: Path | None, mark: list[Any]) -> dict[str, str]:
    if memo is None:
        return {}
    try:
        record = unsealed(_memo_file(memo, mark).read_text(encoding="utf-8"))
        if record["mark"] == mark:
            return {str(k): str(v) for k, v in record["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _is_remembered(memo: Path | None, mark: list[Any]) -> bool:
    """Whether the file was known, be it as another."""
    return memo is not None and _memo_file(memo, mark).exists()


def _remember(memo: Path | None, mark: list[Any], digests: Mapping[str, str]) -> None:
    if memo is None:
        return
    memo.mkdir(parents=True, exist_ok=True)
    write_text(_memo_file(memo, mark), sealed({"mark": mark, "tensors": dict(digests)}))


def one_spelling(path: Path | str) -> Path:
    """A place as every name of it leads to: absolute, links on the way to it followed.

    Its own name stays, that of a link too.
    """
    given = Path(path).expanduser().absolute()
    return given.parent.resolve() / given.name


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that would hold ``path``, which need not exist yet."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
