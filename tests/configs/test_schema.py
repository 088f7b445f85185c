"""Defaults, resolution and the canonical form."""

import hashlib
import json
from contextlib import nullcontext

import pytest
from pydantic import ValidationError

from configs.effects import ineffective_keys, ineffective_reasons
from configs.errors import RecipeError
from configs.fields import NoEffect, Section
from configs.loading import load_recipe, parse_recipe
from configs.special_keys import AwqSpecial, GptqSpecial
from tests.conftest import ROOT

QUANT = {"method": "RTN", "weight": {"bit": 8, "granularity": "per_channel"}}
IDENTITY = {**QUANT, "method": "Identity"}


def parse(**sections):
    return parse_recipe({"quant": QUANT, **sections}, "x.yml")


def test_recipes_are_frozen():
    recipe = parse()
    with pytest.raises(ValidationError):
        recipe.base = None


def test_without_eval_the_model_writes_other_text_than_for_calibration():
    evaluation = parse(base={"seed": 7}).resolved_eval()
    assert evaluation.name == "self_generated"
    assert (evaluation.windows, evaluation.seq_len, evaluation.seed) == (16, 512, 8)


def test_evaluation_defaults_follow_the_text():
    known = parse(eval={"name": "wikitext2"}).resolved_eval()
    assert (known.windows, known.seq_len, known.seed, known.dtype) == (None, 2048, 43, "auto")
    own = parse(eval={"windows": 4}).resolved_eval()
    assert (own.name, own.windows, own.seq_len) == ("self_generated", 4, 512)


def test_steps_fall_back_to_the_recipes_calibration_and_seed():
    recipe = parse_recipe(
        {
            "base": {"seed": 3},
            "calib": {"name": "pileval"},
            "steps": [
                {"quant": {**QUANT, "method": "Quarot"}},
                {"quant": IDENTITY},
                {"name": "last", "quant": IDENTITY, "calib": {"name": "c4", "seed": 9}},
            ],
        },
        "x.yml",
    )
    rotation, first, last = recipe.resolved_steps()
    assert rotation.calib is None
    assert first.calib is not None and last.calib is not None
    assert (first.calib.name, first.calib.seed) == ("pileval", 3)
    assert (last.calib.name, last.calib.seed) == ("c4", 9)
    assert (first.calib.n_samples, first.calib.seq_len, first.calib.bs) == (128, 512, -1)


@pytest.mark.parametrize("granularity", ["per_group", "per-group", "per_channel"])
def test_a_group_of_a_whole_row_is_a_channel(granularity):
    quant = {**QUANT, "weight": {"bit": 4, "granularity": granularity, "group_size": -1}}
    weight = parse(quant=quant).quant.weight
    assert (weight.granularity, weight.group_size) == ("per_channel", None)


def test_a_group_of_a_whole_token_is_a_token():
    act = {"bit": 8, "granularity": "per_group", "group_size": -1}
    read = parse(quant={**QUANT, "act": act}).quant.act
    assert (read.granularity, read.group_size) == ("per_token", None)


def test_blocks_are_128_wide_unless_said_otherwise():
    quant = {**QUANT, "weight": {"bit": "E4M3", "granularity": "per_block"}}
    assert parse(quant=quant).quant.weight.block_size == 128
    assert parse().quant.weight.block_size is None


def test_special_keys_have_the_methods_type_and_defaults():
    calib = {"name": "pileval"}
    gptq = parse(quant={**QUANT, "method": "gptq", "special": {"percdamp": "1e-1"}}, calib=calib)
    assert isinstance(gptq.quant.special, GptqSpecial)
    assert (gptq.quant.special.percdamp, gptq.quant.special.blocksize) == (0.1, 128)
    awq = parse(quant={**QUANT, "method": "awq"}, calib=calib)
    assert isinstance(awq.quant.special, AwqSpecial)
    assert awq.quant.special.trans_version == "v2"


@pytest.mark.parametrize(
    ("given", "said"), [(-1, "give at least 0"), (65, "give at most 64"), (True, "true is not")]
)
def test_sweeps_of_descent_are_a_number_within_reason(given, said):
    quant = {**QUANT, "method": "GPTQ"}
    assert parse(quant=quant, calib={"name": "pileval"}).quant.special.descend == 0
    with pytest.raises(RecipeError, match=said):
        parse(quant={**quant, "special": {"descend": given}}, calib={"name": "pileval"})


def test_llmcs_ignored_layers_become_full_names():
    layers = {
        "block_ids": [0, "2-3"],
        "layer_names": ["mlp.down_proj"],
        "speical_names": ["model.layers.5.self_attn.o_proj"],
    }
    assert parse(ignored_layers=layers).ignored_layers == (
        "model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
        "model.layers.5.self_attn.o_proj",
    )


def digest(recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.canonical(), sort_keys=True).encode()).hexdigest()


def test_the_canonical_form_of_a_recipe():
    assert load_recipe("demo/w4a16").canonical() == {
        "base": {"seed": 42},
        "model": {"torch_dtype": "auto"},
        "steps": [
            {
                "quant": {
                    "method": "Identity",
                    "weight": {
                        "bit": 4,
                        "symmetric": True,
                        "granularity": "per_group",
                        "group_size": 128,
                        "block_size": None,
                        "need_pack": True,
                        "calib_algo": "minmax",
                    },
                    "act": None,
                    "special": {},
                    "quant_out": False,
                },
                "calib": {
                    "name": "self_generated",
                    "path": None,
                    "n_samples": 8,
                    "seq_len": 256,
                    "preproc": None,
                    "text_column": "text",
                    "split": None,
                    "seed": 1,
                },
            }
        ],
        "eval": {
            "name": "self_generated",
            "path": None,
            "seq_len": 256,
            "windows": 8,
            "text_column": "text",
            "split": None,
            "seed": 2,
            "dtype": "auto",
            "type": "ppl",
        },
        "ignored_layers": [],
    }


def test_the_digest_does_not_move():
    # A change here recomputes every stored result: it wants a reason and a line in CHANGELOG.md.
    assert (
        digest(load_recipe("rtn_w4a16"))
        == "11adbf93b8452db9240c8b009031850eb49c1bc7799b3827314268efc9d7fc0a"
    )


@pytest.mark.parametrize(
    "same",
    [
        {"model": {"path": "elsewhere", "type": "Llama", "tokenizer_mode": "slow"}},
        {"save": {"save_path": "elsewhere", "save_trans": True}},
        {"calib": {"name": "pileval"}},
        {"eval": {"bs": 4, "download": True, "inference_per_block": True}},
        {"quant": {**QUANT, "quant_type": "int-quant", "quant_out": True}},
        {"quant": None, "steps": [{"name": "only", "quant": QUANT}]},
        {"base": {"seed": 42}},
    ],
)
def test_what_changes_no_result_changes_no_digest(same):
    assert digest(parse(**same)) == digest(parse())


@pytest.mark.parametrize(
    "other",
    [
        {"base": {"seed": 43}},
        {"quant": {**QUANT, "weight": {"bit": 4, "granularity": "per_channel"}}},
        {"quant": IDENTITY, "calib": {"name": "pileval"}},
        {"eval": {"windows": 17}},
        {"ignored_layers": ["a"]},
        {"model": {"torch_dtype": "float32"}},
    ],
)
def test_what_changes_a_result_changes_the_digest(other):
    assert digest(parse(**other)) != digest(parse())


def test_ineffective_keys_are_those_that_were_given():
    assert ineffective_keys(parse()) == []
    weight = {**QUANT["weight"], "use_qtorch": True, "ste": True, "calib_algo": "learnable"}
    act = {"bit": 8, "granularity": "per_token", "qmax_to_tensor": True}
    recipe = parse(
        model={"tokenizer_mode": "slow", "type": "Llama"},
        calib={"name": "pileval"},
        quant={**QUANT, "weight": weight, "act": act, "quant_out": True},
        save={"save_fake": False, "save_sgl": True},
        eval={"eval_pos": "fake_quant", "bs": 1},
    )
    assert ineffective_keys(recipe) == [
        "model.type",
        "model.tokenizer_mode",
        "eval.eval_pos",
        "quant.weight.use_qtorch",
        "quant.weight.ste",
        "quant.act.qmax_to_tensor",
        "save.save_fake",
        "quant.weight.calib_algo",
        "quant.quant_out",
        "calib",
    ]
    assert ineffective_reasons(recipe)["quant.weight.use_qtorch"] == "torch has native float8"


def test_ineffective_keys_inside_steps_and_special():
    awq = {**QUANT, "method": "Awq", "special": {"awq_bs": 1, "save_mem": True, "trans": True}}
    step = {"quant": {**QUANT, "quant_out": True}, "calib": {"name": "c4"}}
    recipe = parse_recipe({"calib": {"name": "pileval"}, "steps": [step, {"quant": awq}]}, "x")
    assert ineffective_keys(recipe) == [
        "steps.1.quant.special.awq_bs",
        "steps.1.quant.special.save_mem",
        "steps.0.quant.quant_out",
        "steps.0.calib",
    ]


@pytest.mark.parametrize(("bit", "unread"), [("e4m3", True), (8, False)])
def test_clips_of_floats_are_not_searched_before_they_are_learned(bit, unread):
    weight = {"bit": bit, "granularity": "per_channel"}
    learned = {"method": "OmniQuant", "weight": weight, "special": {"search_clip_init": True}}
    recipe = parse(quant=learned, calib={"name": "pileval"})
    assert ineffective_keys(recipe) == ["quant.special.search_clip_init"] * unread


def test_keys_without_effect_are_documented():
    def marked(section):
        return {
            name
            for name, field in section.model_fields.items()
            if any(isinstance(mark, NoEffect) for mark in field.metadata)
        }

    def sections(section):
        return {section}.union(*(sections(other) for other in section.__subclasses__()))

    documented = (ROOT / "docs" / "recipes.md").read_text().split("## Keys without effect")[1]
    named = documented.split("\n## ")[0]
    keys = set().union(*(marked(section) for section in sections(Section)))
    assert len(keys) > 20
    missing = {key for key in keys if f"`{key}`" not in named and f".{key}`" not in named}
    assert not missing


@pytest.mark.parametrize(
    ("save", "quantized"),
    [({}, True), ({"save_trans": True}, False), ({"save_trans": True, "save_sgl": True}, True)],
)
def test_a_model_before_rounding_is_asked_for_alone_or_beside_the_export(save, quantized):
    assert parse(save=save).save.save_sgl is quantized


def test_a_search_for_ranges_needs_scales_that_are_found_before():
    weight = {"bit": 4, "granularity": "per_group", "group_size": 128, "calib_algo": "mse"}
    gptq = {"method": "GPTQ", "weight": weight, "special": {"static_groups": False}}
    with pytest.raises(RecipeError, match="calib_algo mse searches ranges before"):
        parse(quant=gptq, calib={"name": "pileval"})
    parse(quant={**gptq, "special": {}}, calib={"name": "pileval"})


AWQ = {"method": "Awq", "special": {"weight_clip": True}}
LEARNED = {"method": "OmniQuant", "special": {"lwc": True}}
SCALED = {"method": "OmniQuant", "special": {"lwc": False, "let": True}}


@pytest.mark.parametrize(
    ("before", "refused"),
    [
        ([AWQ], "steps.0.quant.special.weight_clip"),
        ([LEARNED], "steps.0.quant.special.lwc"),
        ([AWQ, {"method": "RTN"}], "steps.0.quant.special.weight_clip"),
        ([SCALED, AWQ], "steps.1.quant.special.weight_clip"),
        ([{**AWQ, "special": {"weight_clip": False}}], None),
        # ranges hold until weights are scaled
        ([AWQ, SCALED], None),
        ([AWQ, {"method": "SmoothQuant"}], None),
        ([{"method": "RTN"}], None),
    ],
)
def test_ranges_of_a_step_need_scales_that_are_found_before(before, refused):
    weight = {"bit": 4, "granularity": "per_group", "group_size": 128}
    gptq = {"method": "GPTQ", "special": {"static_groups": False}}
    steps = [{"quant": {**quant, "weight": weight}} for quant in (*before, gptq)]
    said = f"steps.{len(before)}.quant.special.static_groups: false.*{refused} finds"
    with nullcontext() if refused is None else pytest.raises(RecipeError, match=said):
        parse_recipe({"steps": steps, "calib": {"name": "pileval"}}, "x.yml")
    steps[-1]["quant"]["special"] = {}
    parse_recipe({"steps": steps, "calib": {"name": "pileval"}}, "x.yml")


@pytest.mark.parametrize(("granularity", "served"), [("per_tensor", False), ("per_channel", True)])
def test_scales_that_rows_share_are_not_refitted(granularity, served):
    weight = {"bit": "e4m3", "granularity": granularity}
    gptq = {"method": "GPTQ", "weight": weight, "special": {"refit_scales": 1}}
    refused = pytest.raises(RecipeError, match=f"special.refit_scales: scales {granularity} ")
    with nullcontext() if served else refused:
        parse(quant=gptq, calib={"name": "pileval"})
