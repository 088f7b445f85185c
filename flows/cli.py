"""The command line: ``blockquant``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from configs.loading import RecipeError, load_recipe, shipped_recipes
from configs.vocabulary import EvaluationDtype
from flows.gate_cli import champion, show_gate
from flows.logs import logging_to
from flows.looking_cli import compare, status
from flows.options import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    KeepOption,
    MemoryOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    ParallelOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    UploadOption,
    bytes_of,
    err,
    out,
)
from flows.serving_cli import serve, serve_check
from flows.showing import mlflow_line, show_result
from flows.store_cli import store_app
from flows.sweep_cli import sweep
from tasks.engine.errors import InputError, one_line

app = typer.Typer(
    name="blockquant",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")


def _version(asked: bool) -> None:
    if asked:
        out.print(f"blockquant {version('blockquant')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize large language models for SGLang, block by block."""


app.command()(champion)
app.command()(serve)
app.command()(serve_check)
app.command()(sweep)
app.command()(compare)
app.command()(status)


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit status."""
    from flows.loading import end_without_collecting
    from flows.prefect_api import quiet_defaults
    from tasks.engine.settings import settings

    end_without_collecting()
    # before anything imports Prefect, which speaks and sends as soon as it is imported
    quiet_defaults(settings().prefect_home)
    arguments = sys.argv[1:] or ["--help"]
    sys.exit(_guarded(lambda: app(arguments, standalone_mode=False)))


def _guarded(run: Callable[[], Any]) -> int:
    try:
        status = run()
    except typer.Exit as stop:
        status = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except typer.TyperException as error:
        said = " ".join(error.format_message().split()).removesuffix(".")
        _say(f"{said}; blockquant --help shows what there is")
        return BAD_INPUT
    except RecipeError as error:
        _say(str(error))
        return BAD_INPUT
    except Exception as error:
        # what a server said last, before the line that says what became of it
        for line in getattr(error, "lines", ()):
            err.print(f"server: {line}", markup=False, highlight=False, soft_wrap=True)
        _say(one_line(error))
        logging.getLogger("blockquant").debug("failed", exc_info=error)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    if status == INTERRUPTED:
        _say("interrupted; the same command goes on from what is done")
    return int(status) if isinstance(status, int) else DONE


def _say(line: str) -> None:
    err.print(f"blockquant: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


@app.command()
def quantize(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    set_: SetOption = None,
    store: StoreOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    keep_incompatible: KeepOption = False,
    overwrite: OverwriteOption = False,
    upload: UploadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model, publish and measure it."""
    result = run_quantization(
        {
            "recipe": recipe,
            "model": model,
            "output": str(output) if output else None,
            "overrides": list(set_ or ()),
            "device": device,
            "memory": bytes_of(memory),
            "store": str(store) if store else None,
            "keep_incompatible": keep_incompatible,
            "overwrite": overwrite,
            "upload": upload,
        }
    )
    if as_json:
        print(json.dumps(result))
        return
    show_result(result)


def run_quantization(parameters: dict[str, Any]) -> dict[str, Any]:
    """Check the input, then run the flow under a Prefect API."""
    from flows.crew_start import started_early
    from flows.loading import load
    from flows.prefect_api import prefect_api, waiting_server
    from tasks.engine.settings import new_log, settings

    store = parameters["store"]
    place = settings(Path(store) if store else None)
    recipe = load_recipe(parameters["recipe"], parameters["overrides"])
    crew = started_early(parameters["device"], recipe.calibrated)
    with waiting_server() as server, crew:
        load("tasks.check")
        # before any server begins: bad input costs seconds and leaves no file behind
        _check(parameters)
        from flows.progress import shown

        log_file = new_log(place.store)
        server_log = log_file.with_name(f"prefect-server-{os.getpid()}.log")
        meanwhile = partial(_load_flow, place.tracking_uri)
        with logging_to(log_file), prefect_api(server_log, server, meanwhile), shown(err):
            from flows.quantize_model import quantize_model

            result: dict[str, Any] = quantize_model(**parameters, log_file=str(log_file))
            return result


def _load_flow(tracking_uri: str) -> None:
    """Load the flow, and what tells MLflow of it: a thread that does would hold the flow up."""
    from flows.loading import load
    from tasks.engine.tracking import client_modules

    for module in ("flows.quantize_model", *client_modules(tracking_uri)):
        load(module)


@app.command()
def check(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    set_: SetOption = None,
    store: StoreOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    keep_incompatible: KeepOption = False,
    overwrite: OverwriteOption = False,
    upload: UploadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything that a run needs, and predict what it costs; no work is done."""
    from tasks.check import describe

    job, prediction = _check(
        {
            "recipe": recipe,
            "model": model,
            "output": str(output) if output else None,
            "overrides": list(set_ or ()),
            "device": device,
            "memory": bytes_of(memory),
            "store": str(store) if store else None,
            "keep_incompatible": keep_incompatible,
            "overwrite": overwrite,
            "upload": upload,
        }
    )
    described = describe(job, prediction)
    if as_json:
        print(json.dumps(described))
        return
    _show_pairs("check", described)


def _check(parameters: dict[str, Any]) -> tuple[Any, Any]:
    from tasks.check import check as check_request
    from tasks.check import request_of

    return check_request(request_of(**parameters))


@app.command()
def verify(
    checkpoint: CheckpointArgument,
    tensor_parallel: ParallelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reopen a checkpoint and check every tensor of it, and that SGLang's kernels take them."""
    from tasks.verify import digests_of, require_served, unserved_of, verify_folder

    digests = digests_of(checkpoint)
    report = verify_folder(checkpoint, digests)
    report["tensor_parallel"] = require_served(checkpoint, tensor_parallel)
    report |= {"compared": digests is not None, "unserved": unserved_of(checkpoint)}
    if as_json:
        print(json.dumps(report))
        return
    _show_pairs(f"{checkpoint} is whole", report)
    if digests is None:
        _say(f"{checkpoint}: no digests of codes are in its report, and none were compared")
    if report["unserved"]:
        _say(f"{checkpoint}: SGLang does not serve it: {report['unserved']}")


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option("--text", help="A text, jsonl or parquet file.")],
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="At most so many.")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 2048,
    reference: Annotated[Path | None, typer.Option("--reference", help="The source.")] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        EvaluationDtype, typer.Option("--dtype", help="The dtype to compute in.")
    ] = EvaluationDtype.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity; with --reference also KL and top-1 agreement."""
    from tasks.check import check_device
    from tasks.engine.checkpoint import open_checkpoint
    from tasks.engine.text import COMMAND_LINE, TextSource
    from tasks.engine.windows import evaluation_windows, require_context
    from tasks.evaluate import measure, summary

    model = open_checkpoint(checkpoint)
    source = open_checkpoint(reference) if reference else None
    place = check_device(device)
    require_context(model.source, window, "--window")
    if source is not None:
        _require_one_shape(model.source.config, source.source.config)
    given = TextSource(COMMAND_LINE, "text", str(text), evaluation=True)
    tokens = evaluation_windows(model.source, given, window, windows)
    report = measure(model, tokens, source, device=place, dtype=str(dtype))
    if as_json:
        print(json.dumps(report))
        return
    out.print(summary(report), highlight=False, soft_wrap=True)


def _require_one_shape(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"--reference: its {key} is {theirs.get(key)}, the checkpoint's {ours.get(key)}; "
                "give the model that it was quantized from"
            )


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that ship."""
    shipped = shipped_recipes()
    if as_json:
        print(json.dumps({"recipes": [{k: str(v) for k, v in vars(r).items()} for r in shipped]}))
        return
    table = Table("recipe", "scheme", "method", "needs")
    for recipe in shipped:
        table.add_row(recipe.name, recipe.scheme, recipe.method, recipe.needs)
    out.print(table)


@app.command()
def sync(store: StoreOption = None, as_json: JsonOption = False) -> int:
    """Send MLflow what it could not be told while it was away."""
    from tasks.engine.journal import synchronize
    from tasks.engine.messages import journals
    from tasks.engine.settings import settings
    from tasks.engine.tracking import check_uri

    place = settings(store)
    check_uri(place.tracking_uri)
    left, decided = {}, []
    found = journals(place.store)
    for journal in found:
        sent_now = synchronize(journal, place)
        if sent_now.reason is not None:
            left[journal.path.stem] = {"messages": journal.count(), "reason": sent_now.reason}
        elif sent_now.decision is not None:
            decided.append(sent_now.decision)
    sent = len(found) - len(left)
    if as_json:
        print(json.dumps({"sent": sent, "left": left, "gate": decided}))
        return FAILED if left else DONE
    out.print(f"{sent} journals sent" if found else "nothing is left to send")
    for decision in decided:
        show_gate(decision)
    for name, kept in left.items():
        line = f"{name}: {kept['messages']} messages are kept: {kept['reason']}"
        out.print(line, highlight=False, soft_wrap=True)
    return FAILED if left else DONE


@app.command()
def demo(as_json: JsonOption = False) -> None:
    """Quantize the embedded demo model to W4A16 and W8A16, and show what it costs."""
    from flows.demo import run_demo, show_demo

    results = run_demo(run_quantization)
    if as_json:
        print(json.dumps({"runs": results}))
        return
    show_demo(results, out, mlflow_line(results[-1]["mlflow"]["uri"]))


def _show_pairs(title: str, values: dict[str, Any]) -> None:
    table = Table("", "", show_header=False)
    for name, value in values.items():
        table.add_row(name, json.dumps(value) if isinstance(value, list) else str(value))
    # a table would break the path in its title
    out.print(title, highlight=False, soft_wrap=True, markup=False)
    out.print(table)


if __name__ == "__main__":
    main()
