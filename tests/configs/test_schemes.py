"""What schemes are called, and what SGLang would not serve."""

import pytest

from configs.loading import load_recipe, parse_recipe
from configs.schemes import export_problems, not_implemented, scheme_name, unserved

GROUP = {"bit": 4, "granularity": "per_group", "group_size": 128, "need_pack": True}
CHANNEL = {"bit": 8, "granularity": "per_channel"}
TOKEN = {"bit": 8, "granularity": "per_token"}
E4M3 = {"bit": "e4m3", "granularity": "per_channel"}
E4M3_TOKEN = {"bit": "e4m3", "granularity": "per_token"}
E4M3_TENSOR = {"bit": "e4m3", "granularity": "per_tensor"}
STATIC = {**E4M3_TENSOR, "static": True}
BLOCK = {"bit": "e4m3", "granularity": "per_block"}
GROUPS_OF_128 = {"bit": "e4m3", "granularity": "per_group", "group_size": 128}


def quantized(weight, act=None, method="RTN", **more):
    quant = {"method": method, "weight": weight, "act": act, **more}
    return parse_recipe({"quant": quant, "calib": {"name": "pileval"}}, "x.yml")


@pytest.mark.parametrize(
    ("weight", "act", "name"),
    [
        (GROUP, None, "W4A16"),
        ({**GROUP, "symmetric": False}, None, "W4A16 asym"),
        ({**GROUP, "bit": 3}, None, "W3A16"),
        (CHANNEL, TOKEN, "W8A8"),
        (GROUP, E4M3_TOKEN, "W4AFP8"),
        (E4M3, None, "FP8 weights"),
        (E4M3, E4M3_TOKEN, "FP8 dynamic"),
        (E4M3, {**E4M3_TOKEN, "bit": "e5m2"}, "FP8 dynamic e5m2"),
        (E4M3_TENSOR, STATIC, "FP8 static"),
        (BLOCK, GROUPS_OF_128, "FP8 block"),
    ],
)
def test_scheme_names(weight, act, name):
    assert scheme_name(quantized(weight, act).quant) == name


@pytest.mark.parametrize(
    ("weight", "act"),
    [
        (GROUP, None),
        ({**GROUP, "symmetric": False}, None),
        ({**GROUP, "bit": 8, "group_size": 32}, None),
        ({**GROUP, "group_size": 64}, None),
        ({**GROUP, "group_size": -1}, None),
        ({**CHANNEL, "need_pack": True}, None),
        (CHANNEL, TOKEN),
        (E4M3, E4M3_TOKEN),
        (E4M3_TENSOR, STATIC),
        (BLOCK, GROUPS_OF_128),
    ],
)
def test_what_is_served_has_no_problems(weight, act):
    assert export_problems(quantized(weight, act)) == []


@pytest.mark.parametrize(
    ("weight", "act", "problem"),
    [
        # weights only
        ({**GROUP, "bit": 3}, None, "weight.bit: SGLang serves 4 and 8 bit weights, not 3"),
        ({**GROUP, "group_size": 96}, None, "weight.group_size: Marlin takes 32, 64, 128 or -1"),
        (
            {"bit": 4, "granularity": "per_tensor", "need_pack": True},
            None,
            "weight.granularity: per_tensor is not served without act: write per_group",
        ),
        (
            {"bit": 4, "granularity": "per_block", "need_pack": True},
            None,
            "weight.granularity: per_block is not served without act",
        ),
        (
            {**GROUP, "bit": 8, "symmetric": False},
            None,
            "weight.symmetric: asymmetric 8 bit weights are not served: write symmetric: true",
        ),
        # int8
        ({**CHANNEL, "bit": 4}, TOKEN, "weight.bit: 4 bit weights are served with 16 bit"),
        (
            {"bit": 8, "granularity": "per_tensor"},
            TOKEN,
            "weight.granularity: int8 weights are served per_channel, not per_tensor",
        ),
        ({**CHANNEL, "symmetric": False}, TOKEN, "weight.symmetric: int8 weights are served"),
        ({**CHANNEL, "need_pack": True}, TOKEN, "weight.need_pack: packing is for integer weights"),
        (CHANNEL, {**TOKEN, "bit": 4}, "act.bit: SGLang quantizes activations to 8 bits, not 4"),
        (CHANNEL, {**TOKEN, "symmetric": False}, "act.symmetric: SGLang ignores asymmetric"),
        (
            CHANNEL,
            {"bit": 8, "granularity": "per_tensor", "static": True},
            "act.static: SGLang ignores static int8 scales: write per_token and static: false",
        ),
        (CHANNEL, {"bit": 8, "granularity": "per_tensor"}, "act.granularity: SGLang quantizes"),
        # float
        ({**E4M3, "bit": "e5m2"}, E4M3_TOKEN, "weight.bit: SGLang loads no e5m2"),
        (E4M3, {**E4M3_TOKEN, "bit": "e5m2"}, "act.bit: SGLang loads no e5m2"),
        (
            E4M3,
            None,
            "act: missing; e4m3 weights are served with e4m3 activations: write "
            "act: {bit: e4m3, granularity: per_token}",
        ),
        (
            {**GROUPS_OF_128},
            E4M3_TOKEN,
            "weight.granularity: e4m3 weights are not served per_group",
        ),
        ({**E4M3, "need_pack": True}, E4M3_TOKEN, "weight.need_pack: packing is for integer"),
        (
            E4M3,
            STATIC,
            "act: does not go with per_channel e4m3 weights: write act: {bit: e4m3, "
            "granularity: per_token}",
        ),
        (
            E4M3_TENSOR,
            E4M3_TENSOR,
            "act: does not go with per_tensor e4m3 weights: write act: {bit: e4m3, "
            "granularity: per_tensor, static: true}",
        ),
        (
            BLOCK,
            E4M3_TOKEN,
            "act: does not go with per_block e4m3 weights: write act: {bit: e4m3, "
            "granularity: per_group, group_size: 128}",
        ),
        ({**BLOCK, "block_size": 64}, GROUPS_OF_128, "weight.block_size: FP8 blocks are 128 wide"),
        # mixed
        (GROUP, E4M3_TOKEN, "act.bit: e4m3 activations do not go with int4 weights: remove"),
        (E4M3, TOKEN, "act.bit: int8 activations do not go with e4m3 weights: write bit: e4m3"),
    ],
)
def test_what_is_not_served_says_what_to_write(weight, act, problem):
    (found,) = export_problems(quantized(weight, act))
    assert found.startswith(f"quant.{problem}")


def test_every_problem_is_told():
    weight = {"bit": 4, "granularity": "per_tensor", "symmetric": False}
    act = {"bit": 4, "granularity": "per_tensor", "symmetric": False}
    places = [line.split(":")[0] for line in export_problems(quantized(weight, act))]
    assert places == [
        "quant.weight.bit",
        "quant.weight.granularity",
        "quant.weight.symmetric",
        "quant.act.bit",
        "quant.act.symmetric",
        "quant.act.granularity",
    ]


def test_groups_in_activation_order_must_be_static():
    special = {"actorder": True, "static_groups": False}
    (found,) = export_problems(quantized(GROUP, method="GPTQ", special=special))
    assert found.startswith("quant.special.static_groups: groups in activation order need")
    assert export_problems(quantized(CHANNEL, TOKEN, method="GPTQ", special=special)) == []


def test_steps_share_their_numbers_but_only_the_last_one_packs():
    def combined(first, second):
        steps = [
            {"quant": {"method": "Awq", "weight": first}},
            {"quant": {"method": "OmniQuant", "weight": second}},
        ]
        return parse_recipe({"steps": steps, "calib": {"name": "pileval"}}, "x.yml")

    unpacked = {**GROUP, "need_pack": False, "calib_algo": "mse"}
    assert export_problems(combined(unpacked, GROUP)) == []
    (found,) = export_problems(combined({**GROUP, "group_size": 64}, GROUP))
    assert found == (
        "steps.0.quant.weight: differs from steps.1.quant.weight; all steps of a recipe share "
        "one weight section: write the same"
    )
    assert unserved(combined(unpacked, GROUP)) is None
    assert str(unserved(combined(GROUP, unpacked))).startswith("steps.1.quant.weight.need_pack: ")


def test_what_no_code_computes_yet():
    assert not_implemented(load_recipe("demo/w4a16")) == []
    act = {"bit": "e4m3", "granularity": "per_tensor", "static": True, "calib_algo": "static_hist"}
    (found,) = not_implemented(quantized({**CHANNEL, "bit": "e4m3"}, act))
    assert found.startswith("quant.act.calib_algo: static_hist is not implemented")


def test_unpacked_codes_are_for_transformers():
    unpacked = quantized({**GROUP, "need_pack": False})
    assert export_problems(unpacked) == []
    assert unserved(unpacked) == (
        "quant.weight.need_pack: false: unpacked codes are read by transformers only, not by "
        "SGLang; write need_pack: true to serve the export"
    )
    for served in (quantized(GROUP), quantized(CHANNEL, TOKEN), quantized(E4M3, E4M3_TOKEN)):
        assert unserved(served) is None
