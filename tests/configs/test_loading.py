"""Files, shipped names, overrides and YAML's own features."""

import json
import subprocess
import sys

import pytest

from configs.loading import (
    RecipeError,
    load_recipe,
    parse_recipe,
    shipped_names,
    shipped_recipes,
)
from configs.schemes import export_problems, not_implemented


def test_importing_configs_imports_no_torch():
    code = "import configs.loading, configs.schemes, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "name", ["rtn_w4a16", "rtn_w4a16.yml", "configs/rtn_w4a16", "./configs/rtn_w4a16.yml"]
)
def test_a_shipped_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == load_recipe("rtn_w4a16")


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtn_w4a16.yml").write_text(
        "quant: {method: RTN, weight: {bit: 3, granularity: per_channel}}"
    )
    recipe = load_recipe("rtn_w4a16.yml")
    assert recipe.quant is not None
    assert recipe.quant.weight.bit == 3


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtn_w4a16").mkdir()
    assert load_recipe("rtn_w4a16").quant is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtn_w4a61", "no such file or shipped recipe; did you mean 'rtn_w4a16'"),
        ("fp8/rtn_fp8_blok.yml", "did you mean 'fp8/rtn_fp8_block'"),
        ("zzz.yml", f"shipped recipes: {', '.join(shipped_names())}"),
        ("/", "is a folder, not a recipe; shipped recipes: "),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_a_missing_file_offers_the_nearest_shipped_names(name, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shipped_recipes_tell_what_they_are():
    told = {r.name: (r.scheme, r.method, r.needs) for r in shipped_recipes()}
    assert (
        told.items()
        >= {
            "demo/w4a16": ("W4A16", "Identity", "nothing"),
            "demo/w8a16": ("W8A16", "Identity", "nothing"),
            "fp8/rtn_fp8": ("FP8 dynamic", "RTN", "nothing"),
            "fp8/rtn_fp8_block": ("FP8 block", "RTN", "nothing"),
            "rtn_w4a16": ("W4A16", "RTN", "nothing"),
            "rtn_w4a16_asym": ("W4A16 asym", "RTN", "nothing"),
            "rtn_w8a16": ("W8A16", "RTN", "nothing"),
            "rtn_w8a8": ("W8A8", "RTN", "nothing"),
        }.items()
    )
    assert all(recipe.path.is_file() for recipe in shipped_recipes())


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_recipe_is_served_and_implemented_and_names_no_model(name):
    recipe = load_recipe(name)
    assert export_problems(recipe) == []
    assert not_implemented(recipe) == []
    assert recipe.model.path is None
    assert recipe.save.save_sgl


def test_overrides_apply_in_order_and_make_sections():
    recipe = load_recipe(
        "rtn_w4a16",
        [
            "quant.weight.group_size=64",
            "quant.weight.group_size=32",
            "eval.windows=4",
            "model.path=/models/llama 3",
            "ignored_layers=[lm_head]",
            "calib=",
        ],
    )
    assert recipe.quant is not None
    assert recipe.quant.weight.group_size == 32
    assert recipe.resolved_eval().windows == 4
    assert recipe.model.path == "/models/llama 3"
    assert recipe.ignored_layers == ("lm_head",)
    assert recipe.calib is None


def test_overrides_reach_the_items_of_a_list(tmp_path):
    file = tmp_path / "steps.yml"
    file.write_text(
        "steps: [{quant: &q {method: RTN, weight: {bit: 8, granularity: per_channel}}}, "
        "{quant: *q}]"
    )
    recipe = load_recipe(file, ["steps.1.quant.weight.bit=4"])
    # The anchor's other place keeps its value.
    assert [step.quant.weight.bit for step in recipe.resolved_steps()] == [8, 4]
    with pytest.raises(RecipeError, match=r"'2' is no item of a list of 2; write 0 to 1"):
        load_recipe(file, ["steps.2.quant.weight.bit=4"])
    with pytest.raises(RecipeError, match="'0' is of a list that the recipe does not have"):
        load_recipe("rtn_w4a16", ["steps.0.quant.weight.bit=8"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "quant.weight.symetric=true",
            "override 'quant.weight.symetric=true': quant.weight.symetric: unknown key; "
            "did you mean 'symmetric'?",
        ),
        (
            "qant.weight.bit=4",
            "override 'qant.weight.bit=4': qant: unknown key; did you mean 'quant'?",
        ),
        (
            "quant.weight.bit=four",
            "override 'quant.weight.bit=four': quant.weight.bit: 'four' is not a number of bits "
            "(2..8), e4m3 or e5m2",
        ),
        ("quant.weight.bit", "override 'quant.weight.bit': write it as key.path=value"),
        ("=4", "override '=4': write it as key.path=value"),
        ("quant..bit=4", "override 'quant..bit=4': write it as key.path=value"),
        (
            "quant.method.x=4",
            "override 'quant.method.x=4': 'x' lies below 'RTN', which has no keys",
        ),
        (
            "quant.weight=[1",
            "override 'quant.weight=[1': line 1, column 3: expected ',' or ']', but got "
            "'<stream end>'",
        ),
    ],
)
def test_a_wrong_override_is_named(override, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe("rtn_w4a16", [override])
    assert str(caught.value) == expected


def test_an_error_of_the_file_is_not_blamed_on_an_override(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text("quant: {method: RTN, weight: {bit: 9, granularity: per_channel}}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["base.seed=1"])
    assert str(caught.value).startswith(f"{file}: quant.weight.bit: 9 is not")


def test_anchors_and_merges_are_no_duplicates(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text(
        "base: {seed: &seed 7}\n"
        "calib: &text {name: pileval, seed: *seed, n_samples: 8}\n"
        "steps:\n"
        "  - calib: &mine {<<: *text, n_samples: 16}\n"
        "    quant: &q {method: GPTQ, weight: {bit: 8, granularity: per_channel}}\n"
        "  - {quant: *q, calib: {<<: *mine, seq_len: 64}}\n"
    )
    first, second = load_recipe(file).resolved_steps()
    assert first.calib is not None and second.calib is not None
    assert (first.calib.n_samples, first.calib.seed) == (16, 7)
    assert (second.calib.n_samples, second.calib.seq_len) == (16, 64)


def test_empty_sections_are_sections_without_keys():
    data = {
        "base": None,
        "model": None,
        "save": None,
        "eval": None,
        "calib": None,
        "ignored_layers": None,
        "quant": {
            "method": "RTN",
            "weight": {"bit": 8, "granularity": "per_channel"},
            "special": None,
            "act": None,
        },
    }
    assert parse_recipe(data, "x").canonical() == parse_recipe(
        {"quant": {"method": "RTN", "weight": {"bit": 8, "granularity": "per_channel"}}}, "x"
    ).canonical()  # fmt: skip


@pytest.mark.parametrize("name", shipped_names())
def test_a_recipe_is_the_same_after_it_was_told_as_json(name):
    recipe = load_recipe(name, ["eval.windows=3", "serving.tensor_parallel=2"])
    told = json.dumps(recipe.model_dump(mode="json", exclude_unset=True))
    heard = parse_recipe(json.loads(told), "x")
    assert heard == recipe and heard.model_fields_set == recipe.model_fields_set
    assert heard.canonical() == recipe.canonical()
