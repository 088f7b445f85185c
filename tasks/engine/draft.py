"""An entry of the store while it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tasks.engine.transfer import to_host


@dataclass(frozen=True, eq=False)
class Saved:
    """What a draft was given for one file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None


class Draft:
    """An entry being written; files go into ``folder`` until the store commits it.

    Attributes:
        folder: where its files lie.
        saved: what was given for each file of tensors.
    """

    def __init__(self, folder: Path, held: bool = False) -> None:
        """Start a draft in an empty ``folder``; of a held one, tensors are not written yet."""
        self.folder = folder
        self.saved: dict[str, Saved] = {}
        self._held = held
        self._written: dict[str, Future[Path]] = {}

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write ``tensors`` as a safetensors file called ``name``."""
        self.saved[name] = Saved(tensors, metadata)
        if not self._held:
            _write(self.folder / name, self.saved[name])

    def write_ahead(
        self,
        place: Path,
        fetch: Callable[[Callable[[], Saved]], Future[Saved]],
        begin: Callable[[Callable[[], Path]], Future[Path]],
        written: Callable[[Path], object],
    ) -> tuple[Future[Saved], ...]:
        """Have what is held written to ``place`` by other threads; nothing is held from now on.

        Args:
            place: a folder of its own.
            fetch: begins a copy to the host.
            begin: begins work that waits for one.
            written: is called there with each file.

        Returns:
            What is done once the device need not keep it any longer.
        """

        def write(name: str, fetched: Future[Saved]) -> Path:
            place.mkdir(parents=True, exist_ok=True)
            _write(place / name, fetched.result())
            written(place / name)
            return place / name

        held, self.saved = self.saved, {}
        fetched = {name: fetch(partial(_fetched, saved)) for name, saved in held.items()}
        self._written = {name: begin(partial(write, name, copy)) for name, copy in fetched.items()}
        return tuple(fetched.values())

    def wait(self) -> dict[str, Path]:
        """Where the files lie that another thread writes, once all are there."""
        return {name: written.result() for name, written in self._written.items()}

    @classmethod
    def written(cls, place: Path, names: Iterable[str]) -> Draft:
        """A draft whose files another process has written to a folder."""
        draft = cls(place, held=True)
        for name in names:
            draft._written[name] = Future()
            draft._written[name].set_result(place / name)
        return draft

    def take(self, made: Draft) -> None:
        """Take the files that were written for another draft, which keeps them."""
        for name, path in made.wait().items():
            link_or_copy(path, self.folder / name)

    def drop(self) -> None:
        """Remove the files that another process has written."""
        for path in self.wait().values():
            path.unlink(missing_ok=True)

    def link(self, name: str, source: Path) -> Path:
        """Put ``source`` into the draft under ``name``: a hard link, a copy across disks."""
        return link_or_copy(source, self.folder / name)


def _fetched(saved: Saved) -> Saved:
    """The same in host memory."""
    return Saved({key: to_host(tensor) for key, tensor in saved.tensors.items()}, saved.metadata)


def _write(path: Path, saved: Saved) -> None:
    ordered = {key: to_host(saved.tensors[key]) for key in sorted(saved.tensors)}
    save_file(ordered, path, metadata=dict(saved.metadata) if saved.metadata else None)
    # safetensors makes files for their owner only; a server may run as somebody else
    path.chmod(0o644)


def link_or_copy(source: Path, target: Path) -> Path:
    """Hard-link ``source`` to ``target``, or copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
