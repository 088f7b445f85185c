"""Which linears are quantized, by names and sizes alone: no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantizers.number_formats import E4M3, int_format
from quantizers.schemes import Granularity, WeightScheme
from tasks.engine.decoder import build_decoder
from tasks.engine.errors import InputError
from tasks.engine.plan import Plan, is_tied, plan_model, require_fit
from tasks.engine.source import Source, TensorInfo

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
CHANNEL = WeightScheme(int_format(8), True, Granularity.CHANNEL)


def groups_of(size: int) -> WeightScheme:
    return WeightScheme(int_format(4), True, Granularity.GROUP, size)


def described(
    hidden: int = 128,
    intermediate: int = 256,
    *,
    stored: int = 2,
    head: bool = True,
    without: Iterable[str] = (),
    extra: Iterable[str] = (),
    **config: Any,
) -> Source:
    """The headers of a Llama of two blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (50, hidden),
        "model.norm.weight": (hidden,),
    }
    if head:
        shapes["lm_head.weight"] = (50, hidden)
    for block in range(stored):
        place = f"model.layers.{block}."
        shapes |= {place + name: (hidden,) for name in NORMS}
        for linear in LINEARS:
            rows = intermediate if linear.endswith(("gate_proj", "up_proj")) else hidden
            columns = intermediate if linear.endswith("down_proj") else hidden
            shapes[f"{place}{linear}.weight"] = (rows, columns)
    shapes |= {name: (hidden,) for name in extra}
    tensors = {n: TensorInfo("f", torch.bfloat16, s) for n, s in shapes.items() if n not in without}
    given = {
        **{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 50},
        **{"hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4},
    }
    return Source(Path("/model"), given | config, tensors)


def quantized(plan: Plan) -> set[str]:
    return {block.prefix + linear for block in plan.blocks for linear in block.quantized}


def every(*linears: str, blocks: Iterable[int] = (0, 1)) -> set[str]:
    return {f"model.layers.{block}.{linear}" for block in blocks for linear in linears}


def test_everything_is_quantized_unless_something_is_said() -> None:
    plan = plan_model(described(), groups_of(128))
    assert [block.prefix for block in plan.blocks] == ["model.layers.0.", "model.layers.1."]
    for block in plan.blocks:
        assert block.quantized == LINEARS
        assert block.weights == [f"{linear}.weight" for linear in LINEARS]
        assert sorted(block.tensors) == sorted([*NORMS, *block.weights])
        assert block.full(["a", "b"]) == [block.prefix + "a", block.prefix + "b"]
    assert set(plan.outside) == {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    }
    assert (plan.ignored, plan.ignore, plan.tied) == ((), ["lm_head"], False)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 256), (128, 160), (64, 96), (128, 172)])
def test_groups_divide_the_inputs(hidden: int, intermediate: int, size: int) -> None:
    source = described(hidden, intermediate)
    # every linear but down_proj has the hidden size as its inputs
    small = set(LINEARS[:-1]) if hidden % size else set()
    small |= {"mlp.down_proj"} if intermediate % size else set()
    unfit = every(*small)
    if not unfit:
        assert plan_model(source, groups_of(size)) == plan_model(source, groups_of(size), (), True)
        assert quantized(plan_model(source, groups_of(size))) == every(*LINEARS)
        return
    with pytest.raises(InputError, match=f"group_size: {size} does not divide the"):
        plan_model(source, groups_of(size))
    if unfit == every(*LINEARS):
        with pytest.raises(InputError, match="no linear is left to quantize"):
            plan_model(source, groups_of(size), (), True)
        return
    plan = plan_model(source, groups_of(size), (), True)
    assert set(plan.ignored) == unfit
    assert quantized(plan) == every(*LINEARS) - unfit


@pytest.mark.parametrize(
    ("size", "fitting"),
    [(128, "sizes that fit it: 32;"), (64, "sizes that fit it: 32;"), (96, "no served size")],
)
def test_sizes_that_fit_are_named(size: int, fitting: str) -> None:
    source = described(192, 160 if size != 96 else 172)
    with pytest.raises(InputError) as refused:
        plan_model(source, groups_of(size), ["re:.*(self_attn|gate|up).*"])
    assert "model.layers.0.mlp.down_proj" in str(refused.value)
    assert fitting in str(refused.value)
    assert "(and 1 more linear)" in str(refused.value)


def test_channels_take_every_size_and_blocks_whole_ones() -> None:
    source = described(128, 172)
    assert plan_model(source, CHANNEL).ignored == ()
    blocks = WeightScheme(E4M3, True, Granularity.BLOCK, None, (128, 128))
    with pytest.raises(InputError, match="block_size: 128 does not divide the 172 input features"):
        plan_model(source, blocks)
    assert set(plan_model(source, blocks, (), True).ignored) == every("mlp.down_proj")


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        ([], set()),
        (["model.layers.1.mlp.down_proj"], every("mlp.down_proj", blocks=[1])),
        (["mlp.down_proj"], every("mlp.down_proj")),
        (["down_proj"], every("mlp.down_proj")),
        (["1.mlp.down_proj"], every("mlp.down_proj", blocks=[1])),
        ([r"re:.*\.0\.mlp\..*"], every(*LINEARS[4:], blocks=[0])),
        (["re:.*o_proj", "lm_head"], every("self_attn.o_proj")),
        (
            ["o_proj", "re:.*0.*down.*"],
            every("self_attn.o_proj") | {"model.layers.0.mlp.down_proj"},
        ),
        (["lm_head"], set()),
        (["q_proj", "k_proj", "v_proj"], every(*LINEARS[:3])),
    ],
)
def test_ignored_layers(patterns: list[str], left_out: set[str]) -> None:
    plan = plan_model(described(), groups_of(128), patterns)
    assert set(plan.ignored) == left_out
    assert plan.ignore == ["lm_head", *plan.ignored]
    assert quantized(plan) == every(*LINEARS) - left_out
    # tensors of a linear left out are still the block's
    whole = plan_model(described(), groups_of(128))
    assert [block.tensors for block in plan.blocks] == [block.tensors for block in whole.blocks]
    assert plan.outside == whole.outside


def test_left_out_linears_keep_the_order_of_the_model() -> None:
    plan = plan_model(described(), groups_of(128), ["model.layers.1.mlp.down_proj", "o_proj"])
    assert plan.ignored == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    )


@pytest.mark.parametrize(
    "pattern", ["proj", "layers", "mlp", "model.layers.2.mlp.down_proj", "re:down_proj", ""]
)
def test_names_are_whole_and_expressions_match_all_of_a_name(pattern: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{pattern!r} matches no linear")):
        plan_model(described(), groups_of(128), [pattern])


@pytest.mark.parametrize("fusion", [LINEARS[:3], LINEARS[4:6]])
def test_fused_members_are_left_out_together(fusion: tuple[str, ...]) -> None:
    for member in fusion:
        with pytest.raises(InputError) as refused:
            plan_model(described(), groups_of(128), [f"model.layers.1.{member}"])
        assert f"model.layers.1.{member} is left out" in str(refused.value)
        for other in every(*fusion, blocks=[1]) - {f"model.layers.1.{member}"}:
            assert other in str(refused.value)
    whole = every(*fusion, blocks=[1])
    assert set(plan_model(described(), groups_of(128), sorted(whole)).ignored) == whole


def test_ignored_layers_need_not_fit() -> None:
    source = described(128, 160)
    asked = plan_model(source, groups_of(128), ["mlp.down_proj"])
    assert asked == plan_model(source, groups_of(128), (), True)
    both = plan_model(source, groups_of(128), ["model.layers.0.self_attn.o_proj"], True)
    assert set(both.ignored) == every("mlp.down_proj") | every("self_attn.o_proj", blocks=[0])


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"tie_word_embeddings": True}, False, True),
        # a head that is stored and not used is not exported
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, True, False),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_tied_heads(config: dict[str, Any], head: bool, tied: bool) -> None:
    source = described(head=head, **config)
    plan = plan_model(source, groups_of(128))
    assert (plan.tied, is_tied(source)) == (tied, tied)
    assert ("lm_head.weight" in plan.outside) is not tied
    assert plan.ignore == ["lm_head"]


def test_an_untied_head_must_be_there() -> None:
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
        plan_model(described(head=False, tie_word_embeddings=False), groups_of(128))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_source_is_refused(dtype: torch.dtype) -> None:
    source = described()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = dict(source.tensors) | {name: TensorInfo("f", dtype, (256, 128))}
    with pytest.raises(InputError, match=f"{name} is {dtype}.*before quantization"):
        plan_model(Source(source.path, source.config, tensors), CHANNEL)


# the model that config.json describes


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (described(stored=3), "model.layers.2.input_layernorm.weight is of a block beyond the 2"),
        (described(extra=["model.layers.1.extra"]), "no place for model.layers.1.extra"),
        (described(extra=["model.extra"]), "no place for model.extra"),
        (described(without=["model.layers.1." + NORMS[0]]), f"no tensor model.layers.1.{NORMS[0]}"),
        (described(vocab_size=51), "model.embed_tokens.weight is [50, 128], but config.json makes"),
        (described(attention_bias=True), "no tensor model.layers.0.self_attn.q_proj.bias"),
        (described(intermediate_size=512), "mlp.gate_proj.weight is [256, 128], but config.json"),
    ],
)
def test_tensors_and_config_fit(source: Source, says: str) -> None:
    plan = plan_model(source, CHANNEL)
    with pytest.raises(InputError, match=re.escape(says)):
        require_fit(source, plan, build_decoder(source.config))


def test_a_whole_model_fits() -> None:
    for source in (described(), described(head=False), described(tie_word_embeddings=True)):
        require_fit(source, plan_model(source, CHANNEL), build_decoder(source.config))
