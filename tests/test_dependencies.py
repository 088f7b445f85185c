"""What the packages import is what pyproject.toml asks for."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("configs", "flows", "quantizers", "tasks")
# pydantic asks for the very version that it is built with
PART_OF_ANOTHER = {"pydantic-core"}
# torch brings it where it is built for CUDA, and nothing imports it elsewhere
COMES_WITH = {"triton"}
# prefect-ray brings it
BROUGHT = {"ray"}


def imported() -> Iterator[str]:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield node.module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {normal(re.split(r"[^\w.-]", entry)[0]) for entry in project["dependencies"]}


def extras() -> set[str]:
    """What users install who want more: sweeps on Ray, scores of tasks."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*extra["ray"], *extra["lm-eval"]]
    return {normal(re.split(r"[^\w.-]", entry)[0]) for entry in wanted}


def at_import(file: Path) -> Iterator[str]:
    """What a module imports as soon as it is imported itself."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_import_is_a_dependency() -> None:
    asked = dependencies() | extras() | BROUGHT
    known = {*PACKAGES, *sys.stdlib_module_names, *COMES_WITH}
    modules = {name.split(".")[0] for name in imported()} - known
    distributions = packages_distributions()
    missing = {
        module
        for module in modules
        if not {normal(name) for name in distributions[module]} & (asked | PART_OF_ANOTHER)
    }
    assert missing == set()


def test_what_is_not_always_installed_is_imported_only_where_it_is_used() -> None:
    optional = {"ray", "prefect_ray", "lm_eval"}
    eager = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if {name.split(".")[0] for name in at_import(file)} & optional
    }
    assert eager == set()


def test_every_dependency_is_pinned_where_the_checks_run() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]) for line in pins if "==" in line and line[0] != "#"}
    assert dependencies() - pinned == set()


def test_a_file_is_one_worker_s(request: pytest.FixtureRequest, worker_id: str) -> None:
    """Or fixtures of files are made by each worker anew, which nothing tells."""
    if worker_id == "master":
        pytest.skip("no workers: run by one process")
    assert request.node.nodeid.endswith("@test_dependencies.py")
