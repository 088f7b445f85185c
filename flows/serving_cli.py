"""``blockquant serve`` and ``blockquant serve-check``: SGLang on a published checkpoint."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.table import Table

from flows.gate_cli import show_gate
from flows.options import (
    DONE,
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    ParallelOption,
    err,
    out,
)

PythonOption = Annotated[
    str | None,
    typer.Option("--python", help="Interpreter of an environment with SGLang; else this one."),
]
ServerArguments = Annotated[
    list[str] | None, typer.Argument(help="After --: arguments of SGLang's own.")
]


def serve(
    checkpoint: CheckpointArgument,
    arguments: ServerArguments = None,
    python: PythonOption = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of the server.")] = 30000,
    tensor_parallel: ParallelOption = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the command and do not run it.")
    ] = False,
) -> None:
    """Print the command that serves a checkpoint with SGLang on this machine, and run it."""
    from tasks.engine.errors import RunError
    from tasks.engine.serving.server import environment_of, launch_command
    from tasks.smoke_test import can_serve, require_for_sglang
    from tasks.verify import require_served

    gpus = require_served(checkpoint, tensor_parallel)
    serving = _serving(python=python, tensor_parallel=gpus, arguments=arguments)
    require_for_sglang(checkpoint)
    interpreter = serving.python or sys.executable
    command = launch_command(
        interpreter, checkpoint, port, serving.tensor_parallel, serving.server_args
    )
    out.print(shlex.join(command), highlight=False, soft_wrap=True, markup=False)
    if only_print:
        return
    can_serve(interpreter)
    sys.stdout.flush()
    try:
        os.execvpe(interpreter, command, environment_of(interpreter))
    except OSError as error:
        raise RunError(f"{interpreter}: does not run ({error.strerror})") from error


def serve_check(
    checkpoint: CheckpointArgument,
    arguments: ServerArguments = None,
    python: PythonOption = None,
    server_url: Annotated[
        str | None, typer.Option("--server-url", help="Ask a running server instead.")
    ] = None,
    tensor_parallel: ParallelOption = None,
    max_nll_gap: Annotated[
        float | None,
        typer.Option("--max-nll-gap", help="Nats; .005, with 8 bit inputs .01."),
    ] = None,
    start_timeout: Annotated[
        int, typer.Option("--start-timeout", min=1, help="Seconds until the server answers.")
    ] = 900,
    speed: Annotated[bool, typer.Option("--speed", help="Time it too.")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="The source model, timed beside it."),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="MLflow run that keeps figures and log.")
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> int:
    """Start SGLang on a checkpoint and compare what it computes with what was measured."""
    from tasks.check import check_device
    from tasks.engine.errors import RunError
    from tasks.engine.settings import new_log, settings
    from tasks.smoke_test import serve_and_compare
    from tasks.verify import require_served

    _require_sense(server_url, source, speed)
    serving = _serving(
        python=python,
        tensor_parallel=require_served(checkpoint, tensor_parallel),
        max_nll_gap=max_nll_gap,
        start_timeout=start_timeout,
        speed=speed,
        arguments=arguments,
    )
    place = check_device(device)
    known = _known_run(run, checkpoint)
    log_file = new_log(settings().store, "serve-")
    try:
        served = serve_and_compare(
            checkpoint.absolute(), serving, place, log_file, source, server_url
        )
    except RunError as error:
        try:
            _tell(known, log_file, partial(_tell_failed, error=error))
        except RunError as untold:
            err.print(str(untold), markup=False, highlight=False, soft_wrap=True)
        raise
    decided = _tell(known, log_file, partial(_tell_served, served=served))
    if as_json:
        print(json.dumps(served if known is None else served | {"gate": decided}))
        return DONE
    show_served(served)
    show_gate(decided)
    return DONE


def _tell(run: Any, log_file: Path, tell: Callable[[Any], Any]) -> Any:
    """Tell a run, where there is one, what came of serving, and keep the logs with it.

    Raises:
        RunError: MLflow does not answer.
    """
    from tasks.engine.errors import RunError, masked

    if run is None:
        return None
    try:
        said = tell(run)
        for kept in sorted(log_file.parent.glob(f"{log_file.stem}*")):
            run.log_file(kept)
    except Exception as error:
        raise RunError(
            f"MLflow at {masked(run.uri)} is not told what came of serving "
            f"({type(error).__name__}); run serve-check again once it answers"
        ) from error
    return said


def _tell_served(run: Any, served: dict[str, Any]) -> dict[str, Any] | None:
    """Tell a run what came of serving its checkpoint; what the gate says now of its version."""
    from tasks.engine.registry import served_later
    from tasks.engine.settings import settings
    from tasks.gate import served_figures
    from tasks.register import served_points, served_tags

    run.log_attempt(served_points(served, int(time.time() * 1000)))
    run.set_tags(served_tags(served))
    return served_later(run, settings(), served_figures(served))


def _tell_failed(run: Any, error: Exception) -> None:
    """Tell a run and its version that the checkpoint was not served as measured."""
    from tasks.engine.registry import served_later
    from tasks.engine.settings import settings
    from tasks.gate import failed_serving, served_figures
    from tasks.register import tell_failure
    from tasks.smoke_test import NotServedError

    # one that could not be served here says nothing of the checkpoint
    if isinstance(error, NotServedError):
        return
    tell_failure(run, error)
    served_later(run, settings(), served_figures(failed_serving(error)))


def _serving(arguments: list[str] | None, **keys: Any) -> Any:
    """The options as a recipe's section, which says what is wrong with them."""
    from pydantic import ValidationError

    from configs.serving_schema import Serving
    from tasks.engine.errors import InputError

    try:
        return Serving(server_args=tuple(arguments or ()), **keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        ) from error


def _require_sense(server_url: str | None, source: Path | None, speed: bool) -> None:
    from tasks.engine.errors import InputError

    if source is not None and not speed:
        raise InputError("--source: is for --speed, which times it; give both or none")
    if server_url is None:
        return
    parts = urlsplit(server_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--server-url {server_url}: no address; write http://HOST:PORT")
    # not said again: it may hold a password
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError("--server-url: has more than an address; write http://HOST:PORT")
    if source is not None:
        raise InputError("--source: needs a server of its own; give no --server-url with it")


def _known_run(run_id: str | None, checkpoint: Path) -> Any:
    """The run that is told, None where none is; it must be that of the checkpoint."""
    from tasks.engine.errors import InputError
    from tasks.engine.registry import is_of_run
    from tasks.engine.settings import settings
    from tasks.engine.tracking import existing_run
    from tasks.smoke_test import require_report

    if run_id is None:
        return None
    require_report(checkpoint)
    run = existing_run(settings(), run_id)
    if not is_of_run(checkpoint, run):
        raise InputError(
            f"--run {run_id}: published another checkpoint than {checkpoint}; give the run that "
            "made this one"
        )
    return run


def show_served(served: dict[str, Any]) -> None:
    """Say in a line what came of serving a checkpoint, and how fast it was."""
    if not served["served"]:
        out.print(f"not served: {served['reason']}", highlight=False, soft_wrap=True)
        return
    out.print(
        f"served by SGLang {served['sglang']}: NLL {served['nll']:.4f}, {served['nll_gap']:+.4f} "
        f"from what was measured (at most {served['max_nll_gap']:g}); "
        f"{served['greedy_agreement']:.1%} of its greedy tokens are transformers' too",
        highlight=False,
        soft_wrap=True,
    )
    speeds = {
        n: served[k] for n, k in (("source", "source_speed"), ("quantized", "speed")) if k in served
    }
    if "source_unserved" in served:
        line = f"the source is not timed: {served['source_unserved']}"
        out.print(line, highlight=False, soft_wrap=True, markup=False)
    if not speeds:
        return
    table = Table("", "first token, ms", "tokens/s", "first token, loaded, ms", "tokens/s, loaded")
    for name, speed in speeds.items():
        table.add_row(
            name,
            *(
                f"{speed[key]:.1f}"
                for key in (
                    "first_token_ms",
                    "tokens_per_s",
                    "loaded_first_token_ms",
                    "loaded_tokens_per_s",
                )
            ),
        )
    out.print(table)
