"""How the children of a sweep are to run: where, how many at once, with how much each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tasks.engine.errors import InputError

LOCAL, RAY = "local", "ray"


@dataclass(frozen=True)
class Runner:
    """Where and how many children run.

    Attributes:
        kind: ``local`` or ``ray``.
        address: a Ray cluster's; None for one that comes and goes with the sweep.
        cores: of a child; None for this machine's, shared among those that run at once.
        gpus: of a child, on Ray; None for one where the device is CUDA.
        at_once: how many children run at once; None for what `children_at_once` says.
        device: of the children.
    """

    kind: str = LOCAL
    address: str | None = None
    cores: int | None = None
    gpus: int | None = None
    at_once: int | None = None
    device: str = "cpu"

    @property
    def threads(self) -> int | None:
        """Threads of a child; None for those of this process."""
        if self.cores is not None:
            return self.cores
        at_once = self.children_at_once or 1
        if self.kind == LOCAL and at_once == 1:
            return None
        return max(1, torch.get_num_threads() // at_once)

    @property
    def children_at_once(self) -> int | None:
        """How many children run at once: by default one for each device of this machine.

        None is as many as Ray's cluster has room for.
        """
        if self.at_once is None and self.kind == LOCAL:
            return len(self.devices)
        return self.at_once

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices for children that run at once on this machine: every GPU, where none is named."""
        count = torch.cuda.device_count() if self.device == "cuda" and self.kind == LOCAL else 0
        return tuple(f"cuda:{number}" for number in range(count)) or (self.device,)

    @property
    def checked_on(self) -> str | None:
        """The device to check children on, where workers elsewhere may have what we lack."""
        away = self.kind == RAY and self.device.startswith("cuda")
        return "cpu" if away and not torch.cuda.is_available() else None

    @property
    def elsewhere(self) -> bool:
        """Whether what computes may be another processor than the one that checks."""
        return self.kind == RAY or len(self.devices) > 1

    @property
    def gpus_of_child(self) -> int:
        """GPUs that Ray sets aside for a child."""
        return int(self.device.startswith("cuda")) if self.gpus is None else self.gpus


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Have torch compute with so many threads, where they are said: they decide the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_runner(runner: Runner) -> None:
    """Check that children can be run so; nothing is started.

    Raises:
        InputError: they cannot.
    """
    if runner.kind not in (LOCAL, RAY):
        raise InputError(f"--runner {runner.kind}: not a runner; use {LOCAL} or {RAY}")
    for option, value in (("--cores", runner.cores), ("--at-once", runner.at_once)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: give 1 or more")
    if runner.kind == LOCAL:
        for option, given in (("--address", runner.address), ("--gpus", runner.gpus)):
            if given is not None:
                raise InputError(f"{option} {given}: is for --runner ray; give both or none")
        return
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("prefect_ray") is None:
        raise InputError("--runner ray: Ray is not installed: pip install 'blockquant[ray]'")
