"""Blocks whose norms, positions and gates are quantizers' own, against transformers' blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.engine import fused
from tasks.engine.decoder import build_causal_lm, build_decoder, run_block
from tests.models import GEMMA2, make_checkpoint
from tests.tasks.conftest import random_tokens
from tests.tasks.engine.test_decoder import block_tensors, config_of

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
}
SHAPE = {"blocks": 1, "hidden": 64, "intermediate": 96, "vocabulary": 256}
FUNCTIONS = ("rms_norm", "rotated_positions", "swiglu")


def make(folder: Path, name: str, **changes: Any) -> Path:
    options = {"model_type": name.split()[0], **SHAPE, **MODELS.get(name, {}), **changes}
    return make_checkpoint(folder / "model", dtype=torch.bfloat16, **options)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function is called from now on."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        function = getattr(fused, name)

        def call(*given: Any) -> Tensor:
            calls[name] += 1
            found: Tensor = function(*given)
            return found

        monkeypatch.setattr(fused, name, call)

    for name in FUNCTIONS:
        count(name)
    return calls


def both(
    folder: Path, device: str, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Tensor, dict[str, Any]]:
    """A block, transformers' own, their weights, and what they are given."""
    config = config_of(folder)
    decoder = build_decoder(config, device)
    own = build_causal_lm(config, device).model.layers[0]
    weights = {n: t.to(device, dtype) for n, t in block_tensors(folder, 0).items()}
    draw = torch.Generator().manual_seed(1)
    embedding = torch.randn(256, SHAPE["hidden"], generator=draw).to(device, dtype)
    hidden, arguments = decoder.embed(embedding, random_tokens(2, 40, 256).to(device))
    return decoder.blocks[0], own, weights, hidden, arguments[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_on_a_cpu(
    tmp_path: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, own, *given = both(make(tmp_path, name), "cpu", dtype)
    wanted = run_block(own, *given)
    calls = counted(monkeypatch)
    assert torch.equal(run_block(block, *given), wanted)
    norms = 4 if name == "qwen3" else 2
    assert calls == {"rms_norm": norms, "rotated_positions": 2, "swiglu": 1}


@pytest.mark.parametrize("options", [{"model_type": "gemma"}, GEMMA2])
def test_a_gemma_s_block_stays_as_it_is(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    block, own, *given = both(make(tmp_path, "gemma", **options), "cpu", torch.float32)
    assert torch.equal(run_block(block, *given), run_block(own, *given))
    assert not calls


def test_another_activation_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    folder = make(tmp_path, "llama", hidden_act="gelu")
    block, own, *given = both(folder, "cpu", torch.float32)
    assert torch.equal(run_block(block, *given), run_block(own, *given))
    assert calls == {"rms_norm": 2, "rotated_positions": 2}


def test_transformers_own_blocks_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    _, own, *given = both(make(tmp_path, "llama"), "cpu", torch.float32)
    run_block(own, *given)
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_s_kernels_are_as_near_as_transformers(tmp_path: Path, name: str) -> None:
    block, own, *given = both(make(tmp_path, name), "cuda", torch.bfloat16)
    exact = both(make(tmp_path / "exact", name), "cuda", torch.float32)
    wanted = run_block(exact[1], *exact[2:])
    ours, theirs = ((run_block(b, *given).float() - wanted).norm() for b in (block, own))
    assert ours <= 1.05 * theirs
    assert torch.equal(run_block(block, *given), run_block(block, *given))
