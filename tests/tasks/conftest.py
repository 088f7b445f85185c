"""Jobs and results of steps without Prefect: what a step computes, put into the store by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.loading import load_recipe
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.source import open_source
from tasks.engine.store import Entry, Store
from tasks.engine.values import resolved
from tasks.engine.windows import TOKENS
from tasks.export import export
from tasks.outside import outside
from tasks.pack import pack
from tasks.quantize import Origin, quantize

JobOf = Callable[..., Job]


@pytest.fixture
def job_of(tmp_path: Path) -> JobOf:
    """Make the job of quantizing a model with a recipe and overrides; its memory starts empty."""

    def make(model: Path, recipe: str, *overrides: str, **more: Any) -> Job:
        # models of tests are smaller than what a kernel takes
        loaded = load_recipe(recipe, ["serving.check_kernels=false", *overrides])
        store = Store(tmp_path / "store")
        return Job(loaded, open_source(model), store, Memo(), "cpu", 1 << 30, **more)

    return make


def put_tokens(store: Store, tokens: Tensor, name: str = "text") -> Entry:
    """Put token windows into the store as a set of windows is."""
    key = hashlib.sha256(f"{name} {tokens.tolist()}".encode()).hexdigest()
    value = {"windows": len(tokens), "window": tokens.shape[1], "tokens": tokens.numel()}
    with store.lock(key), store.draft(key) as draft:
        draft.save_tensors(TOKENS, {"tokens": tokens.to(torch.int32)})
        return store.commit(key, "calibration_set", draft, value | {"name": name})


def make_entry(step: Any, job: Job, *args: Any, **kwargs: Any) -> Entry:
    """What calling a step gives, without a Prefect server."""
    key = step.key(job, *args, **kwargs)
    with job.store.lock(key), job.store.draft(key) as draft:
        value = resolved(step.compute(job, draft, *args, **kwargs))
        return job.store.commit(key, step.name, draft, value)


def export_of(job: Job) -> tuple[Path, dict[str, str]]:
    """Round to nearest and export; the folder in the store, and the digest of each linear's codes.

    The folder's files are the store's: copy it to change it.
    """
    origin = Origin(job.steps[-1], None, None)
    digests: dict[str, str] = {}
    packed = []
    for block in job.blocks:
        linears = make_entry(quantize, job, origin, block=block).value["linears"]
        prefix = job.plan.blocks[block].prefix
        digests |= {prefix + name: linear["digest"] for name, linear in linears.items()}
        packed.append(make_entry(pack, job, origin, block=block).key)
    beside = make_entry(outside, job).key
    return make_entry(export, job, tuple(packed), beside).folder, digests


def random_tokens(windows: int, length: int, vocabulary: int = 8192, seed: int = 0) -> Tensor:
    """Token ids int64 (windows, length)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (windows, length), generator=draw)
