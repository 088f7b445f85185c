"""Sweeps are read strictly; whatever is wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import RecipeError
from configs.loading import load_recipe, shipped_names
from configs.sweep_schema import load_sweep, shipped_sweeps
from tests.conftest import ROOT
from tests.models import DEMO_MODEL

SMALLEST = "models: [a]\nrecipes: [b]\n"


def sweep_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    return path


def test_the_smallest_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_of(tmp_path, SMALLEST))
    assert (sweep.name, sweep.output, sweep.set) == ("mine", None, ())
    assert [(m.path, m.label) for m in sweep.models] == [("a", "a")]
    assert [(r.path, r.label) for r in sweep.recipes] == [("b", "b")]
    assert [o.set for o in sweep.overrides] == [()]


def test_names_are_given_or_made(tmp_path: Path) -> None:
    text = """
models: [/x/y/model-one/, org/two, {name: three, path: ../3}]
recipes: [fp8/rtn_fp8, some/where/mine.yml, {name: other, path: rtn_w4a16}]
overrides: [quant.weight.group_size=64, [eval.windows=2, base.seed=1], {name: plain}]
set: eval.seq_len=32
"""
    sweep = load_sweep(sweep_of(tmp_path, text))
    assert [m.label for m in sweep.models] == ["model-one", "two", "three"]
    assert [r.label for r in sweep.recipes] == ["fp8-rtn_fp8", "mine", "other"]
    assert [o.label for o in sweep.overrides] == ["group_size-64", "windows-2-seed-1", "plain"]
    assert sweep.overrides[1].set == ("eval.windows=2", "base.seed=1")
    assert sweep.set == ("eval.seq_len=32",)


@pytest.mark.parametrize("path", ["demo", str(ROOT / "configs" / "sweeps" / "demo.yml")])
def test_a_shipped_sweep_finds_its_model_from_anywhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (model,) = load_sweep(path).models
    assert (Path(model.path), model.label) == (DEMO_MODEL, "demo-model")
    # of one's own, paths are what they are
    own = sweep_of(tmp_path, "models: [assets/demo-model]\nrecipes: [b]")
    assert load_sweep(own).models[0].path == "assets/demo-model"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no sweep; it needs lists models: and recipes:"),
        ("[a, b]", "holds no sweep; it needs lists models: and recipes:"),
        ("models: [a]\nrecips: [b]", "recips: unknown key; did you mean 'recipes'? (and 1 more)"),
        ("recipes: [b]", "models: missing; give a list of folders or hub ids"),
        ("models: []\nrecipes: [b]", "models: is an empty list; write at least one"),
        ("models: a\nrecipes: [b]", "models: 'a' is not a list; write it as [a, b]"),
        ("models: [{name: x}]\nrecipes: [b]", "models.0.path: missing; give a folder or a hub id"),
        ("models: [a]\nrecipes: [1]", "recipes.0.path: 1 is not text; put it in quotes"),
        (SMALLEST + "overrides: []", "overrides: is an empty list; write at least one"),
        (SMALLEST + "overrides: [{sets: [a=1]}]", "overrides.0.sets: unknown key; did you mean 's"),
        (
            SMALLEST + "overrides: [{name: ../up}]",
            "overrides.0.name: '../up' is no name of a folder; write letters, digits, dashes and",
        ),
        (SMALLEST + "name: a/b", "name: 'a/b' is no name of a folder; write letters"),
        (SMALLEST + "models: [c]", "line 3, column 1: key 'models' is given twice; keep one"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = sweep_of(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_sweep_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="dem: no such file or shipped sweep; shipped sweeps: d"):
        load_sweep("dem")


def test_shipped_sweeps_name_what_is_there() -> None:
    assert "demo" in shipped_sweeps()
    assert not [name for name in shipped_names() if name.startswith("sweeps")]
    root = Path(__file__).parent.parent.parent
    for name in shipped_sweeps():
        sweep = load_sweep(name)
        assert sweep == load_sweep(root / "configs" / "sweeps" / f"{name}.yml")
        for recipe in sweep.recipes:
            for overrides in sweep.overrides:
                load_recipe(recipe.path, [*sweep.set, *overrides.set])
        assert all((root / model.path).is_dir() for model in sweep.models)
