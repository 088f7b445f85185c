"""What the benchmarks know of recipes."""

from __future__ import annotations

import typer

from configs.loading import load_recipe, shipped_names

# the demo's are the first two again
RECIPES = [name for name in shipped_names() if not name.startswith("demo/")]


def chosen(option: str, given: str, known: list[str] = RECIPES) -> list[str]:
    """The names in a list with commas between, each of which is known."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} {unknown[0]}: choose from {', '.join(known)}")
    return names


def calibrations(name: str) -> list[str]:
    """Where a recipe says what it calibrates on; nowhere if it does not."""
    recipe = load_recipe(name)
    steps = recipe.resolved_steps()
    if recipe.quant is not None:
        return ["calib"] if steps[0].calib is not None else []
    return [f"steps.{n}.calib" for n, step in enumerate(steps) if step.calib is not None]
