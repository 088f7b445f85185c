"""Whatever is damaged in an exported checkpoint is refused, with the name of the tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tasks.verify as module
from tasks.engine.errors import InputError, NonFiniteWeightError, VerificationError
from tasks.engine.source import INDEX
from tasks.verify import digests_of, verify_folder
from tests.models import edit_config, make_checkpoint
from tests.tasks.conftest import JobOf, export_of

RECIPES = {
    "int4": ("rtn_w4a16_asym", "quant.weight.group_size=64"),
    "int8": ("rtn_w8a8",),
    "fp8": ("fp8/rtn_fp8",),
}
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.post_attention_layernorm.weight"


@dataclass(frozen=True)
class Exported:
    """An export of the store, and what the run knew of its codes."""

    folder: Path
    digests: dict[str, str]

    def copy(self, place: Path) -> Path:
        return Path(shutil.copytree(self.folder, place))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "model"
    shape = {"hidden": 64, "intermediate": 128, "vocabulary": 64}
    return make_checkpoint(folder, "qwen2", tied=True, **shape)


@pytest.fixture(params=RECIPES)
def exported(request: pytest.FixtureRequest, model: Path, job_of: JobOf) -> Exported:
    return Exported(*export_of(job_of(model, *RECIPES[request.param])))


@pytest.fixture
def int8(model: Path, job_of: JobOf) -> Exported:
    return Exported(*export_of(job_of(model, "rtn_w8a8")))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the last block, and say so in the index."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][NORM]
    tensors = load_file(folder / file)
    known = set(tensors)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    for name in known - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= {name: file for name in tensors}
    (folder / INDEX).write_text(json.dumps(index))


def codes_of(tensors: dict[str, Tensor]) -> str:
    packed = f"{DOWN}.weight_packed"
    return packed if packed in tensors else f"{DOWN}.weight"


def test_a_whole_checkpoint(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {n: t for f in exported.folder.glob("*.safetensors") for n, t in load_file(f).items()}
    assert len(exported.digests) == 14
    report = verify_folder(exported.folder, exported.digests)
    assert (report["linears"], report["tensors"]) == (14, len(tensors))
    assert 0 <= report["logit_difference"] < 1e-4
    # a larger one is not loaded whole
    monkeypatch.setattr("tasks.verify.WHOLE_MODEL_BYTES", 0)
    assert verify_folder(exported.folder) == {"linears": 14, "tensors": len(tensors)}


# each is a change of the tensors, and how its line starts and what it says


def flipped(tensors: dict[str, Tensor]) -> None:
    name = codes_of(tensors)
    if name.endswith("packed"):
        # the lowest bit of one code
        tensors[name][5, 3] ^= 1
    else:
        tensors[name].view(torch.uint8)[5, 3] ^= 1


def two_codes_swapped(tensors: dict[str, Tensor]) -> None:
    codes = tensors[codes_of(tensors)].view(torch.uint8)
    first, second = codes[0].clone(), codes[1].clone()
    assert not torch.equal(first, second)
    codes[0], codes[1] = second, first


def scale_doubled(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"][7] *= 2


def scale_one_step_off(tensors: dict[str, Tensor]) -> None:
    scale = tensors[f"{DOWN}.weight_scale"]
    scale.view(torch.uint8)[0, 0] ^= 1


def scale_of_another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].half()


def scale_of_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"][:-1].clone()


def scale_missing(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{DOWN}.weight_scale"]


def scale_not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"][3, 0] = float("nan")


def codes_missing(tensors: dict[str, Tensor]) -> None:
    del tensors[codes_of(tensors)]


def codes_of_another_dtype(tensors: dict[str, Tensor]) -> None:
    name = codes_of(tensors)
    tensors[name] = tensors[name].float().to(torch.int64)


def codes_of_another_shape(tensors: dict[str, Tensor]) -> None:
    name = codes_of(tensors)
    tensors[name] = tensors[name][:, :-1].clone()


def one_part_more(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.input_scale"] = torch.ones(1)


def bias_missing(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.q_proj.bias"]


def norm_of_another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM].half()


def norm_infinite(tensors: dict[str, Tensor]) -> None:
    tensors[NORM][0] = float("inf")


def a_module_more(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.weight"] = tensors[NORM].clone()


def a_head_although_it_is_tied(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


DAMAGES: dict[Callable[[dict[str, Tensor]], None], str] = {
    flipped: rf"^{DOWN}: other codes or scales",
    two_codes_swapped: rf"^{DOWN}: other codes or scales",
    scale_doubled: rf"^{DOWN}: other codes or scales",
    scale_one_step_off: rf"^{DOWN}: other codes or scales",
    scale_of_another_dtype: rf"^{DOWN}\.weight_scale: is torch\.float16 .*, should be torch\.",
    scale_of_another_shape: rf"^{DOWN}\.weight_scale: is .* \[63, \d\], should be .* \[64, \d\]",
    scale_missing: rf"^{DOWN}\.weight_scale: not in the checkpoint",
    scale_not_a_number: rf"{DOWN}\.weight_scale holds NaN or Inf",
    codes_missing: rf"^{DOWN}\.weight(_packed)?: not in the checkpoint",
    codes_of_another_dtype: rf"^{DOWN}\.weight(_packed)?: is torch\.int64",
    codes_of_another_shape: rf"^{DOWN}\.weight(_packed)?: is .*should be",
    one_part_more: rf"^{DOWN}\.input_scale: no tensor of the format",
    bias_missing: r"^model\.layers\.1\.self_attn\.q_proj\.bias: not in the checkpoint",
    norm_of_another_dtype: rf"^{NORM}: is torch\.float16 \[64\], should be torch\.bfloat16",
    norm_infinite: rf"{NORM} holds NaN or Inf",
    a_module_more: r"^model\.layers\.1\.mlp\.gate\.weight: no tensor of the model",
    a_head_although_it_is_tied: r"^lm_head\.weight: written although it is the embedding",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused(
    exported: Exported, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    folder = exported.copy(tmp_path / "copy")
    change_tensors(folder, damage)
    with pytest.raises((VerificationError, NonFiniteWeightError), match=DAMAGES[damage]):
        verify_folder(folder, exported.digests)


def test_zero_points_are_checked(model: Path, job_of: JobOf, tmp_path: Path) -> None:
    made = Exported(*export_of(job_of(model, *RECIPES["int4"])))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight_zero_point"][0, 0] ^= 1

    folder = made.copy(tmp_path / "copy")
    change_tensors(folder, change)
    with pytest.raises(VerificationError, match=f"{DOWN}: other codes or scales"):
        verify_folder(folder, made.digests)

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight_shape"] = tensors[f"{DOWN}.weight_shape"].flip(0)

    folder = made.copy(tmp_path / "turned")
    change_tensors(folder, turn)
    with pytest.raises(VerificationError, match=rf"{DOWN}\.weight_shape: does not say \[64, 128\]"):
        verify_folder(folder, made.digests)


# what config.json says


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("ignore", "says"),
    [
        ([], "ignore: lm_head is missing, it would load as garbage"),
        (["lm_head", DOWN], f"{DOWN}.weight: is torch.int8"),
        (["lm_head", "model.layers.1.mlp"], "ignore: model.layers.1.mlp is no linear of the model"),
        (["lm_head", "model.layers.7.mlp.down_proj"], "model.layers.7.mlp.down_proj is no linear"),
    ],
)
def test_what_is_ignored_must_be_so(
    int8: Exported, tmp_path: Path, ignore: list[str], says: str
) -> None:
    folder = int8.copy(tmp_path / "copy")
    edit_config(folder, quantization_config=described(folder) | {"ignore": ignore})
    with pytest.raises(VerificationError, match=re.escape(says)):
        verify_folder(folder, int8.digests)


def test_a_linear_left_out_must_be_ignored(model: Path, job_of: JobOf, tmp_path: Path) -> None:
    job = job_of(model, "rtn_w8a8", f"ignored_layers=[{DOWN}]")
    made = Exported(*export_of(job))
    assert DOWN not in made.digests
    assert verify_folder(made.folder, made.digests)["linears"] == 13
    folder = made.copy(tmp_path / "copy")
    edit_config(folder, quantization_config=described(folder) | {"ignore": ["lm_head"]})
    with pytest.raises(VerificationError, match=rf"{DOWN}\.weight_scale: not in the checkpoint"):
        verify_folder(folder, made.digests)


def test_no_description_is_nothing_to_verify(model: Path) -> None:
    with pytest.raises(InputError, match="no quantization_config; nothing to verify"):
        verify_folder(model)


# what the run knew


def test_digests_must_be_of_these_linears(int8: Exported) -> None:
    some = {name: digest for name, digest in int8.digests.items() if name != DOWN}
    with pytest.raises(VerificationError, match=f"{DOWN}: quantized in the checkpoint, but not by"):
        verify_folder(int8.folder, some)


def test_digests_of_the_report(int8: Exported, tmp_path: Path) -> None:
    report = tmp_path / "blockquant.json"
    assert digests_of(tmp_path) is None
    report.write_text(json.dumps({"linears": {n: {"digest": d} for n, d in int8.digests.items()}}))
    assert digests_of(tmp_path) == int8.digests
    for text in ("", "[]", '{"linears": 3}', '{"linears": {"a": {}}}'):
        report.write_text(text)
        assert digests_of(tmp_path) is None


# the other readers


def test_logits_of_another_loader_must_agree(
    int8: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = module.weights_only_logits
    for factor, fine in ((1 + 1e-5, True), (1 + 1e-3, False), (float("nan"), False)):
        monkeypatch.setattr(
            module, "weights_only_logits", lambda *given, by=factor: ours(*given) * by
        )
        if fine:
            assert verify_folder(int8.folder)["logit_difference"] < 1e-4
            continue
        with pytest.raises(VerificationError, match="transformers' loader gives other logits"):
            verify_folder(int8.folder)


def test_weights_of_the_other_reader_must_agree(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = module.restore
    monkeypatch.setattr(module, "restore", lambda *given: restore(*given).roll(1, 0))
    first = r"^model\.layers\.0\.self_attn\.q_proj: compressed-tensors reads other weights"
    with pytest.raises(VerificationError, match=first):
        verify_folder(exported.folder)
