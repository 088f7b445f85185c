"""Results of every kind of step, damaged all at once: made again, and the same bytes published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.quantize_model import quantize_model
from tasks.engine.store import Entry, Store
from tests.integration.resuming import contents
from tests.questions import make_task

pytestmark = pytest.mark.usefixtures("services")
SETTINGS = ["serving.smoke_test=false", "serving.check_kernels=false", "eval.sample_tokens=4"]
# recipe: its own settings, and kinds of steps that are among those it makes
RECIPES: dict[str, tuple[list[str], set[str]]] = {
    "awq_w4a16": (
        ["calib", "quant.special.ratios=4", "eval.lm_eval.tasks"],
        {"transform", "clip", "sample_text", "task_scores"},
    ),
    "w4a16_combin": (
        [
            "steps.0.calib",
            "steps.1.calib",
            "steps.1.quant.special.epochs=1",
            "save.save_trans=true",
        ],
        {"learn", "transformed", "export_transformed"},
    ),
    "w8a8_combin": (["steps.1.calib"], {"rotate", "advance", "verify", "evaluate"}),
}


def quantized(home: Path, model: Path, text: Path, name: str, recipe: str) -> dict[str, Any]:
    source = f"{{name: text, path: {text}, n_samples: 4, seq_len: 32}}"
    made = {"calib": source, "tasks": str(make_task(home))}
    asked = [
        f"{setting}={made[key]}" if (key := setting.split(".")[-1]) in made else setting
        for setting in RECIPES[recipe][0]
    ]
    asked.insert(0, f"eval={{name: text, path: {text}, windows: 2, seq_len: 32}}")
    result: dict[str, Any] = quantize_model(
        recipe, str(model), str(home / name), [*asked, *SETTINGS], store=str(home / "store")
    )
    return result


def damage(entry: Entry) -> None:
    """Change a byte of one of its files, in a file of its own; of its manifest if it has none."""
    path = entry.folder / min(entry.files, default="manifest.json")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kind_of_result_is_made_again(
    home: Path, tiny: Path, words: Path, recipe: str
) -> None:
    quantized(home, tiny, words, "first", recipe)
    store = Store(home / "store")
    kinds = {entry.task: entry for entry in store.entries()}
    assert RECIPES[recipe][1] <= set(kinds)
    for entry in kinds.values():
        damage(entry)
    assert all(store.get(entry.key) is None for entry in kinds.values())
    again = quantized(home, tiny, words, "again", recipe)
    made = {step["step"].split("[")[0] for step in again["steps"] if not step["cached"]}
    # which are not drawn by a step
    assert made == set(kinds) - {"pictures"}
    assert contents(home / "again") == contents(home / "first")
    whole = Store(home / "store")
    assert all(whole.get(entry.key) is not None for entry in kinds.values())
