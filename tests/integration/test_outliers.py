"""Channel transforms on a real model whose function stays but whose norms have outliers."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flows.quantize_model import quantize_model
from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.text import TextSource
from tasks.engine.windows import evaluation_windows
from tasks.evaluate import measure

pytestmark = pytest.mark.shared

TIMES = 64.0
CHANNELS = 4
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
ROUNDED = {"awq_w4a16": "rtn_w4a16"} | dict.fromkeys(
    ("awq_w8a8", "smoothquant_w8a8", "os_plus_w8a8"), "rtn_w8a8"
)
# what round-to-nearest loses at least, in nats: a hundred times what it loses without outliers
LOST = {"rtn_w4a16": 0.9, "rtn_w8a8": 0.2}
# the one that decides without a search
SHORTEST = "smoothquant_w8a8"


@torch.no_grad()
def largest_outputs(source: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The channels of each block's norms that are largest on average, by the norm's name."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    def hook(_: nn.Module, __: Any, output: Tensor, *, name: str) -> None:
        found[name] = output.abs().flatten(0, -2).mean(0).topk(CHANNELS).indices

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in READERS:
            module.register_forward_hook(functools.partial(hook, name=name))
    model(tokens)
    return found


def with_outliers(source: Path, folder: Path, tokens: Tensor) -> Path:
    """Copy a checkpoint; the largest channels of every block's norms become 64 times larger.

    The linears behind them take it back, and a power of two is exact: the function stays. The
    final norm is left alone, as no quantized linear reads it.
    """
    shutil.copytree(source, folder)
    files = {path: load_file(path) for path in folder.glob("*.safetensors")}
    where = {name: tensors for tensors in files.values() for name in tensors}
    for name, chosen in largest_outputs(source, tokens).items():
        prefix, _, norm = name.rpartition(".")
        where[f"{name}.weight"][f"{name}.weight"][chosen] *= TIMES
        for linear in READERS[norm]:
            full = f"{prefix}.{linear}.weight"
            where[full][full][:, chosen] /= TIMES
    for path, tensors in files.items():
        path.chmod(0o644)
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plain(shared: Path) -> Path:
    return shared / "models" / "llama-26m"


@pytest.fixture(scope="module")
def model(plain: Path, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(plain, tmp_path_factory.mktemp("outliers") / "model", windows[:1])


@pytest.fixture(scope="module")
def windows(shared: Path, plain: Path) -> Tensor:
    source = open_checkpoint(plain).source
    path = str(shared / "text" / "heldout.txt")
    return evaluation_windows(source, TextSource("--text", "text", path, evaluation=True), 1024, 8)


Nll = Callable[[str], float]


@pytest.fixture(scope="module")
def nll(
    shared: Path, model: Path, windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Nll:
    """The NLL of the model with outliers after a recipe, or of its source; each made once."""
    texts = [
        f"{kind}.path={shared / 'text' / name}.txt"
        for kind, name in (("calib", "calibration"), ("eval", "heldout"))
    ]
    given = [*texts, "calib.name=text", "calib.n_samples=8", "calib.seq_len=512"]
    given += ["eval.name=text", "eval.windows=1", "eval.seq_len=64", "eval.report=false"]

    @functools.cache
    def of(recipe: str) -> float:
        if recipe == "source":
            return float(measure(open_checkpoint(model), windows)["nll"])
        out = tmp_path_factory.mktemp(recipe) / "out"
        calibrated = [g for g in given if recipe in ROUNDED or not g.startswith("calib")]
        quantize_model(recipe, model=str(model), output=str(out), overrides=calibrated)
        return float(measure(open_checkpoint(out), windows)["nll"])

    return of


@torch.no_grad()
def test_outliers_leave_the_function_as_it_was(plain: Path, model: Path) -> None:
    tokens = torch.randint(8192, (1, 64), generator=torch.Generator().manual_seed(0))
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (plain, model)
    )
    for layer, other in zip(before.model.layers, after.model.layers, strict=True):
        for norm in READERS:
            ratio = other.get_submodule(norm).weight / layer.get_submodule(norm).weight
            assert (ratio == TIMES).sum() == CHANNELS
    logits = before(tokens).logits
    assert float((after(tokens).logits - logits).abs().max() / logits.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[] if r == SHORTEST else [pytest.mark.long]) for r in ROUNDED],
)
def test_transforms_win_back_what_rounding_loses(
    recipe: str, home: Path, services: dict[str, str], nll: Nll
) -> None:
    rounded, source = nll(ROUNDED[recipe]), nll("source")
    lost = rounded - source
    assert lost > LOST[ROUNDED[recipe]]
    assert rounded - nll(recipe) >= 0.95 * lost
