"""Hidden states between blocks: as transformers computes them, however they were come by."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tasks.advance import advance
from tasks.engine import decoder
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.store import Entry
from tasks.engine.streams import (
    Stream,
    boundary_key,
    drop_boundaries,
    hidden_states,
    keep_boundary,
    require_finite,
)
from tasks.engine.team import Team
from tasks.pack import pack
from tasks.quantize import Origin
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens

BLOCKS = 5
GROUPS = "quant.weight.group_size=32"
TOKENS = random_tokens(5, 24, 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "model"
    return make_checkpoint(
        folder, blocks=BLOCKS, hidden=32, intermediate=64, vocabulary=256, dtype=torch.float32
    )


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # five windows pass in batches of two, two and one
    monkeypatch.setitem(decoder.MICRO_BATCH_TOKENS, "cpu", 48)


class Course:
    """A job whose stream is taken from block to block, and what it was after each."""

    def __init__(self, job: Job, quantized: bool) -> None:
        self.job = job
        self.streams = [Stream(put_tokens(job.store, TOKENS).key)]
        self.packed: list[Entry] = []
        self.states = [hidden_states(job, self.streams[0])]
        origin = Origin(job.steps[-1], None, None)
        for block in range(BLOCKS):
            stream = self.streams[-1]
            if quantized:
                self.packed.append(make_entry(pack, job, origin, block=block))
            through = self.packed[-1].key if quantized else None
            passed = make_entry(advance, job, stream, through, block=block)
            self.streams.append(stream.after(passed.key, through))
            self.states.append(hidden_states(job, self.streams[-1]))
            mean = self.states[-1].square().mean()
            assert passed.value == {"mean_square": pytest.approx(float(mean), rel=1e-6)}

    def anew(self) -> Job:
        """The job in another process: the same store, no memory."""
        return replace(self.job, memo=Memo())

    def on_disk(self) -> list[int]:
        """Numbers of the blocks whose boundaries are on disk."""
        found = [self.job.store.get(boundary_key(stream)) for stream in self.streams]
        return [number for number, entry in enumerate(found) if entry is not None]


@pytest.fixture(params=[False, True], ids=["through source blocks", "through int8 blocks"])
def course(request: pytest.FixtureRequest, model: Path, job_of: JobOf) -> Course:
    return Course(job_of(model, "rtn_w8a8"), request.param)


def int8_per_token(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What formats.md says of int8 activations, in plain words."""
    x = inputs[0]
    absmax = x.abs().amax(dim=-1, keepdim=True)
    scale, steps = absmax / 127, x * (127 / absmax)
    codes = torch.where(steps >= 0, (steps + 0.5).floor(), (steps - 0.5).ceil())
    return (codes.clamp(-128, 127) * scale,)


@torch.no_grad()
def transformers_states(model: Path, packed: list[Entry]) -> list[Tensor]:
    """Hidden states of the whole model with the weights of the packed blocks."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for entry in packed:
        tensors = load_file(entry.file("block.safetensors"))
        for name in [name for name in tensors if name.endswith(".weight")]:
            weight, scale = tensors[name].float(), tensors.get(f"{name}_scale")
            assert (scale is not None) == name.endswith("_proj.weight")
            if scale is not None:
                linear = whole.get_submodule(name.removesuffix(".weight"))
                linear.register_forward_pre_hook(int8_per_token)
                weight = weight * scale
            whole.get_parameter(name).copy_(weight)
    # of each micro-batch the blocks' outputs, the last one's not yet normed
    passed: list[list[Tensor]] = [[] for _ in range(BLOCKS + 1)]
    for number, layer in enumerate(whole.model.layers):
        outputs = passed[number + 1]
        layer.register_forward_hook(lambda _, __, output, kept=outputs: kept.append(output))
    for batch in TOKENS.split(2):
        passed[0].append(whole.model.embed_tokens(batch))
        whole(batch)
    return [torch.cat(parts) for parts in passed]


def test_states_are_those_of_transformers(course: Course, model: Path) -> None:
    wanted = transformers_states(model, course.packed)
    for found, theirs in zip(course.states, wanted, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def test_states_made_again_are_the_same_to_the_bit(course: Course) -> None:
    # before the newest boundaries: from the tokens; after them: from disk
    for stream, kept in zip(course.streams, course.states, strict=True):
        assert torch.equal(hidden_states(course.anew(), stream), kept)
    drop_boundaries(course.job, course.streams[-1])
    assert torch.equal(hidden_states(course.anew(), course.streams[-1]), course.states[-1])


def test_two_boundaries_are_kept(course: Course) -> None:
    assert course.on_disk() == [BLOCKS - 1, BLOCKS]
    drop_boundaries(course.job, course.streams[-1])
    assert course.on_disk() == []
    assert {entry.task for entry in course.job.store.entries()} <= {
        *("calibration_set", "advance", "pack")
    }


def watch(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note which blocks are run."""
    ran: list[int] = []
    run_block = decoder.run_block
    numbers = {id(block): number for number, block in enumerate(job.decoder.blocks)}

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(numbers[id(block)])
        return run_block(block, *args, **kwargs)

    monkeypatch.setattr("tasks.engine.streams.run_block", run)
    return ran


def test_the_newest_boundary_is_gone_on_from(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, last = course.job.store, course.streams[-1]
    store.remove(boundary_key(last))
    # nothing before the boundary is needed any more
    store.remove(course.streams[0].tokens)
    job = course.anew()
    ran = watch(job, monkeypatch)
    assert torch.equal(hidden_states(job, last), course.states[-1])
    assert ran == [BLOCKS - 1] * 3, "the last block, once per micro-batch"
    # it is kept in memory now
    assert torch.equal(hidden_states(job, last), course.states[-1])
    assert len(ran) == 3


def test_a_damaged_boundary_is_not_read(course: Course) -> None:
    for stream in course.streams[-2:]:
        entry = course.job.store.get(boundary_key(stream))
        assert entry is not None
        content = bytearray(entry.file("hidden.safetensors").read_bytes())
        content[-1] ^= 1
        entry.file("hidden.safetensors").write_bytes(content)
    assert course.on_disk() == []
    assert torch.equal(hidden_states(course.anew(), course.streams[-1]), course.states[-1])


@pytest.mark.parametrize("lost", ["tokens", "packed"])
def test_what_is_gone_from_the_store_is_named(model: Path, job_of: JobOf, lost: str) -> None:
    course = Course(job_of(model, "rtn_w8a8"), quantized=True)
    drop_boundaries(course.job, course.streams[-1])
    key = course.streams[0].tokens if lost == "tokens" else course.packed[2].key
    course.job.store.remove(key)
    with pytest.raises(OSError, match=f"the entry {key} is gone or damaged; run the command again"):
        hidden_states(course.anew(), course.streams[-1])


def test_streams_are_known_by_their_last_step() -> None:
    stream = Stream("tokens").after("a", None).after("b", "packed")
    assert (stream.key, stream.block) == ("b", 2)
    assert stream.back().key == "a"
    assert stream.back().back() == Stream("tokens")
    assert len({Stream("tokens").key, Stream("other").key, Stream("tokens", "origin").key}) == 3
    assert len({boundary_key(s) for s in (stream, stream.back(), Stream("tokens"))}) == 3


def test_the_sources_stream_is_shared_by_recipes(model: Path, job_of: JobOf) -> None:
    int8, int4 = job_of(model, "rtn_w8a8"), job_of(model, "rtn_w4a16", GROUPS)
    stream = Stream("tokens")
    assert advance.key(int8, stream, None, block=0) == advance.key(int4, stream, None, block=0)
    fp8 = job_of(model, "fp8/rtn_fp8")
    keys = {advance.key(job, stream, "packed", block=0) for job in (int8, int4, fp8)}
    assert len(keys) == 3, "activations are quantized otherwise"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_stream_that_overflows_is_refused(model: Path, job_of: JobOf, value: str) -> None:
    job, hidden = job_of(model, "rtn_w8a8"), torch.zeros(2, 3, 4)
    require_finite(job, hidden, 7, [2])
    hidden[1, 2, 3] = float(value)
    with pytest.raises(RunError, match="block 7: its output holds NaN or Inf"):
        require_finite(job, hidden, 7, [2])


def test_a_square_may_overflow_where_its_root_does_not(model: Path, job_of: JobOf) -> None:
    job, hidden = job_of(model, "rtn_w8a8"), torch.zeros(2, 3, 4)
    hidden[1, 2, 3] = 1e30
    assert require_finite(job, hidden, 7, [2]).work() == float("inf")


def test_a_boundary_is_written_by_one_process(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit: Callable[..., Entry] = course.job.store.commit
    written: list[str] = []
    monkeypatch.setattr(
        course.job.store, "commit", lambda key, *rest: (written.append(key), commit(key, *rest))[1]
    )
    keep_boundary(course.job, course.streams[-1], course.states[-1])
    assert written == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_square_leaves_the_stream_as_it_is(
    model: Path, job_of: JobOf, dtype: torch.dtype
) -> None:
    job = job_of(model, "rtn_w8a8")
    hidden = torch.randn(3, 4, 8).to(dtype)
    before = hidden.clone()
    found = require_finite(job, hidden, 0, [3]).work()
    assert found == pytest.approx(float(before.float().square().mean()))
    assert torch.equal(hidden, before)


def test_a_boundary_that_another_run_drops_is_made_again(course: Course) -> None:
    stream, wanted = course.streams[-1], course.states[-1]
    job = course.anew()
    find = job.store.get

    def found_and_dropped(key: str) -> Entry | None:
        entry = find(key)
        if key == boundary_key(stream):
            # between being found and being read
            job.store.remove(key)
        return entry

    object.__setattr__(job.store, "get", found_and_dropped)
    assert torch.equal(hidden_states(job, stream), wanted)


def test_a_device_keeps_no_hidden_states_for_the_disk(
    model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, "rtn_w4a16", GROUPS)
    # nothing is on a GPU here: what is copied from one is pretended
    monkeypatch.setattr(Job, "on_gpu", True)
    monkeypatch.setattr("tasks.engine.streams.to_host", Tensor.clone)
    copied, go_on = Event(), Event()
    written: list[Tensor] = []

    def write(_: Job, __: Stream, hidden: Tensor) -> None:
        written.append(hidden)
        copied.set()
        assert go_on.wait(10)

    monkeypatch.setattr("tasks.engine.streams._write_boundary", write)
    hidden = torch.ones(2, 4, 32)
    kept = weakref.ref(hidden)
    keep_boundary(job, Stream("tokens"), hidden)
    del hidden
    assert copied.wait(10)
    try:
        assert kept() is None, "it would be on the device as long as the disk takes"
    finally:
        go_on.set()
    job.behind["stream"].wait()
    assert torch.equal(written[0], torch.ones(2, 4, 32))


def test_a_device_s_hidden_states_are_kept_now_and_then(
    model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, "rtn_w4a16", GROUPS)
    monkeypatch.setattr(Job, "on_gpu", True)
    written: set[Stream] = set()
    monkeypatch.setattr("tasks.engine.streams._write_boundary", lambda *of: written.add(of[1]))
    rounded, unrounded = (Stream("tokens").after(packed or "", packed) for packed in ("key", None))
    for stream in (rounded, unrounded):
        keep_boundary(job, stream, torch.ones(2, 4, 32))
    for behind in job.behind.values():
        behind.wait()
    assert written == {rounded, unrounded}
    keep_boundary(job, rounded.after("next", "key"), torch.ones(2, 4, 32))
    for behind in job.behind.values():
        behind.wait()
    assert written == {rounded, unrounded}, "a moment after"


def test_what_is_not_finite_is_not_kept_for_the_next_try(
    model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, "rtn_w4a16", GROUPS)
    monkeypatch.setattr(Job, "on_gpu", True)
    hidden = torch.ones(2, 4, 32)
    for number, (value, kept) in enumerate(((torch.nan, False), (torch.inf, False), (1.0, True))):
        stream = Stream(f"tokens {number}").after("block", "key")
        hidden[1, 2, 3] = value
        keep_boundary(job, stream, hidden.clone())
        job.behind.pop(stream.kind).wait()
        assert (job.store.get(boundary_key(stream)) is not None) == kept


def test_the_first_process_drops_what_all_have_kept(model: Path, job_of: JobOf) -> None:
    streams = Stream("tokens").after("block", "key")
    jobs = [job_of(model, "rtn_w4a16", GROUPS, team=Team(rank, 3)) for rank in range(3)]
    for job in jobs:
        keep_boundary(job, streams, torch.ones(2, 4, 32))
    keys = [boundary_key(streams, rank) for rank in range(3)]
    assert all(jobs[0].store.get(key) for key in keys)
    drop_boundaries(jobs[2], streams)
    assert [jobs[0].store.get(key) is not None for key in keys] == [True, True, False]
    drop_boundaries(jobs[0], streams)
    assert not any(jobs[0].store.get(key) for key in keys)
