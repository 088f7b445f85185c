"""Sizes that SGLang's kernels take; expectations are counted by hand from real models' sizes."""

from __future__ import annotations

import pytest
import torch

from quantizers.number_formats import E4M3, int_format
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme
from tasks.engine.errors import InputError
from tasks.engine.export_format import Scheme
from tasks.engine.kernel_limits import kernel_of, misfits, require_parallel, shares

BF16 = torch.bfloat16
TOKEN = ActivationScheme(E4M3, True, Granularity.TOKEN, dynamic=True)
W4A16 = Scheme(
    WeightScheme(int_format(4), True, Granularity.GROUP, 128, None, BF16), None, "pack-quantized"
)
UNPACKED = Scheme(W4A16.weight, None, "int-quantized")
W8A8 = Scheme(
    WeightScheme(int_format(8), True, Granularity.CHANNEL),
    ActivationScheme(int_format(8), True, Granularity.TOKEN, dynamic=True),
    "int-quantized",
)
FP8 = Scheme(WeightScheme(E4M3, True, Granularity.CHANNEL), TOKEN, "float-quantized")
STATIC = Scheme(
    WeightScheme(E4M3, True, Granularity.TENSOR),
    ActivationScheme(E4M3, True, Granularity.TENSOR, dynamic=False),
    "float-quantized",
)
BLOCK = Scheme(
    WeightScheme(E4M3, True, Granularity.BLOCK, None, (128, 128)),
    ActivationScheme(E4M3, True, Granularity.GROUP, dynamic=True, group_size=128),
    "float-quantized",
)


def block(hidden, intermediate, heads, keys, head):
    """Sizes of a decoder block's linears, and what of the config they follow from."""
    shapes = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (keys * head, hidden),
        "self_attn.v_proj": (keys * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    sizes = {"num_attention_heads": heads, "num_key_value_heads": keys}
    return shapes, {"model_type": "llama", **sizes}


LLAMA_8B = block(4096, 14336, 32, 8, 128)
QWEN2_72B = block(8192, 29568, 64, 8, 128)


@pytest.mark.parametrize("scheme", [W4A16, W8A8, FP8, STATIC, BLOCK, UNPACKED])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_llama_3_8b_fits_everywhere(scheme, gpus):
    assert misfits(*LLAMA_8B, scheme, gpus) == {}


@pytest.mark.parametrize(("gpus", "columns"), [(4, 7392), (8, 3696)])
def test_qwen2_72b_on_several_gpus(gpus, columns):
    assert misfits(*QWEN2_72B, W4A16, 1) == {}
    found = misfits(*QWEN2_72B, W4A16, gpus)
    said = (
        f"mlp.down_proj has {columns} input features on each of {gpus} GPUs, "
        "Marlin takes multiples of 128; numbers of GPUs that fit: 1"
    )
    assert found["mlp.down_proj"] == said
    # 2 x 29568 / 8 output features are 115.5 x 64
    assert set(found) == (
        {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"} if gpus == 8 else {"mlp.down_proj"}
    )
    assert misfits(*QWEN2_72B, FP8, gpus) == {}
    assert misfits(*QWEN2_72B, W8A8, gpus) == {}


def test_fused_linears_are_one_matrix():
    shapes, config = block(256, 96, 4, 2, 64)
    by_names = {share.linears: (share.rows, share.columns) for share in shares(shapes, config, 1)}
    assert by_names == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ((256, 128, 128), 256),
        ("self_attn.o_proj",): ((256,), 256),
        ("mlp.gate_proj", "mlp.up_proj"): ((96, 96), 256),
        ("mlp.down_proj",): ((256,), 96),
    }
    # 96 + 96 output features are a multiple of 64, 96 alone are not
    assert set(misfits(shapes, config, W4A16)) == {"mlp.down_proj"}


def test_more_gpus_than_key_heads_hold_the_same_heads():
    shapes, config = block(4096, 14336, 32, 2, 128)
    (attention, *_) = shares(shapes, config, 8)
    # four query heads, and one of the two key heads on each
    assert attention.rows == (512, 128, 128)
    (_, output, *_) = shares(shapes, config, 8)
    assert (output.rows, output.columns) == ((4096,), 512)


def test_linears_that_are_left_out_count_for_nothing():
    shapes, config = block(256, 100, 4, 2, 64)
    del shapes["mlp.down_proj"]
    # gate and up have 200 rows
    assert set(misfits(shapes, config, W4A16)) == {"mlp.gate_proj", "mlp.up_proj"}
    del shapes["mlp.gate_proj"], shapes["mlp.up_proj"]
    assert misfits(shapes, config, W4A16) == {}


@pytest.mark.parametrize(
    ("scheme", "intermediate", "said"),
    [
        (W8A8, 264, "mlp.down_proj has 264 input features, the int8 kernel takes multiples of 16"),
        (
            STATIC,
            264,
            "mlp.down_proj has 264 input features, torch._scaled_mm takes multiples of 16",
        ),
        (BLOCK, 192, "mlp.down_proj has 192 input features, the FP8 block kernel takes multiples"),
    ],
)
def test_other_kernels(scheme, intermediate, said):
    shapes, config = block(256, intermediate, 4, 4, 64)
    assert misfits(shapes, config, scheme)["mlp.down_proj"].startswith(said)


def test_blocks_end_with_each_part_but_the_last():
    shapes, config = block(256, 192, 4, 2, 64)
    del shapes["mlp.down_proj"]
    # q has 256 rows, k and v 128; gate has 192, which is no multiple of 128, and up may be so
    found = misfits(shapes, config, BLOCK)
    assert found["mlp.gate_proj"].startswith("mlp.gate_proj has 192 output features, the FP8 block")
    assert set(found) == {"mlp.gate_proj", "mlp.up_proj"}
    lone = {"mlp.up_proj": (192, 256)}
    assert misfits(lone, config, BLOCK) == {}
    assert set(misfits(lone, config, BLOCK, 2)) == {"mlp.up_proj"}


def test_what_would_fit_is_said():
    shapes, config = block(64, 172, 8, 4, 8)
    line = misfits(shapes, config, W4A16)["mlp.down_proj"]
    # 172 is no multiple of 16, so the int8 kernel and torch._scaled_mm do not take it either
    assert line.endswith("Marlin takes multiples of 128; schemes that fit: FP8 dynamic")
    line = misfits(shapes, config, W4A16)["self_attn.q_proj"]
    assert line.endswith("; schemes that fit: W8A8, FP8 static, FP8 dynamic")


def test_formats_without_a_kernel_have_no_limits():
    assert kernel_of(UNPACKED) is None
    assert misfits(*block(7, 3, 1, 1, 7), UNPACKED) == {}


def test_fp8_channels_take_nearly_any_size():
    assert misfits(*block(8, 4, 1, 1, 8), FP8) == {}
    found = misfits(*block(8, 6, 1, 1, 8), FP8)
    said = "mlp.down_proj has 6 input features, the FP8 kernel takes multiples of 4; "
    assert set(found) == {"mlp.down_proj"} and found["mlp.down_proj"].startswith(said)


def test_sizes_that_gpus_cannot_share():
    shapes, config = block(64, 172, 8, 4, 8)
    found = misfits(shapes, config, FP8, 8)
    said = "mlp.down_proj has 172 features, which 8 GPUs cannot share evenly; numbers of GPUs that"
    assert found["mlp.down_proj"].startswith(said)
    assert found["mlp.down_proj"].endswith("fit: 1")
    assert set(found) == {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"}


@pytest.mark.parametrize(("gpus", "fits"), [(1, True), (2, True), (16, True), (3, False)])
def test_heads_are_shared(gpus, fits):
    config = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if fits:
        require_parallel(config, gpus, "--tensor-parallel")
        return
    said = "--tensor-parallel: 3 GPUs cannot share 32 attention heads and 8 key heads; .*1, 2, 4, 8"
    with pytest.raises(InputError, match=said):
        require_parallel(config, gpus, "--tensor-parallel")


def test_numbers_of_gpus_that_are_no_power_of_two():
    require_parallel({"num_attention_heads": 24, "num_key_value_heads": 24}, 3, "key")


def test_odd_heads_fit_one_gpu():
    config = {"num_attention_heads": 14, "num_key_value_heads": 2}
    require_parallel(config, 1, "key")
    with pytest.raises(InputError, match=r"fit: 1, 2$"):
        require_parallel(config, 4, "key")
