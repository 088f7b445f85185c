"""What the documents say holds: the example runs, links lead on, commands and recipes exist."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from textwrap import dedent

import pytest
import typer
import yaml
from typer.main import get_command

from configs.loading import load_recipe, shipped_names
from configs.schemes import export_problems
from flows.children import checked_sweep
from flows.cli import app
from flows.quantize_model import quantize_model
from flows.runner import Runner

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]
OURS = ("flows", "tasks", "configs")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
COMMAND = re.compile(r"(?:\$ )?(?:[A-Z_]+=\S+ +)*(?:\S+/)?blockquant +(.+)")
SPAN = re.compile(r"`([^`\n]+)`")
# names as shipped recipes have them, the ones of methods that may come later too
RECIPE = re.compile(r"(?:[a-z0-9]+/)?[a-z0-9_]+_(?:w\d+a\d+|fp8)\w*|demo/\w+")

# Runs the example with torch, what torch itself loads, quantizers and the standard library.
HARNESS = dedent("""\
    import importlib.abc, json, sys
    import torch

    known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)

    class NothingElse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in known | {"quantizers"}:
                return None
            raise ModuleNotFoundError(f"{name} is not to be had here", name=name)

    sys.meta_path.insert(0, NothingElse())
    names = {}
    exec(compile(sys.stdin.read(), "README.md", "exec"), names)
    import quantizers

    restored = quantizers.dequantize(names["quantized"], names["scheme"])
    print(json.dumps({
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
        "quantizers": quantizers.__file__,
        "codes": [str(names["quantized"].codes.dtype), *names["quantized"].codes.shape],
        "error": quantizers.relative_weight_error(names["weight"], restored),
    }))
    """)


def fenced(document: Path, *languages: str) -> list[str]:
    blocks = FENCE.findall(document.read_text(encoding="utf-8"))
    return [text for language, text in blocks if language in languages]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def command_lines(document: Path) -> Iterator[list[str]]:
    """Arguments of each `blockquant ...` line in the document's blocks."""
    for block in fenced(document, "", "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := COMMAND.match(line):
                yield shlex.split(found[1], comments=True)


def parse(arguments: list[str]) -> None:
    """Parse a command line as ``blockquant`` does, without running it."""
    command, name = get_command(app), "blockquant"
    context = command.make_context(name, list(arguments))
    while hasattr(command, "get_command"):
        words = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)


def test_the_example_needs_torch_and_nothing_else(tmp_path: Path) -> None:
    (example,) = fenced(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    shutil.copytree(ROOT / "quantizers", tmp_path / "quantizers")

    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=example,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["quantizers"]).is_relative_to(tmp_path)
    assert not set(OURS) & set(found["modules"])
    assert found["codes"] == ["torch.int8", 256, 512]
    assert 0 < found["error"] < 0.2


def test_the_harness_refuses_what_is_not_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input="import configs",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "configs is not to be had here" in done.stderr


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as they are made from their text."""
    headings = HEADING.findall(prose(document))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def test_readme_leads_to_every_document() -> None:
    linked = {(ROOT / link).resolve() for link in LINK.findall(prose(README))}
    assert set(DOCUMENTS) - {README} <= linked


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document: Path) -> None:
    for arguments in command_lines(document):
        if arguments[0] == "quantize" and "quant.weight.bits=4" in arguments:
            continue  # shown with the error that it gives
        parse(arguments)
        if arguments[0] in ("quantize", "check") and not arguments[1].isupper():
            recipe_exists(arguments[1])


def recipe_exists(name: str) -> None:
    assert name in shipped_names() or name == "RECIPE.yml", name


def test_the_readme_shows_commands() -> None:
    shown = {arguments[0] for arguments in command_lines(README)}
    assert {"check", "quantize", "evaluate"} <= shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_named_in_the_text_exist(document: Path) -> None:
    for span in SPAN.findall(prose(document)):
        if not span.startswith("blockquant "):
            continue
        try:
            parse(span.split()[1:])
        except typer.TyperException as error:
            # a command may be named without its arguments, but not wrongly
            assert "issing" in error.format_message(), f"{document.name}: {span}"


def test_an_option_that_does_not_exist_is_seen() -> None:
    with pytest.raises(typer.TyperException, match="texxt"):
        parse(["evaluate", "OUTPUT", "--texxt", "FILE"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_recipes_named_exist(document: Path) -> None:
    for span in SPAN.findall(prose(document)):
        if RECIPE.fullmatch(span):
            recipe_exists(span)


def test_the_readme_lists_the_recipes_that_ship() -> None:
    _, _, section = README.read_text(encoding="utf-8").partition("## Recipes that ship")
    table = section.partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in SPAN.findall(row)) == shipped_names()


def test_overrides_and_the_smallest_recipe_are_valid(tmp_path: Path) -> None:
    smallest, steps = fenced(ROOT / "docs" / "recipes.md", "yaml")
    recipe = tmp_path / "recipe.yml"
    for written in (smallest, steps):
        recipe.write_text(written, encoding="utf-8")
        assert export_problems(load_recipe(recipe)) == []

    for document in DOCUMENTS:
        for arguments in command_lines(document):
            given = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
            if given and "quant.weight.bits=4" not in given:
                load_recipe(arguments[1], given)


def test_the_sweep_in_the_document_is_valid(
    tiny: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = fenced(ROOT / "docs" / "sweeps.md", "yaml")
    sweep = yaml.safe_load(example)
    combined = [len(sweep[key]) for key in ("models", "recipes", "overrides")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKQUANT_HOME", str(tmp_path / "home"))
    for model, folder in zip(sweep["models"], ("models/one", "two"), strict=True):
        shutil.copytree(tiny, folder)
        if isinstance(model, dict):
            model["path"] = folder
    shutil.copy(ROOT / "configs" / "rtn_w4a16_asym.yml", "my-recipe.yml")
    Path("mine.yml").write_text(yaml.safe_dump(sweep))
    # shipped recipes read texts of a hub
    text = f"name: text, path: {words}, seq_len: 32"
    given = [f"calib={{{text}, n_samples: 2}}", f"eval={{{text}, report: false}}"]
    common = {"overrides": [*given, "serving.check_kernels=false"]}
    _, checked = checked_sweep("mine.yml", None, common, Runner())
    assert len(checked.children) == prod(combined) == 12


def test_deployments_give_what_their_flows_take() -> None:
    described = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    for deployment in described["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        assert Path(inspect.getfile(flow.fn)) == ROOT / file
        given = deployment["parameters"]
        inspect.signature(flow.fn).bind(**given)
        if "recipe" in given:
            recipe_exists(given["recipe"])
            assert (ROOT / given["model"]).is_dir()

    listed = (ROOT / "docs" / "operation.md").read_text("utf-8").partition("of the flow: ")[2]
    assert sorted(SPAN.findall(listed)) == sorted(inspect.signature(quantize_model.fn).parameters)
