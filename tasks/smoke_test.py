"""Start a real SGLang server on a published checkpoint and compare what it says with the report."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect.client.schemas.objects import State
from prefect.states import Completed
from torch import Tensor

from configs.serving_schema import Serving
from tasks.engine.checkpoint import Checkpoint, open_checkpoint
from tasks.engine.decoder import build_decoder
from tasks.engine.errors import InputError, RunError, one_line
from tasks.engine.export_format import Scheme
from tasks.engine.precision import computing_dtype
from tasks.engine.publication import REPORT
from tasks.engine.served_windows import ServedWindows, read_windows
from tasks.engine.serving.client import Client
from tasks.engine.serving.gpus import BusyGpuError, alone_on, gpus_of
from tasks.engine.serving.server import (
    LOOPBACK,
    ServerError,
    environment_of,
    free_port,
    launch_command,
    running_server,
)
from tasks.engine.serving.speed import measure_speed, prompts_of
from tasks.engine.weights import weights_of
from tasks.evaluate import likeliest

log = logging.getLogger("blockquant")

# largest difference between the server's NLL and the measured one, nats
WEIGHT_ONLY_GAP = 0.005
ACTIVATIONS_GAP = 0.01

PROMPTS = 8
PROMPT_TOKENS = 64
CONTINUED_TOKENS = 32
PROBE_TIMEOUT_S = 120
_PROBE = """
import importlib.metadata, importlib.util, json
found = {"sglang": None, "gpu": None}
if importlib.util.find_spec("sglang") is not None:
    found["sglang"] = importlib.metadata.version("sglang")
    import torch
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
print(json.dumps(found))
"""


class NotServedError(RunError):
    """There is nothing to serve with on this machine, or nothing to serve."""


class GapError(RunError):
    """The server computes something else than what was measured.

    Attributes:
        found: all that was found.
    """

    def __init__(self, message: str, found: dict[str, Any]) -> None:
        """Say it, and keep the figures."""
        super().__init__(message)
        self.found = found

    def __reduce__(self) -> tuple[type[GapError], tuple[str, dict[str, Any]]]:
        """Travel with the figures."""
        return GapError, (str(self), self.found)


def smoke_test(
    checkpoint: Path, serving: Serving, device: str, log_file: Path, source: Path | None = None
) -> dict[str, Any] | State[dict[str, Any]]:
    """Serve a checkpoint and compare; the task is skipped, with the reason, where that cannot be.

    Returns:
        ``served`` and, if so, what ``serve_and_compare`` gives, else ``reason``.

    Raises:
        RunError: the server does not start, dies, or computes something else.
    """
    try:
        return serve_and_compare(checkpoint, serving, device, log_file, source)
    except NotServedError as error:
        reason = str(error)
        return Completed(name="Skipped", message=reason, data={"served": False, "reason": reason})


def serve_and_compare(
    checkpoint: Path,
    serving: Serving,
    device: str,
    log_file: Path,
    source: Path | None = None,
    server_url: str | None = None,
) -> dict[str, Any]:
    """Serve a checkpoint, score its own evaluation windows, continue some prompts.

    Args:
        checkpoint: a published folder: its report and windows say what was measured.
        serving: how to start the server.
        device: where the continuations are computed again by transformers' modules.
        log_file: where the server's output goes.
        source: the checkpoint before quantization, whose speed is measured too if
            ``serving.speed`` asks for that.
        server_url: where a server of the checkpoint runs already, which is asked instead.

    Returns:
        ``nll``, ``measured_nll``, ``nll_gap``, ``max_nll_gap`` (nats); ``greedy_agreement``, the
        share of the server's tokens that transformers finds likeliest at their place;
        ``same_continuations`` of ``prompts``; ``windows``, ``tokens``, ``start_s``, ``sglang``,
        ``gpu``; with ``serving.speed`` ``speed`` and ``source_speed``, or ``source_unserved``:
        why the source has none.

    Raises:
        NotServedError: no SGLang, no GPU, or an export that is not for SGLang.
        ServerError: the server does not start, or dies.
        AnswerError: it answers something else.
        GapError: its NLL is not the one measured.
    """
    opened, windows = require_for_sglang(checkpoint), read_windows(checkpoint)
    # before a server starts: too little text is better found now
    prompts = prompts_of(windows.tokens) if serving.speed else []
    one = served(checkpoint, serving, log_file)
    with running(server_url, checkpoint, serving) if server_url else one as (client, found):
        answers = ask(client, windows)
        if prompts:
            found["speed"] = speed_of(client, prompts)
    found |= {"served": True, **compared(opened, windows, answers, device)}
    found["max_nll_gap"] = serving.max_nll_gap or largest_gap(opened)
    _require_small_gap(checkpoint, found)
    if prompts and source is not None:
        found |= source_speed(source, serving, prompts, log_file.with_suffix(".source.log"))
    return found


def source_speed(
    source: Path, serving: Serving, prompts: Sequence[Sequence[int]], log_file: Path
) -> dict[str, Any]:
    """Time the source model; why there is no figure where it cannot be served.

    What was found of the checkpoint holds without it: a source that does not fit the card is why
    it was quantized.
    """
    try:
        with served(source, serving, log_file) as (client, _):
            return {"source_speed": speed_of(client, prompts)}
    except RunError as error:
        log.warning("the source is not timed: %s", error)
        return {"source_unserved": one_line(error)}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a server said.

    Attributes:
        nll: of each window, of each of its predicted tokens, nats.
        prompts: (P, T) tokens.
        continued: (P, N) tokens that it finds likeliest after them.
    """

    nll: list[list[float]]
    prompts: Tensor
    continued: Tensor


def ask(client: Client, windows: ServedWindows) -> Answers:
    """Let a server score windows, and go on with the beginnings of some."""
    nll = [client.token_nll(row.tolist()) for row in windows.tokens]
    length = windows.tokens.shape[1]
    prompts = windows.tokens[:PROMPTS, : min(PROMPT_TOKENS, length // 2)]
    count = min(CONTINUED_TOKENS, length - prompts.shape[1])
    continued = torch.tensor([client.greedy(row.tolist(), count) for row in prompts])
    return Answers(nll, prompts, continued)


def compared(
    checkpoint: Checkpoint, windows: ServedWindows, answers: Answers, device: str
) -> dict[str, Any]:
    """Compare what a server said with what was measured and with transformers' modules.

    A server's token agrees where those, given the same tokens so far, find it likeliest too; where
    all of a prompt's do, both continue it alike.
    """
    scores = [value for row in answers.nll for value in row]
    mean = sum(scores) / len(scores)
    whole = torch.cat([answers.prompts, answers.continued], dim=1)
    weights = weights_of(checkpoint, device, computing_dtype("auto", device), passes=1)
    decoder = build_decoder(checkpoint.source.config, device)
    found = likeliest(weights, decoder, whole[:, :-1], answers.prompts.shape[1] - 1)
    same = found == answers.continued
    return {
        "nll": mean,
        "measured_nll": windows.mean,
        "nll_gap": mean - windows.mean,
        "windows": len(answers.nll),
        "tokens": len(scores),
        "greedy_agreement": float(same.double().mean()),
        "same_continuations": int(same.all(1).sum()),
        "prompts": len(answers.prompts),
    }


def require_for_sglang(checkpoint: Path) -> Checkpoint:
    """Open a published folder.

    Raises:
        InputError: it was not published by blockquant.
        NotServedError: its report says that it is not for SGLang.
    """
    report = require_report(checkpoint)
    if report.get("unserved"):
        raise NotServedError(str(report["unserved"]))
    return open_checkpoint(checkpoint)


def require_report(checkpoint: Path) -> dict[str, Any]:
    """The report in a published folder.

    Raises:
        InputError: it was not published by blockquant.
    """
    try:
        report: dict[str, Any] = json.loads((checkpoint / REPORT).read_text(encoding="utf-8"))
        return report
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: no {REPORT} that can be read in it; give a folder that blockquant "
            "published"
        ) from error


@dataclass(frozen=True)
class Serves:
    """What an interpreter has to serve with."""

    sglang: str
    gpu: str


def can_serve(python: str) -> Serves:
    """Ask an interpreter for SGLang and a GPU.

    Raises:
        NotServedError: one of them is missing.
        RunError: it does not answer.
    """
    try:
        asked = subprocess.run(
            [python, "-c", _PROBE],
            env=environment_of(python),
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        found = json.loads(asked.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        raise RunError(
            f"{python} cannot say whether it has SGLang ({_why(error)}); mend it, or let "
            "serving.python name the interpreter of an environment that has it"
        ) from error
    if found["sglang"] is None:
        raise NotServedError(
            f"no SGLang in {python}; name an interpreter that has it: --python of serve and "
            "serve-check, serving.python of a recipe"
        )
    if found["gpu"] is None:
        raise NotServedError(f"no GPU that {python} can use")
    return Serves(found["sglang"], found["gpu"])


def _why(error: Exception) -> str:
    """In a few words: what a program said last, or how it ended."""
    if isinstance(error, subprocess.CalledProcessError):
        said = str(error.stderr or "").strip().splitlines()
        return said[-1][:300] if said else f"status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {PROBE_TIMEOUT_S} s"
    return str(error)


@contextmanager
def served(
    checkpoint: Path, serving: Serving, log_file: Path
) -> Iterator[tuple[Client, dict[str, Any]]]:
    """Start a server; a client of it, and ``sglang``, ``gpu``, ``start_s`` of that.

    Raises:
        NotServedError: there is nothing to serve with, or another server of ours holds the GPU
            for too long.
        ServerError: the server does not start, or dies.
    """
    python = serving.python or sys.executable
    serves = can_serve(python)
    parallel, more, limit = serving.tensor_parallel, serving.server_args, serving.start_timeout
    with ExitStack() as held:
        try:
            held.enter_context(alone_on(gpus_of(parallel, more), limit))
        except BusyGpuError as error:
            raise NotServedError(str(error)) from error
        _give_back_memory()
        port = free_port()
        client = Client(f"http://{LOOPBACK}:{port}", serving.request_timeout)
        command = launch_command(python, checkpoint, port, parallel, more)
        began = time.perf_counter()
        with running_server(command, client, checkpoint, log_file, limit):
            start = time.perf_counter() - began
            log.info("SGLang %s serves %s after %.0f s", serves.sglang, checkpoint, start)
            yield client, {"sglang": serves.sglang, "gpu": serves.gpu, "start_s": start}


@contextmanager
def running(
    url: str, checkpoint: Path, serving: Serving
) -> Iterator[tuple[Client, dict[str, Any]]]:
    """A client of a server that runs already, and ``sglang`` and ``gpu`` of that.

    Raises:
        ServerError: it serves something else: on this machine another folder, elsewhere one of
            another name.
    """
    client = Client(url.rstrip("/"), serving.request_timeout)
    named = Path(client.model_path())
    here = named.exists() and checkpoint.exists()
    if not (named.resolve() == checkpoint.resolve() if here else named.name == checkpoint.name):
        raise ServerError(
            f"--server-url {client.url}: serves {named}, not {checkpoint}; start it on that"
        )
    if not here:
        log.warning("%s serves %s: by its name alone it is %s", client.url, named, checkpoint)
    yield client, {"sglang": client.version(), "gpu": "unknown"}


def _give_back_memory() -> None:
    """Free what this process keeps of the GPU: a server takes what it finds free."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def speed_of(client: Client, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Time a server on prompts that it does not know."""
    client.forget()
    return measure_speed(client.url, prompts, client.timeout_s).figures()


def largest_gap(checkpoint: Checkpoint) -> float:
    """How far a server's NLL may be from the measured one: more where inputs are quantized too."""
    return largest_gap_of(checkpoint.scheme)


def largest_gap_of(scheme: Scheme | None) -> float:
    """The same of a scheme."""
    return WEIGHT_ONLY_GAP if scheme is None or scheme.activation is None else ACTIVATIONS_GAP


def _require_small_gap(checkpoint: Path, found: dict[str, Any]) -> None:
    if abs(found["nll_gap"]) <= found["max_nll_gap"]:
        return
    raise GapError(
        f"{checkpoint}: the server's NLL is {found['nll']:.4f}, {found['nll_gap']:+.4f} from the "
        f"{found['measured_nll']:.4f} of the published report (at most {found['max_nll_gap']:g} "
        "is allowed); the checkpoint changed since it was measured, or this server computes "
        "something else",
        found,
    )
