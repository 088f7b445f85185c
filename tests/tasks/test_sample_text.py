"""Sample text, against transformers' own greedy generation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.encoding import TOKENIZER_FILES
from tasks.sample_text import continued, sample_text
from tests.tasks.conftest import JobOf, export_of, make_entry, put_tokens, random_tokens


def generated(model: Path, tokens: torch.Tensor, new: int) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    found = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), **asked)
    return torch.as_tensor(found)


@pytest.mark.parametrize("guess", ["noise", "right"])
def test_it_is_what_transformers_generates(tiny: Path, guess: str) -> None:
    windows = random_tokens(3, 20)
    expected = generated(tiny, windows[:, :8], 12)
    start = expected if guess == "right" else windows
    assert torch.equal(continued(open_checkpoint(tiny), start, 8), expected)


def test_a_right_guess_takes_one_pass(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import sample_text as module

    checkpoint = open_checkpoint(tiny)
    expected = continued(checkpoint, random_tokens(2, 12), 6)
    passes: list[int] = []
    real: Callable[..., torch.Tensor] = module.likeliest

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        passes.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "likeliest", counted)
    assert torch.equal(continued(checkpoint, expected, 6), expected)
    assert len(passes) == 1


def test_what_is_settled_is_not_asked_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import sample_text as module

    windows = random_tokens(2, 16)
    expected = generated(tiny, windows[:, :6], 10)
    real: Callable[..., torch.Tensor] = module.likeliest
    first: list[int] = []

    def watched(weights: object, decoder: object, tokens: torch.Tensor, start: int) -> torch.Tensor:
        first.append(start)
        return real(weights, decoder, tokens, start)

    monkeypatch.setattr(module, "likeliest", watched)
    # right for so many tokens, then not
    guess = expected.clone()
    guess[:, 9] = (guess[:, 9] + 1) % 7
    assert torch.equal(continued(open_checkpoint(tiny), guess, 6), expected)
    assert first[:2] == [5, 9] and first == sorted(set(first))


def test_both_models_continue_the_first_windows(job_of: JobOf, demo_model: Path) -> None:
    job = job_of(demo_model, "rtn_w4a16", "eval.name=self_generated", "eval.sample_tokens=6")
    folder, _ = export_of(job)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer("The river was dark and the old house on the road " * 20)["input_ids"]
    windows = torch.tensor(ids[: 4 * 32]).view(4, 32)
    exported = folder.name
    entry = make_entry(
        sample_text, job, exported, put_tokens(job.store, windows).key, job.evaluation
    )
    assert entry.value["tokens"] == 6
    prompts = windows[:3, :16]
    before = generated(demo_model, prompts, 6)[:, 16:]
    for number, sample in enumerate(entry.value["samples"]):
        assert sample["prompt"] == tokenizer.decode(prompts[number], skip_special_tokens=True)
        assert sample["before"] == tokenizer.decode(before[number], skip_special_tokens=True)
        assert 0 <= sample["same"] <= 6
        assert (sample["same"] == 6) == (sample["before"] == sample["after"])
    assert len(entry.value["samples"]) == 3


def test_short_windows_and_no_tokenizer(job_of: JobOf, tmp_path: Path, tiny: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    for name in TOKENIZER_FILES:
        (model / name).unlink(missing_ok=True)
    job = job_of(model, "rtn_w8a16", "eval.name=self_generated")
    folder, _ = export_of(job)
    windows = random_tokens(1, 6)
    tokens = put_tokens(job.store, windows).key
    value = make_entry(sample_text, job, folder.name, tokens, job.evaluation).value
    (sample,) = value["samples"]
    assert value["tokens"] == 3
    assert sample["prompt"] == " ".join(map(str, windows[0, :3].tolist()))
    assert sample["before"].split() == [
        str(t) for t in generated(model, windows[:, :3], 3)[0, 3:].tolist()
    ]
