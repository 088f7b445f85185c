"""Whatever is wrong with a recipe is one line that names the place and how to mend it."""

import copy

import pytest

from configs.loading import RecipeError, load_recipe, parse_recipe

RTN = {"quant": {"method": "RTN", "weight": {"bit": 8, "granularity": "per_channel"}}}
ACT = {"bit": 8, "granularity": "per_token"}
TEXT = {"name": "pileval"}


def changed(path: str, value: object, base: dict = RTN) -> dict:
    data = copy.deepcopy(base)
    *way, key = path.split(".")
    node = data
    for part in way:
        node = node.setdefault(part, {})
    node[key] = value
    return data


def error_of(data: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "configs/x.yml")
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("quant.weight.symetric", True, "unknown key; did you mean 'symmetric'?"),
        ("qant", {}, "unknown key; did you mean 'quant'?"),
        ("save.save_sglang", True, "unknown key; did you mean 'save_sgl'?"),
        ("base.sed", 1, "unknown key; did you mean 'seed'?"),
        ("base.gpu", 1, "unknown key; the nearest valid key is 'seed' of seed"),
        ("quant.special.alpha", 1, "unknown key; the method takes no special keys: remove it"),
        ("model.tokeniser_mode", "slow", "unknown key; did you mean 'tokenizer_mode'?"),
        (
            "quant.weight.bit",
            "four",
            "'four' is not a number of bits (2..8), e4m3 or e5m2",
        ),
        ("quant.weight.bit", 16, "16 is not a number of bits (2..8), e4m3 or e5m2"),
        ("quant.weight.bit", True, "True is not a number of bits (2..8), e4m3 or e5m2"),
        ("quant.weight.bit", None, "has no value; give a number of bits (2..8), e4m3 or e5m2"),
        (
            "quant.method",
            "AWK",
            "'AWK' is not a known method (RTN, Identity, Awq, GPTQ, SmoothQuant, OsPlus, "
            "OmniQuant, Quarot); did you mean 'Awq'?",
        ),
        (
            "quant.method",
            "HQQX",
            "'HQQX' is not a known method (RTN, Identity, Awq, GPTQ, SmoothQuant, OsPlus, "
            "OmniQuant, Quarot)",
        ),
        (
            "quant.method",
            None,
            "has no value; give one of RTN, Identity, Awq, GPTQ, SmoothQuant, OsPlus, "
            "OmniQuant, Quarot",
        ),
        (
            "quant.weight.granularity",
            "per_grup",
            "'per_grup' is not one of per_tensor, per_channel, per_group, per_block; "
            "did you mean 'per_group'?",
        ),
        ("quant.quant_type", "flot_quant", "'flot_quant' is not one of int_quant, float_quant; "
         "did you mean 'float_quant'?"),
        ("quant.weight.need_pack", "perhaps", "'perhaps' is neither true nor false"),
        ("base.seed", "x", "'x' is not a whole number"),
        ("base.seed", 1.5, "1.5 is not a whole number"),
        ("base.seed", True, "true is not a whole number"),
        ("base.seed", -1, "-1 is out of range; give at least 0"),
        ("base.seed", 2**32, "4294967296 is out of range; give at most 4294967295"),
        ("base.seed", None, "has no value; give one, or remove the key"),
        ("model.path", 8, "8 is not text; put it in quotes"),
        ("ignored_layers", "lm_head", "'lm_head' is not a list; write it as [a, b]"),
        ("save", "here", "'here' is not a section; write its keys below it, indented"),
        ("quant", [1], "[1] is not a section; write its keys below it, indented"),
        ("eval.type", "acc", "'acc' is not one of ppl"),
        ("calib.download", True, None),
    ],
)  # fmt: skip
def test_the_line_for_one_wrong_key(path, value, expected):
    if expected is None:
        data, path = changed(path, value), "calib.name"
        expected = (
            "missing; give one of pileval, wikitext2, c4, text, jsonl, parquet, dataset, "
            "self_generated"
        )
    else:
        data = changed(path, value)
    assert error_of(data) == f"configs/x.yml: {path}: {expected}"


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"bit": 4, "granularity": "per_group"}, "needs a group_size; write group_size: 128"),
        (
            {"bit": 8, "granularity": "per_channel", "group_size": 128},
            "group_size means nothing with granularity per_channel: remove it, or write "
            "granularity: per_group",
        ),
        (
            {"bit": 8, "granularity": "per_channel", "block_size": 128},
            "block_size means nothing with granularity per_channel",
        ),
        (
            {"bit": "e4m3", "granularity": "per_channel", "symmetric": False},
            "e4m3 has no zero point: write symmetric: true",
        ),
    ],
)
def test_weight_keys_that_contradict_each_other(weight, expected):
    text = error_of(changed("quant.weight", weight))
    assert text.startswith("configs/x.yml: quant.weight: ")
    assert expected in text


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ({**ACT, "static": True}, "static needs granularity per_tensor, not per_token"),
        ({**ACT, "group_size": 128}, "group_size means nothing with granularity per_token"),
        ({"bit": 8, "granularity": "per_group"}, "write group_size: 128"),
        ({"bit": "e5m2", "granularity": "per_token", "symmetric": False}, "e5m2 has no zero"),
    ],
)
def test_act_keys_that_contradict_each_other(act, expected):
    text = error_of(changed("quant.act", act))
    assert text.startswith("configs/x.yml: quant.act: ")
    assert expected in text


def test_a_number_format_that_contradicts_quant_type():
    data = changed("quant.quant_type", "float_quant")
    assert error_of(data) == (
        "configs/x.yml: quant: quant_type float_quant contradicts weight.bit 8: "
        "remove it, or write weight.quant_type: int_quant"
    )


def test_a_section_of_its_own_kind_wins_over_quants():
    data = changed("quant.quant_type", "float_quant")
    data["quant"]["weight"]["quant_type"] = "int-quant"
    data["quant"]["act"] = {"bit": "e4m3", "granularity": "per_token"}
    assert parse_recipe(data, "x").quant is not None


@pytest.mark.parametrize(
    ("method", "key", "reason"),
    [
        ("GPTQ", "owq", "OWQ keeps some columns in 16 bits"),
        ("GPTQ", "online_rotate", "rotate activations while it runs"),
        ("Quarot", "online_rotate", "rotate activations while it runs"),
    ],
)
def test_what_is_not_offered_is_refused_with_the_reason(method, key, reason):
    data = changed("quant.special", {key: True}, changed("quant.method", method))
    data["calib"] = TEXT
    text = error_of(data)
    assert text.startswith(f"configs/x.yml: quant.special.{key}: true is not offered: ")
    assert reason in text
    data["quant"]["special"][key] = False
    parse_recipe(data, "x")


def test_special_keys_are_those_of_the_method():
    data = {**changed("quant.method", "GPTQ"), "calib": TEXT}
    data["quant"]["special"] = {"perc_damp": 0.1}
    assert error_of(data) == (
        "configs/x.yml: quant.special.perc_damp: unknown key; did you mean 'percdamp'?"
    )
    data["quant"]["special"] = {"percdamp": 0}
    assert error_of(data) == (
        "configs/x.yml: quant.special.percdamp: 0 is out of range; give more than 0"
    )


def test_a_wrong_method_is_reported_before_its_special_keys():
    data = changed("quant.special", {"alpha": 1}, changed("quant.method", "nope"))
    assert error_of(data).startswith("configs/x.yml: quant.method: 'nope' is not a known method")


def test_the_first_of_several_errors_is_told_and_the_others_counted():
    data = changed("quant.weight", {"bits": 4, "granularity": "per_chanel"})
    assert error_of(data) == (
        "configs/x.yml: quant.weight.bits: unknown key; did you mean 'bit'? (and 2 more)"
    )


def test_missing_keys_say_what_to_give():
    assert error_of(changed("quant.weight", {"granularity": "per_channel"})) == (
        "configs/x.yml: quant.weight.bit: missing; give a number of bits (2..8), e4m3 or e5m2"
    )
    assert error_of({"base": {}}) == (
        "configs/x.yml: quant: missing; give a section quant with method and weight, "
        "or a list steps"
    )


def test_places_inside_steps_carry_their_number():
    data = {"steps": [RTN, changed("quant.weight.granularity", 3)]}
    assert error_of(data).startswith("configs/x.yml: steps.1.quant.weight.granularity: 3 is not")
    data = {"steps": [changed("quant.special", {"x": 1})]}
    assert error_of(data).startswith("configs/x.yml: steps.0.quant.special.x: unknown key; the ")


def test_quant_and_steps_exclude_each_other():
    assert error_of({**RTN, "steps": [RTN]}) == (
        "configs/x.yml: quant and steps are both given: keep one of them"
    )
    assert "quant: missing" in error_of({"steps": []})


@pytest.mark.parametrize("steps", [False, True])
def test_a_calibrated_method_without_text(steps):
    data = changed("quant.method", "Identity")
    assert error_of({"steps": [RTN, data]} if steps else data) == (
        "configs/x.yml: calib: missing; method Identity needs calibration text: write "
        "calib: {name: pileval, n_samples: 128, seq_len: 512}"
    )


def test_static_scales_need_text_whatever_the_method():
    act = {"bit": "e4m3", "granularity": "per_tensor", "static": True}
    data = changed("quant.act", act)
    assert "calib: missing; act.static: true needs" in error_of(data)
    assert parse_recipe({**data, "calib": TEXT}, "x").resolved_steps()[0].calib is not None


@pytest.mark.parametrize("section", ["calib", "eval"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "jsonl"}, "path: missing; name jsonl needs the path of a JSON lines file"),
        ({"name": "c4", "download": False}, "path: missing; with download: false, c4 is read"),
    ],
)
def test_text_that_cannot_be_found(section, data, expected):
    assert f"configs/x.yml: {section}: {expected}" in error_of({**RTN, section: data})


def test_self_generated_evaluation_is_kept_apart_from_calibration():
    own = {"name": "self_generated", "seed": 5}
    data = {**changed("quant.method", "Identity"), "calib": own, "eval": own}
    assert "eval.seed: 5 is the calibration's seed too" in error_of(data)
    parse_recipe({**data, "eval": {**own, "seed": 6}}, "x")
    # What no step reads is no calibration text.
    parse_recipe({**data, **RTN}, "x")
    assert "write windows: 16" in error_of({**RTN, "eval": {"windows": None}})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"blocks": [1]}, "unknown key 'blocks'; valid: block_ids, layer_names, speical_names"),
        ({"block_ids": 3}, "block_ids is not a list"),
        ({"block_ids": ["x"]}, "'x' in block_ids is neither a block's number nor a range"),
        ({"block_ids": ["7-4"]}, "'7-4' in block_ids runs backwards; write 4-7"),
    ],
)
def test_wrong_ignored_layers(value, expected):
    assert f"configs/x.yml: ignored_layers: {expected}" in error_of(
        {**RTN, "ignored_layers": value}
    )


def test_an_error_stays_one_line_whatever_the_key_holds():
    assert "unknown key" in error_of({**RTN, "two\nlines": 1})
    assert "is not text" in error_of(changed("model.path", ["a\nb"] * 30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quant: [1", "line 1, column 10: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("quant:\n  method: RTN\n  method: GPTQ", "line 3, column 3: key 'method' is given twice"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: \x00", "is not YAML: unacceptable character"),
        ("a: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("", "is empty; a recipe needs at least a section quant"),
        ("# only a comment\n", "is empty"),
        ("- quant", "holds a list instead of sections like quant:"),
        ("just text", "holds the value 'just text' instead of sections like quant:"),
        ("1: 2", "1: unknown key; the nearest valid key is"),
    ],
)
def test_files_that_are_no_recipe(text, expected, tmp_path):
    file = tmp_path / "x.yml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "x.yml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text, so not a recipe"):
        load_recipe(file)
