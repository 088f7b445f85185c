"""Weights that are kept between passes, and those that are read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.draft import Draft
from tasks.engine.memo import Memo
from tasks.engine.source import Source
from tasks.engine.weights import Weights, weights_of
from tasks.evaluate import evaluate
from tasks.sample_text import sample_text
from tests.tasks.conftest import JobOf, export_of, put_tokens, random_tokens


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each read of files asked for."""
    asked: list[int] = []
    real = Source.read

    def read(source: Source, names: object, device: str = "cpu") -> dict[str, torch.Tensor]:
        wanted = list(names)  # type: ignore[call-overload]
        asked.append(len(wanted))
        return real(source, wanted, device)

    monkeypatch.setattr(Source, "read", read)
    return asked


def test_they_are_the_checkpoint_s(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    weights = Weights(checkpoint, "cpu", torch.float32, budget=1 << 30)
    for _ in range(2):
        expected = checkpoint.block_weights(1, torch.float32)
        assert weights.block(1).keys() == expected.keys()
        assert all(torch.equal(weights.block(1)[name], expected[name]) for name in expected)
        assert torch.equal(weights.head, checkpoint.head(torch.float32))


def test_what_fits_is_read_once_and_the_rest_each_time(tiny: Path, reads: list[int]) -> None:
    checkpoint = open_checkpoint(tiny)
    block = checkpoint.block_weights(0, torch.float32)
    size = sum(tensor.numel() * 4 for tensor in block.values())
    reads.clear()
    weights = Weights(checkpoint, "cpu", torch.float32, budget=size)
    for _ in range(3):
        weights.block(0)
        weights.block(1)
    assert reads == [len(block)] * 4


def test_tokens_ask_for_their_rows_of_the_embedding(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    tokens = torch.tensor([[7, 3, 7], [500, 3, 0]])
    rows, numbers = Weights(checkpoint, "cpu", torch.float32).embedding(tokens)
    whole = checkpoint.outside(checkpoint.architecture.embedding, torch.float32)
    assert len(rows) == 4 and torch.equal(rows[numbers], whole[tokens])


def test_the_head_is_read_once(tiny: Path, reads: list[int]) -> None:
    weights = Weights(open_checkpoint(tiny), "cpu", torch.float32)
    heads = [weights.head for _ in range(3)]
    assert reads == [1] and heads[0] is heads[2]


def test_on_a_cpu_no_block_is_kept(tiny: Path) -> None:
    assert weights_of(open_checkpoint(tiny), "cpu", torch.float32, passes=9).budget == 0


def test_steps_that_measure_share_them(
    job_of: JobOf, tiny: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU with room for all of both models
    monkeypatch.setattr("tasks.engine.weights.budget_on", lambda _: 1 << 30)
    job = job_of(tiny, "rtn_w4a16", "eval.sample_tokens=6")
    folder, _ = export_of(job)
    tokens = put_tokens(job.store, random_tokens(3, 24)).key
    measured = evaluate.compute(job, Draft(tiny, held=True), folder.name, tokens, job.evaluation)
    assert reads
    reads.clear()
    shared = sample_text.compute(job, Draft(tiny, held=True), folder.name, tokens, job.evaluation)
    assert not reads, "both models were read when they were measured"
    # a full device keeps nothing: the same is read, and found
    lean = replace(job, lean=True, memo=Memo())
    for step, found in ((evaluate, measured), (sample_text, shared)):
        reads.clear()
        given = (folder.name, tokens, job.evaluation)
        assert step.compute(lean, Draft(tiny, held=True), *given) == found
        assert reads
