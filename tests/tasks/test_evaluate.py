"""Figures of a checkpoint, against transformers' own forward pass with activations quantized."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tasks.evaluate as module
from tasks.engine import decoder
from tasks.engine.checkpoint import Checkpoint, open_checkpoint
from tasks.engine.errors import InputError, NonFiniteWeightError, RunError
from tasks.evaluate import measure, summary
from tests.models import GEMMA2, make_checkpoint
from tests.tasks.conftest import JobOf, export_of, random_tokens

WINDOWS = random_tokens(3, 48, seed=1)


# the rules of formats.md, in plain words


def int8_per_token(x: Tensor) -> Tensor:
    absmax = x.abs().amax(dim=-1, keepdim=True)
    steps = x * (127 / absmax)
    codes = torch.where(steps >= 0, (steps + 0.5).floor(), (steps - 0.5).ceil())
    return codes.clamp(-128, 127) * (absmax / 127)


def to_e4m3(x: Tensor) -> Tensor:
    """To three bits behind the leading one, of numbers from 2^-6 on; ties to even."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.exp2(exponent.clamp(min=-6) - 3.0)
    return ((x / step).round() * step).clamp(-448, 448)


def e4m3_per_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return to_e4m3((x * (1 / scale)).clamp(-448, 448)) * scale


def e4m3_in_groups(x: Tensor) -> Tensor:
    return e4m3_per_token(x.unflatten(-1, (-1, 128))).flatten(-2)


RECIPES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "rtn_w4a16": None,
    "rtn_w8a8": int8_per_token,
    "fp8/rtn_fp8": e4m3_per_token,
    "fp8/rtn_fp8_block": e4m3_in_groups,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose predictions are sharp enough to differ, and whose outliers are large."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("evaluate") / "model",
        "qwen3",
        hidden=128,
        intermediate=256,
        initializer_range=0.2,
    )
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[torch.randperm(128, generator=draw)[:3]] *= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def literal_logits(checkpoint: Checkpoint, quantize: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Logits (W, T, V) of transformers' model with weights as compressed-tensors reads them."""
    folder, config = checkpoint.source.path, checkpoint.source.config
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    whole: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**plain)).float()
    stored = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    described = QuantizationConfig.model_validate(config["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(described.format)
    for name, parameter in whole.named_parameters():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            parameter.copy_(stored[name])
            continue
        members = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(linear)}
        read = compressor.decompress(members, described.config_groups["group_0"])
        parameter.copy_(read["weight"])
        if described.format != "pack-quantized":
            # int8 and FP8 kernels scale in float32
            scale = members["weight_scale"]
            if described.config_groups["group_0"].weights.strategy == "block":
                scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                scale = scale[: parameter.shape[0], : parameter.shape[1]]
            parameter.copy_(members["weight"].float() * scale)
        if quantize is not None:

            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (quantize(inputs[0]),)

            whole.get_submodule(linear).register_forward_pre_hook(hook)
    return whole(WINDOWS).logits.double()


def literal_figures(ours: Tensor, reference: Tensor) -> dict[str, float]:
    logs, wanted = (torch.log_softmax(logits[:, :-1], dim=-1) for logits in (ours, reference))
    targets = WINDOWS[:, 1:, None]
    nll, reference_nll = -logs.gather(-1, targets).mean(), -wanted.gather(-1, targets).mean()
    return {
        "nll": float(nll),
        "perplexity": math.exp(nll),
        "tokens": targets.numel(),
        "reference_nll": float(reference_nll),
        "nll_increase": float(nll - reference_nll),
        "kl": float((wanted.exp() * (wanted - logs)).sum(-1).mean()),
        "top1_agreement": float((logs.argmax(-1) == wanted.argmax(-1)).double().mean()),
    }


@pytest.fixture(scope="module")
def reference_logits(model: Path) -> Tensor:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = whole(WINDOWS).logits.double()
    return logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_those_of_a_literal_forward_pass(
    recipe: str, model: Path, job_of: JobOf, reference_logits: Tensor
) -> None:
    folder, _ = export_of(job_of(model, recipe))
    checkpoint = open_checkpoint(folder)
    found = measure(checkpoint, WINDOWS, open_checkpoint(model))
    wanted = literal_figures(literal_logits(checkpoint, RECIPES[recipe]), reference_logits)
    assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)
    if RECIPES[recipe] is not None:
        without = literal_figures(literal_logits(checkpoint, None), reference_logits)
        assert abs(without["kl"] - wanted["kl"]) > 1e-4, "activations are seen in the figures"


@pytest.mark.parametrize("cap", [1.0, None])
def test_a_cap_of_the_logits_is_in_the_loss(cap: float | None, tmp_path: Path) -> None:
    caps = {"final_logit_softcapping": cap, "initializer_range": 0.05}
    folder = make_checkpoint(tmp_path / "model", **GEMMA2 | caps)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        loss = float(whole(WINDOWS, labels=WINDOWS).loss)
        whole.config.final_logit_softcapping = None if cap else 1.0
        other = float(whole(WINDOWS, labels=WINDOWS).loss)
    assert abs(loss - other) > 0.1, "the cap is seen"
    assert measure(open_checkpoint(folder), WINDOWS)["nll"] == pytest.approx(loss, abs=1e-5)


def test_each_of_two_models_has_its_own_cap(tmp_path: Path) -> None:
    # no logit comes near the cap: tanh would make them one
    caps = {"initializer_range": 0.1, "final_logit_softcapping": 10.0}
    capped = make_checkpoint(tmp_path / "capped", **GEMMA2 | caps)
    plain = Path(shutil.copytree(capped, tmp_path / "plain"))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": None}))
    one, other = open_checkpoint(capped), open_checkpoint(plain)
    found = measure(one, WINDOWS, other)
    assert found["nll"] == measure(one, WINDOWS)["nll"]
    assert found["reference_nll"] == measure(other, WINDOWS)["nll"]
    assert found["kl"] > 0.1
    # a cap flattens, and leaves the order
    assert found["top1_agreement"] == 1.0


def test_a_model_beside_itself(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    found = measure(checkpoint, WINDOWS, open_checkpoint(model))
    assert (found["nll_increase"], found["kl"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
    alone = measure(checkpoint, WINDOWS)
    assert alone == {name: found[name] for name in ("nll", "perplexity", "tokens")}


def test_how_the_work_is_cut_does_not_matter(
    model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(export_of(job_of(model, "rtn_w8a8"))[0])
    whole = measure(checkpoint, WINDOWS, open_checkpoint(model))
    monkeypatch.setattr(module, "HEAD_ROWS", 20)
    monkeypatch.setattr(module, "STREAM_BYTES", 1)
    in_rows = measure(checkpoint, WINDOWS, open_checkpoint(model))
    assert in_rows == pytest.approx(whole, rel=1e-6, abs=1e-5)
    monkeypatch.undo()
    monkeypatch.setitem(decoder.MICRO_BATCH_TOKENS, "cpu", 96)
    assert measure(checkpoint, WINDOWS, open_checkpoint(model)) == pytest.approx(
        whole, rel=1e-6, abs=1e-5
    )
    # windows do not see each other
    apart = [measure(checkpoint, window[None])["nll"] for window in WINDOWS]
    assert sum(apart) / 3 == pytest.approx(whole["nll"], abs=1e-5)


def test_the_dtype_is_that_asked_for(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    exact = measure(checkpoint, WINDOWS)["nll"]
    assert measure(checkpoint, WINDOWS, dtype="float32")["nll"] == exact
    rounded = measure(checkpoint, WINDOWS, dtype="bfloat16")["nll"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_any_gpu_measures_the_same(model: Path, job_of: JobOf) -> None:
    checkpoint = open_checkpoint(export_of(job_of(model, "rtn_w8a16"))[0])
    first, second = (
        measure(checkpoint, WINDOWS, open_checkpoint(model), device=device)
        for device in ("cuda:0", "cuda:1")
    )
    assert first == second


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """A copy of the model in which one tensor is changed, or left out."""

    def make(name: str, change: Callable[[Tensor], Tensor] | None) -> Checkpoint:
        folder = Path(shutil.copytree(model, tmp_path / "damaged"))
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return open_checkpoint(folder)

    return make


def test_not_a_number_is_an_error(damaged: Callable[..., Checkpoint]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NonFiniteWeightError, match=name):
        measure(damaged(name, lambda t: t.fill_(float("nan"))), WINDOWS)


def test_an_overflow_is_an_error(damaged: Callable[..., Checkpoint]) -> None:
    broken = damaged("model.norm.weight", lambda t: t.fill_(3e38))
    with pytest.raises(RunError, match="not finite"):
        measure(broken, WINDOWS)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_a_missing_tensor_is_an_error(damaged: Callable[..., Checkpoint], name: str) -> None:
    with pytest.raises((InputError, RunError, RuntimeError), match=name.split(".", 3)[3]):
        measure(damaged(name, None), WINDOWS)


def test_summary_is_one_line() -> None:
    alone = {"nll": 1.23456, "perplexity": 3.4368, "tokens": 3}
    assert summary(alone) == "NLL 1.2346, perplexity 3.44"
    more = alone | {"nll_increase": 0.01, "kl": 0.02, "top1_agreement": 0.987, "reference_nll": 1.2}
    assert summary(more) == (
        "NLL 1.2346, perplexity 3.44, NLL increase +0.0100, KL 0.0200, top-1 agreement 98.7%"
    )
