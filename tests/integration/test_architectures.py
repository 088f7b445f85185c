"""Every architecture and every scheme: logits as transformers', tensors as the format says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from flows.quantize_model import quantize_model
from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.decoder import build_decoder
from tasks.engine.store import load_tensors
from tasks.verify import verify_folder, weights_only_logits
from tests.models import GEMMA2, make_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, fp32": {"model_type": "llama", "tied": True, "dtype": torch.float32},
    "llama, shards, fp16": {"model_type": "llama", "shard_size": "200KB", "dtype": torch.float16},
    "llama, one head each": {"model_type": "llama", "kv_heads": 4},
    "llama, llama3 rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "mistral, short window": {"model_type": "mistral", "sliding_window": 16},
    "mistral, tied": {"model_type": "mistral", "tied": True, "kv_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied, shards": {"model_type": "qwen2", "tied": True, "shard_size": "200KB"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, tied": {"model_type": "qwen3", "tied": True, "kv_heads": 4},
    "gemma": {"model_type": "gemma", "tied": True},
    "gemma2": GEMMA2,
    "gemma2, no caps": GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2, untied, biases": GEMMA2 | {"tied": False, "attention_bias": True},
}
ROUNDED = [
    ("rtn_w4a16", "llama, tied, fp32"),
    ("rtn_w4a16", "gemma2"),
    ("rtn_w4a16_asym", "qwen3"),
    ("rtn_w8a16", "qwen2, tied, shards"),
    ("rtn_w8a8", "qwen2"),
    ("fp8/rtn_fp8", "mistral"),
    ("fp8/rtn_fp8_block", "llama, shards, fp16"),
    ("demo/w4a16", "qwen3, tied"),
]
SEARCHED = [
    ("awq_w4a16", "gemma"),
    ("awq_w4a16", "gemma2"),
    ("awq_w8a8", "qwen2, tied, shards"),
    ("gptq_w4a16", "gemma2, no caps"),
    ("os_plus_w8a8", "llama, biases"),
    ("os_plus_w8a8", "gemma2, untied, biases"),
    ("smoothquant_w8a8", "llama, shards, fp16"),
    ("fp8/awq_fp8_static", "qwen3, tied"),
]


def make(folder: Path, name: str) -> Path:
    given = dict(MODELS[name])
    return make_checkpoint(folder / "source", given.pop("model_type"), **given)


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name)
    tokens = torch.randint(8192, (2, 48), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = whole(tokens).logits
    checkpoint = open_checkpoint(folder)
    ours = weights_only_logits(checkpoint, build_decoder(checkpoint.source.config), tokens)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def expected_tensors(recipe: str, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """What formats.md says a quantized linear (rows, columns) is made of."""
    name = recipe.rpartition("/")[2]
    if "w8a8" in name:
        return {
            "weight": (torch.int8, (rows, columns)),
            "weight_scale": (torch.float32, (rows, 1)),
        }
    if "fp8" in name:
        blocks = (-(-rows // 128), -(-columns // 128))
        return {
            "weight": (torch.float8_e4m3fn, (rows, columns)),
            "weight_scale": (torch.float32, blocks if "block" in name else (rows, 1)),
        }
    bits = 8 if "w8" in name else 4
    packed: dict[str, Any] = {
        "weight_packed": (torch.int32, (rows, columns * bits // 32)),
        "weight_scale": (dtype, (rows, columns // 128)),
        "weight_shape": (torch.int64, (2,)),
    }
    if "asym" in name:
        packed["weight_zero_point"] = (torch.int32, (rows * bits // 32, columns // 128))
    return packed


@pytest.mark.parametrize(("recipe", "name"), ROUNDED)
def test_an_export_is_what_the_format_says(
    recipe: str, name: str, tmp_path: Path, words: Path, home: Path, services: dict[str, str]
) -> None:
    source = make(tmp_path, name)
    text = ["eval.name=text", f"eval.path={words}", "eval.windows=1", "eval.seq_len=32"]
    text += ["eval.report=false"]
    text.append("serving.check_kernels=false")
    out = tmp_path / "out"
    quantize_model(recipe, model=str(source), output=str(out), overrides=text)

    config = json.loads((out / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config["quantization_config"])
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    before = {n: t for f in source.glob("*.safetensors") for n, t in load_tensors(f).items()}
    after = {n: t for f in out.glob("*.safetensors") for n, t in load_tensors(f).items()}
    dtype = torch.float16 if before["model.norm.weight"].dtype == torch.float16 else torch.bfloat16
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(after)

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for name, tensor in before.items():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            if config["tie_word_embeddings"] and name == "lm_head.weight":
                assert name not in after
                continue
            assert torch.equal(after.pop(name), tensor.to(dtype)), name
            continue
        rows, columns = tensor.shape
        wanted = expected_tensors(recipe, rows, columns, dtype)
        members = {part: after.pop(f"{linear}.{part}") for part in wanted}
        found = {part: (t.dtype, tuple(t.shape)) for part, t in members.items()}
        assert found == wanted
        restored = compressor.decompress(dict(members), scheme.config_groups["group_0"])["weight"]
        # no further from the weight than the coarsest of the formats can be
        error = (restored.float() - tensor.float()).norm() / tensor.float().norm()
        assert error < (0.13 if "w4" in recipe else 0.03)
    assert not after, "no tensor that the format does not know"
    assert verify_folder(out)["logit_difference"] < 1e-4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("recipe", "name"), SEARCHED)
def test_a_searched_export_is_still_the_model(
    recipe: str, name: str, tmp_path: Path, words: Path, home: Path, services: dict[str, str]
) -> None:
    source = make(tmp_path, name)
    texts = [
        *("eval.name=text", f"eval.path={words}", "eval.windows=1", "eval.seq_len=32"),
        "eval.report=false",
        *("calib.name=text", f"calib.path={words}", "calib.n_samples=4", "calib.seq_len=64"),
    ]
    out = tmp_path / "out"
    result = quantize_model(recipe, model=str(source), output=str(out), overrides=texts)
    made = {step["step"] for step in result["steps"]}
    assert ("transform[block 1]" in made) == ("gptq" not in recipe)
    assert ("clip[block 1]" in made) == ("awq" in recipe)
    # transformers reads the same model from it, folded norms and biases and all
    assert verify_folder(out)["logit_difference"] < 1e-4
    tokens = torch.randint(8192, (2, 48), generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        weights_only_logits(opened, build_decoder(opened.source.config), tokens)
        for opened in (open_checkpoint(out), open_checkpoint(source))
    )
    error = float((ours - theirs).norm() / theirs.norm())
    # each of gemma2's norms brings what small random weights give to the size of the stream:
    # their rounding to nearest costs .28 there, and .06 in gemma
    four_bits = 0.45 if "gemma2" in name else 0.25
    assert error < (four_bits if "w4" in recipe else 0.06), error
