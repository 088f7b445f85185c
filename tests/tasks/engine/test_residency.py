"""Where values wait changes neither them nor what is computed of them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantizers.statistics import InputStatistics, add_batch, empty_statistics
from tasks.engine.collect import block_statistics
from tasks.engine.job import Job
from tasks.engine.residency import Computed, OnHost, moved, one_by_one, ran_out_of_memory
from tasks.engine.streams import start_stream
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf, put_tokens, random_tokens

# what torch says where a device or the host has no room
HOST = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"


def flat(value: Any) -> list[Tensor]:
    """All tensors in a dataclass, in the order of its fields."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for field in fields(value) for tensor in flat(getattr(value, field.name))]
    return []


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(flat(ours), flat(theirs), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_values_wait_on_the_host_and_are_handed_out_on_the_device() -> None:
    # meta stands for a device that is not the host
    statistics = add_batch(empty_statistics(8), torch.randn(2, 3, 8))
    waiting = OnHost({"a": statistics}, "meta")
    assert list(waiting) == ["a"]
    given = waiting["a"]
    assert isinstance(given, InputStatistics)
    assert {tensor.device.type for tensor in flat(given)} == {"meta"}
    assert given.tokens == 6
    assert {tensor.device.type for tensor in flat(statistics)} == {"cpu"}
    back = moved(statistics, "cpu")
    assert all(
        torch.equal(one, other) for one, other in zip(flat(back), flat(statistics), strict=True)
    )


def test_values_are_computed_when_they_are_looked_at() -> None:
    looked: list[int] = []

    def look() -> int:
        looked.append(1)
        return len(looked)

    found = Computed({"a": look, "b": lambda: -1})
    assert list(found) == ["a", "b"] and len(found) == 2 and "a" in found
    assert not looked
    assert dict(found) == {"a": 1, "b": -1}
    assert found["a"] == 2, "nothing is kept"


def test_values_are_computed_one_after_the_other() -> None:
    order: list[str] = []

    def make(name: str) -> dict[str, Tensor]:
        order.append(name)
        return {name: torch.tensor(float(len(order)))}

    found = one_by_one({name: lambda name=name: make(name) for name in "ab"}, "cpu")
    assert order == ["a", "b"]
    assert {name: float(value) for name, value in found.items()} == {"a": 1.0, "b": 2.0}
    assert order == ["a", "b"]


def test_statistics_of_a_lean_job_are_the_same_bits(job_of: JobOf, tiny: Path) -> None:
    job = job_of(tiny, "awq_w4a16")
    stream = start_stream(job, put_tokens(job.store, random_tokens(3, 32)).key)
    roomy = dict(block_statistics(job, stream, 0))
    lean = job.leaner()
    assert lean is not None
    found = block_statistics(lean, stream, 0)
    assert isinstance(found, OnHost)
    assert set(found) == set(roomy)
    for name, statistics in roomy.items():
        assert len(flat(statistics)) > 5
        assert same(statistics, found[name])
    assert lean.leaner() is None


def test_a_lean_job_lets_go_of_what_was_kept(job_of: JobOf, tiny: Path) -> None:
    job = job_of(tiny, "rtn_w4a16")
    roomy = job.read_block(0)
    assert job.read_block(0)["mlp.up_proj.weight"] is roomy["mlp.up_proj.weight"]
    # as a block that was read ahead for a GPU
    job._loaded[1] = {}
    lean = job.leaner()
    assert lean is not None
    assert not job._loaded and not lean._loaded
    assert not job.memo.has("source block", f"{job.source.path} 0")
    waiting = lean.read_block(0)
    assert isinstance(waiting, OnHost)
    assert all(torch.equal(waiting[name], tensor) for name, tensor in roomy.items())


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError(HOST), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_faults(error: Exception, memory: bool) -> None:
    assert ran_out_of_memory(error) is memory


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_block_that_this_process_has_next_is_read_ahead(
    tmp_path: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(Job, "on_gpu", True)
    model = make_checkpoint(tmp_path / "model", blocks=4)
    job = job_of(model, "rtn_w4a16", stride=stride)
    job.read_block(0)
    job.loading.wait()
    assert list(job._loaded) == [stride]
    monkeypatch.setattr(type(job.source), "read", lambda *_: pytest.fail("it was read ahead"))
    found = job.read_block(stride)
    monkeypatch.undo()
    plan = job.plan.blocks[stride]
    for name, tensor in job.source.read(plan.full(plan.tensors), "cpu").items():
        assert torch.equal(found[name.removeprefix(plan.prefix)], tensor)
