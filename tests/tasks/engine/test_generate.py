"""Text sampled from a model is what transformers' own whole model would have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tasks.engine.generate import sample_windows
from tasks.engine.source import open_source
from tests.models import GEMMA2, make_checkpoint

LENGTH = 40
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "gemma2": GEMMA2,
    "gemma2, no caps": GEMMA2 | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
}


@torch.no_grad()
def drawn(folder: Path, windows: int) -> Tensor:
    """Tokens drawn one by one, each from a forward pass of the whole text so far."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = torch.zeros(windows, 1, dtype=torch.int64)
    torch.manual_seed(0)
    for _ in range(LENGTH - 1):
        likely = whole(text).logits[:, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(likely, 1)], dim=1)
    return text


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    sharp: dict[str, Any] = {"initializer_range": 0.2, "dtype": torch.float32}
    folder = make_checkpoint(tmp_path / "model", **MODELS[name], **small, **sharp)
    found = sample_windows(open_source(folder), 3, LENGTH, seed=0, device="cpu")
    assert torch.equal(found, drawn(folder, 3))


def test_tensors_of_other_dtypes_are_computed_in_that_of_the_linears(tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    folder = make_checkpoint(tmp_path / "model", initializer_range=0.2, **small)
    alike = sample_windows(open_source(folder), 2, 20, seed=0, device="cpu")
    tensors = load_file(folder / "model.safetensors")
    mixed = {n: t.float() if "norm" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    found = open_source(folder)
    assert len({info.dtype for info in found.tensors.values()}) == 2
    assert torch.equal(sample_windows(found, 2, 20, seed=0, device="cpu"), alike)
