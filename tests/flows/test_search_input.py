"""What searched recipes do with input at the edge: refused before work, named, or taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome

Here = Callable[..., Outcome]

SHORT = ("--set", "eval.name=self_generated", "--set", "eval.windows=1", "--set", "eval.seq_len=16")
SHORT += ("--set", "eval.report=false")
RECIPES = ("awq_w4a16", "smoothquant_w8a8", "os_plus_w8a8", "fp8/awq_fp8_static")


def options(words: Path, *more: str) -> list[str]:
    """Calibrate on a file, evaluate on next to nothing."""
    texts = ("calib.name=text", f"calib.path={words}", "calib.n_samples=4", "calib.seq_len=32")
    given = [word for text in (*texts, *more) for word in ("--set", text)]
    return [*SHORT, *given]


def edited(model: Path, name: str, edit: Callable[[torch.Tensor], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("alpha", ["-0.1", "1.5", "nan"])
def test_alpha_outside_of_its_range(here: Here, tiny: Path, words: Path, alpha: str) -> None:
    arguments = options(words, f"quant.special.alpha={alpha}")
    outcome = here("quantize", "smoothquant_w8a8", "--model", tiny, *arguments)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert "quant.special.alpha" in line


def test_static_scales_that_sglang_ignores(here: Here, tiny: Path, words: Path) -> None:
    static = ("quant.act.static=true", "quant.act.granularity=per_tensor")
    outcome = here("quantize", "awq_w8a8", "--model", tiny, *options(words, *static))
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert "act.static: SGLang ignores static int8 scales" in line


def test_a_range_that_is_not_offered(here: Here, tiny: Path, words: Path) -> None:
    arguments = options(words, "quant.act.calib_algo=static_hist")
    outcome = here("quantize", "fp8/awq_fp8_static", "--model", tiny, *arguments)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert "static_hist is not implemented; write one of minmax, static_minmax" in line


def test_activations_that_overflow(
    here: Here, services: object, copy_of: Callable[..., Path], tiny: Path, words: Path
) -> None:
    norm = "model.layers.1.post_attention_layernorm.weight"
    model = edited(copy_of(tiny), norm, lambda weight: weight.fill_(3e38))
    text = ("--set", "eval.name=text", "--set", f"eval.path={words}")
    outcome = here("quantize", "awq_w4a16", "--model", model, *options(words), *text)
    assert outcome.status == 1
    line = outcome.err.splitlines()[-1]
    assert "block 1: the inputs of model.layers.1.mlp.gate_proj hold NaN or Inf" in line


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_channel_that_is_always_zero_and_one_sample(
    here: Here,
    services: object,
    copy_of: Callable[..., Path],
    tmp_path: Path,
    tiny: Path,
    words: Path,
    recipe: str,
) -> None:
    def kill(weight: torch.Tensor) -> None:
        weight[[3, 50]] = 0

    model = edited(copy_of(tiny), "model.layers.0.input_layernorm.weight", kill)
    edited(model, "model.layers.0.self_attn.v_proj.weight", kill)
    edited(model, "model.layers.0.mlp.up_proj.weight", kill)
    arguments = ("--output", tmp_path / "out", *options(words, "calib.n_samples=1"))
    outcome = here("quantize", recipe, "--model", model, *arguments, "--json")
    assert outcome.status == 0, outcome.err
    assert 0 <= outcome.json["metrics"]["kl"] < 0.5
    tensors = load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")
    assert all(bool(t.float().isfinite().all()) for t in tensors.values())
    report = json.loads((tmp_path / "out" / "blockquant.json").read_text())
    errors = [linear["output_error"] for linear in report["linears"].values()]
    assert max(errors) < 0.3


def test_decisions_are_artifacts(
    here: Here, services: object, tmp_path: Path, tiny: Path, words: Path
) -> None:
    from mlflow import MlflowClient

    arguments = ("--output", tmp_path / "out", *options(words, "eval.report=true"), "--json")
    outcome = here("quantize", "fp8/awq_fp8_static", "--model", tiny, *arguments)
    assert outcome.status == 0, outcome.err
    run = outcome.json["mlflow"]
    client = MlflowClient(run["uri"])
    for block in range(2):
        for task, file, names in (
            ("transform", "transform.safetensors", {"attention_input.scale", "mlp_output.scale"}),
            ("clip", "clip.safetensors", {"factors", "mlp.down_proj", "self_attn.o_proj"}),
            ("quantize", "input_scales.safetensors", {"self_attn.q_proj", "mlp.up_proj"}),
        ):
            place = f"decisions/{task}/block-{block}/{file}"
            tensors = load_file(client.download_artifacts(run["run"], place, str(tmp_path)))
            assert names <= set(tensors)
    searches = json.loads(
        Path(client.download_artifacts(run["run"], "searches.json", str(tmp_path))).read_text()
    )
    tried = searches["transform"][1]["search"]["mlp_input"]
    assert [trial["ratio"] for trial in tried] == [step / 20 for step in range(20)]
    assert all(trial["error"] > 0 for trial in tried)
    assert sum(searches["clip"][0]["chosen"]["mlp.down_proj"]) == 1
    kept = {Path(file.path).name for file in client.list_artifacts(run["run"], "looks")}
    drawn = {"errors", "weight-ranges", "input-ranges", "scale-search", "clip-search"}
    assert kept == {f"{name}.png" for name in drawn}
    page = Path(client.download_artifacts(run["run"], "report.html", str(tmp_path))).read_text()
    assert page.count("data:image/png;base64,") == len(drawn)
