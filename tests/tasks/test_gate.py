"""What the registry is told of a checkpoint: its name, its figures, the limits of its scheme."""

from __future__ import annotations

import pytest

from configs.gate_schema import usual_limits
from configs.loading import RecipeError, load_recipe, shipped_names
from tasks.engine.gate import FAILED, NO, YES
from tasks.engine.journal import Journal, ToldRun
from tasks.engine.publication import work_identity
from tasks.engine.settings import Settings
from tasks.gate import failed_serving, figures_of, limits_of, model_name, offer, served_figures
from tasks.smoke_test import GapError

# docs/quality.md and the demo: NLL increase, KL, top-1 agreement of recipes measured here
MEASURED = {
    "rtn_w4a16": (0.0310, 0.0426, 0.858),
    "rtn_w8a16": (0.0002, 0.0001, 0.990),
    "rtn_w8a8": (0.0013, 0.0020, 0.966),
    "fp8/rtn_fp8": (0.0039, 0.0046, 0.949),
    "fp8/awq_fp8_static": (0.0046, 0.0051, 0.947),
    "demo/w4a16": (0.0796, 0.0682, 0.786),
    "demo/w8a16": (0.0003, 0.0002, 0.989),
}


def limits(name: str, *overrides: str):
    recipe = load_recipe(name, overrides)
    return limits_of(recipe.gate, recipe.resolved_steps()[-1].quant, 0.005)


@pytest.mark.parametrize(("name", "figures"), MEASURED.items())
def test_usual_limits_hold_for_what_shipped_recipes_lose(name, figures):
    found, (increase, kl, top1) = limits(name), figures
    assert increase <= found.max_nll_increase
    assert kl <= found.max_kl
    assert top1 >= found.min_top1_agreement


def test_fewer_bits_may_lose_more():
    kinds = [usual_limits(8, False), usual_limits(8, True), usual_limits(4, False)]
    assert [one.kl for one in kinds] == sorted(one.kl for one in kinds)


def test_limits_of_the_recipe_win():
    given = limits(
        "rtn_w4a16",
        *("gate.max_nll_increase=0", "gate.max_kl=0.5", "gate.max_server_nll_gap=0.001"),
        *("gate.require_served=true", "gate.against_champion.kl=0.01"),
    )
    assert given.max_nll_increase == 0
    assert given.max_kl == 0.5
    assert given.max_server_nll_gap == 0.001
    assert given.require_served is True
    assert given.against_champion.kl == 0.01
    usual = limits("rtn_w4a16")
    assert given.min_top1_agreement == usual.min_top1_agreement
    assert usual.max_server_nll_gap == 0.005


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gate.max_kl=-1", "gate.max_kl"),
        ("gate.min_top1_agreement=1.5", "gate.min_top1_agreement"),
        ("gate.max_kl=.nan", "gate.max_kl"),
        ("gate.max_kl=true", "true is not a number"),
        ("gate.model_name=a/b", "'a/b' is no name of a registered model: give one without / and :"),
        ("gate.model_name=' '", "is no name of a registered model"),
        ("gate.max_kll=1", "did you mean 'max_kl'?"),
        ("gate.against_champion.kll=1", "unknown key"),
    ],
)
def test_bad_limits(override, said):
    with pytest.raises(RecipeError) as error:
        load_recipe("rtn_w4a16", [override])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_changed_limit_is_no_other_work(job_of, demo_model):
    changed = ["gate.max_kl=0.5", "gate.registry=false", "gate.model_name=x"]
    one = job_of(demo_model, "rtn_w4a16")
    other = job_of(demo_model, "rtn_w4a16", *changed)
    assert other.recipe.canonical() == one.recipe.canonical()
    assert work_identity(one, None) == work_identity(other, None)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_has_limits(name):
    assert limits(name).min_top1_agreement >= 0.75


@pytest.mark.parametrize(
    ("source", "scheme", "name"),
    [
        ("demo-model", "W4A16", "demo-model-W4A16"),
        ("Qwen/Qwen3-8B", "W4A16 asym", "Qwen-Qwen3-8B-W4A16-asym"),
        ("my: model", "FP8 dynamic", "my-model-FP8-dynamic"),
    ],
)
def test_the_registered_models_name(source, scheme, name):
    assert model_name(source, scheme) == name


def test_figures_of_a_report():
    metrics = {"nll_increase": 0.1, "kl": 0.2, "top1_agreement": 0.8, "nll": 3.0}
    report = {"metrics": metrics, "unserved": None}
    served = {"served": True, "nll": 3.1, "nll_gap": 0.1, "tokens": 90}
    found = figures_of(report, served, "books", "abc")
    assert (found.nll_increase, found.kl, found.top1_agreement) == (0.1, 0.2, 0.8)
    assert (found.served, found.server_nll, found.server_nll_gap) == (YES, 3.1, 0.1)
    assert (found.evaluation, found.windows, found.scored) == ("books", "abc", 90)
    # a run that measured less
    assert figures_of({"metrics": {}, "unserved": None}, served, "", "").kl is None


def test_what_came_of_serving():
    no = served_figures({"served": False, "reason": "no GPU"})
    assert (no["served"], no["served_reason"], no["server_nll"]) == (NO, "no GPU", None)
    error = GapError("the server's NLL is 9", {"nll": 9.0, "nll_gap": 6.0, "tokens": 4})
    failed = served_figures(failed_serving(error))
    assert (failed["served"], failed["server_nll_gap"]) == (FAILED, 6.0)
    assert failed["served_reason"] == "the server's NLL is 9"
    assert served_figures(failed_serving(OSError("no room")))["served_reason"] == "OSError: no room"


@pytest.mark.parametrize(
    ("override", "location", "reason"),
    [
        ("gate.registry=false", "/exports/one", "gate.registry is false"),
        ("save.save_sgl=false", None, "no quantized checkpoint is published"),
        ("save={save_trans: true}", "/exports/one", "no quantized checkpoint is published"),
    ],
)
def test_what_is_not_registered_says_why(job_of, demo_model, tmp_path, override, location, reason):
    job = job_of(demo_model, "awq_w4a16" if "trans" in override else "rtn_w4a16", override)
    place = Settings(tmp_path / "store", "http://127.0.0.1:9", tmp_path / "a", tmp_path / "p")
    run = ToldRun(place, Journal(tmp_path / "journal.sqlite"))
    offer(job, run, "work", {}, location, None, {"served": False, "reason": "no GPU"})
    message = run.journal.first()
    assert message.kind == "set_tags"
    assert message.body == {"tags": {"gate": f"not registered: {reason}"}}
    run.close()
