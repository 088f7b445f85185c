"""The exported tensors of every scheme: read back by us and by compressed-tensors' own reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from configs.loading import load_recipe
from quantizers.rounding import QuantizedWeight
from quantizers.schemes import Granularity
from tasks.engine.errors import InputError
from tasks.engine.export_format import (
    Scheme,
    compress,
    decompress,
    export_dtype,
    quantization_config,
    restore,
    restore_block,
    scheme_from_config,
    scheme_of,
)

STATIC = (
    *("quant.weight.granularity=per_tensor", "quant.act.granularity=per_tensor"),
    *("quant.act.static=true", "calib={name: self_generated, n_samples: 2, seq_len: 8}"),
)
ROW = ("quant.weight.group_size=-1",)
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "int4": ("rtn_w4a16", ()),
    "int4 groups of 32": ("rtn_w4a16", ("quant.weight.group_size=32",)),
    "int4 channel": ("rtn_w4a16", ROW),
    "int4 asym": ("rtn_w4a16_asym", ()),
    "int4 asym channel": ("rtn_w4a16_asym", ROW),
    "int8 packed": ("rtn_w8a16", ()),
    "int8 packed asym": ("rtn_w8a16", ("quant.weight.symmetric=false",)),
    "int8": ("rtn_w8a8", ()),
    "fp8 channel": ("fp8/rtn_fp8", ()),
    "fp8 block": ("fp8/rtn_fp8_block", ()),
    "fp8 tensor": ("fp8/rtn_fp8", STATIC),
}
ROWS, COLUMNS = 136, 256


def scheme(name: str, dtype: torch.dtype = torch.bfloat16) -> Scheme:
    recipe, overrides = RECIPES[name]
    quant = load_recipe(recipe, overrides).quant
    assert quant is not None
    return scheme_of(quant, dtype)


def scale_shape(name: str) -> tuple[int, ...]:
    """Shape of the scales of the weight (136, 256), by hand."""
    if "tensor" in name:
        return (1,)
    if "block" in name:
        return (2, 2)
    if "channel" in name or name == "int8":
        return (ROWS, 1)
    return (ROWS, 8) if "32" in name else (ROWS, 2)


def random_weight(name: str, asked: Scheme) -> QuantizedWeight:
    """Codes and scales of every value there is, rounded from nothing."""
    draw = torch.Generator().manual_seed(0)
    shape = (ROWS, COLUMNS)
    bits = asked.weight.number_format.bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    if asked.weight.number_format.is_float:
        codes = (torch.randn(shape, generator=draw) * 100).clamp(-448, 448)
        codes = codes.to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(low, high, shape, generator=draw).to(torch.int8)
        assert (codes.min(), codes.max()) == (low, high - 1)
    scales = torch.rand(scale_shape(name), generator=draw) * 0.01 + 0.001
    zero = torch.randint(low, high, scales.shape, generator=draw).to(torch.int8)
    return QuantizedWeight(
        codes, scales.to(asked.weight.scale_dtype), zero if "asym" in name else None
    )


def spread(parameter: Tensor) -> Tensor:
    """The scale or zero point of every entry of the weight (136, 256)."""
    whole = parameter.float().reshape(-1, 1) if parameter.ndim == 1 else parameter.float()
    rows, columns = whole.shape
    height = {1: ROWS, 2: 128, ROWS: 1}[rows]
    width = COLUMNS // columns
    return whole.repeat_interleave(height, 0)[:ROWS].repeat_interleave(width, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_reads_back(name: str) -> None:
    asked = scheme(name)
    made = random_weight(name, asked)
    static = asked.activation is not None and not asked.activation.dynamic
    tensors = compress(made, asked, torch.ones(1) if static else None)
    found = {part: (t.dtype, tuple(t.shape)) for part, t in tensors.items()}
    assert found == asked.expected(ROWS, COLUMNS)
    assert all(t.is_contiguous() for t in tensors.values())
    back = decompress(tensors, asked)
    for ours, kept in zip(vars(back).values(), vars(made).values(), strict=True):
        if kept is None:
            assert ours is None
            continue
        assert ours.dtype is kept.dtype
        # bytes: float8 zeros have signs
        assert torch.equal(ours.view(torch.uint8), kept.view(torch.uint8))


@pytest.mark.parametrize("name", RECIPES)
def test_compressed_tensors_reads_the_same(name: str) -> None:
    asked = scheme(name)
    made = random_weight(name, asked)
    codes = made.codes.float()
    zero = 0.0 if made.zero_point is None else spread(made.zero_point)
    wanted = (codes - zero) * spread(made.scale)
    tensors = compress(made, asked)
    ours = restore(tensors, asked)
    assert ours.dtype is asked.weight.scale_dtype
    assert torch.equal(ours, wanted.to(asked.weight.scale_dtype))

    described = QuantizationConfig.model_validate(quantization_config(asked, ["lm_head"]))
    compressor = BaseCompressor.get_value_from_registry(asked.format)
    theirs = compressor.decompress(dict(tensors), described.config_groups["group_0"])["weight"]
    eps = torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(theirs.float(), ours.float(), rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_the_description_says_all_of_a_scheme(name: str, dtype: torch.dtype) -> None:
    asked = scheme(name, dtype)
    # the dtype of packed scales is that of the checkpoint; the others are float32
    packed = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert export_dtype(dtype) is packed
    weight_only = asked.activation is None
    assert asked.weight.scale_dtype is (packed if weight_only else torch.float32)
    described = quantization_config(asked, ["lm_head", "model.layers.0.mlp.up_proj"])
    assert described["ignore"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert scheme_from_config(described, packed) == asked
    # and says the same to others
    parsed = QuantizationConfig.model_validate(described)
    group = parsed.config_groups["group_0"]
    weights, inputs = group.weights, group.input_activations
    assert (parsed.format, group.targets) == (asked.format, ["Linear"])
    assert (weights.num_bits, weights.symmetric) == (4 if "int4" in name else 8, "asym" not in name)
    assert weights.type == ("float" if "fp8" in name else "int")
    assert weights.strategy == asked.weight.granularity.value
    assert (inputs is None) == weight_only
    if inputs is not None:
        wanted = {"fp8 block": "group", "fp8 tensor": "tensor"}.get(name, "token")
        assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, weights.type, wanted)
        assert inputs.dynamic == (name != "fp8 tensor")


def test_schemes_differ_in_what_they_write() -> None:
    described = [str(quantization_config(scheme(name), [])) for name in RECIPES]
    assert len(set(described)) == len(RECIPES)


def test_a_block_is_restored_around_its_linears() -> None:
    asked = scheme("int4 asym")
    made = random_weight("int4 asym", asked)
    stored = {f"mlp.up_proj.{part}": t for part, t in compress(made, asked).items()}
    untouched = {
        "mlp.up_proj.bias": torch.randn(ROWS).bfloat16(),
        "mlp.down_proj.weight": torch.randn(4, 8).bfloat16(),
        "input_layernorm.weight": torch.randn(8).bfloat16(),
    }
    weights = restore_block(stored | untouched, ["mlp.up_proj"], asked, torch.float32)
    assert set(weights) == {"mlp.up_proj.weight", *untouched}
    assert all(t.dtype is torch.float32 for t in weights.values())
    zero = made.zero_point
    assert zero is not None
    wanted = (made.codes.float() - spread(zero)) * spread(made.scale)
    assert torch.equal(weights["mlp.up_proj.weight"], wanted.bfloat16().float())
    for name, tensor in untouched.items():
        assert torch.equal(weights[name], tensor.float())


def weights_of(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["config_groups"]["group_0"]["weights"]
    return found


def another_group(described: dict[str, Any]) -> None:
    described["config_groups"]["group_1"] = described["config_groups"]["group_0"]


REFUSED: dict[str, Any] = {
    "format": lambda d: d.update(format="marlin-24"),
    "no format": lambda d: d.pop("format"),
    "no groups": lambda d: d.update(config_groups={}),
    "two groups": another_group,
    "groups are a list": lambda d: d.update(config_groups=[1]),
    "no weights": lambda d: d["config_groups"]["group_0"].update(weights=None),
    "strategy": lambda d: weights_of(d).update(strategy="tensor_group"),
    "tokens of a weight": lambda d: weights_of(d).update(strategy="token"),
    "16 bits": lambda d: weights_of(d).update(num_bits=16),
    "no group size": lambda d: weights_of(d).update(group_size=None),
    "asymmetric inputs": lambda d: d["config_groups"]["group_0"].update(
        input_activations=quantization_config(scheme("int8"), [])["config_groups"]["group_0"][
            "input_activations"
        ]
        | {"symmetric": False}
    ),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_ours_is_refused(change: Any) -> None:
    described = quantization_config(scheme("int4"), ["lm_head"])
    assert scheme_from_config(described, torch.bfloat16).weight.granularity is Granularity.GROUP
    change(described)
    with pytest.raises(InputError, match="quantization_config: not one that blockquant writes"):
        scheme_from_config(described, torch.bfloat16)


@pytest.mark.parametrize("described", [{}, {"quant_method": "gptq", "bits": 4}])
def test_other_methods_are_refused(described: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not one that blockquant writes"):
        scheme_from_config(described, torch.bfloat16)


@pytest.mark.parametrize(("bits", "kind"), [(4, "float"), (8, "uint"), (16, "float")])
def test_number_formats_that_are_not_ours(bits: int, kind: str) -> None:
    described = quantization_config(scheme("fp8 channel"), ["lm_head"])
    weights_of(described).update(num_bits=bits, type=kind)
    with pytest.raises(InputError, match="not one that blockquant writes"):
        scheme_from_config(described, torch.bfloat16)
