"""Runs of the flow in processes of their own, which record what they do and can die anywhere.

Nothing in the product knows of this: the child wraps the functions through which the flow acts on
the world (files, Prefect's records, MLflow), names every call, and kills itself at the one asked
for. A forkserver imports the libraries once; it runs no torch, so its children are clean.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOAD = ["tests.integration.preloading"]
COUNT = "count "
# folders of the store whose files bear hashes as names
RECORDS = ("digests", "publishing")
LIMIT_S = 240


@dataclass(frozen=True)
class Work:
    """One run of the flow: its parameters, its home, and the event (or its number) it dies at."""

    home: Path
    parameters: dict[str, Any]
    trace: Path
    kill_at: int | str | None = None

    @property
    def outcome(self) -> Path:
        """Where the child leaves what the flow returned, or why it failed."""
        return self.trace.with_suffix(".json")


@dataclass(frozen=True)
class Ran:
    """What came of a run: its exit code, its events, how often it computed, its result."""

    exitcode: int
    events: list[str]
    counts: dict[str, int]
    result: dict[str, Any]

    @property
    def made(self) -> list[str]:
        """The steps that were computed, in their order; recipes of several steps repeat names."""
        return [step["step"] for step in self.result["steps"] if not step["cached"]]

    @property
    def committed(self) -> list[str]:
        """The steps whose entries were there before the run ended or was killed."""
        ending = ": committed"
        return [event.removesuffix(ending) for event in self.events if event.endswith(ending)]


def run(work: Work) -> Ran:
    """Run in a new process and wait for it."""
    return finish(work, start(work))


def start(work: Work) -> Any:
    """Start a run in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=child, args=(work,))
    process.start()
    return process


def finish(work: Work, process: Any) -> Ran:
    """Wait for a run and read what it left."""
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{work.trace}: no end after {LIMIT_S} s")
    lines = work.trace.read_text().splitlines() if work.trace.exists() else []
    counted = [line.removeprefix(COUNT) for line in lines if line.startswith(COUNT)]
    result = json.loads(work.outcome.read_text()) if work.outcome.exists() else {}
    return Ran(
        process.exitcode,
        [line for line in lines if not line.startswith(COUNT)],
        {name: counted.count(name) for name in set(counted)},
        result,
    )


def child(work: Work) -> None:
    """Run the flow here; the recorder dies where it was told to."""
    import torch

    os.environ["BLOCKQUANT_HOME"] = str(work.home)
    os.environ.pop("BLOCKQUANT_STORE", None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    # a part of every lineage key: all runs compute alike
    torch.set_num_threads(1)
    outside = (work.home, Path(work.parameters["output"]).parent)
    install(Recorder(work.trace, work.kill_at, outside))
    from flows.quantize_model import quantize_model

    try:
        result = quantize_model(**work.parameters)
    except Exception as error:
        failure = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        work.outcome.write_text(json.dumps(failure))
        sys.exit(1)
    work.outcome.write_text(json.dumps(result))


class Recorder:
    """Writes down every event of a run, in order, and kills the process at one of them."""

    def __init__(self, trace: Path, kill_at: int | str | None, watched: tuple[Path, ...]) -> None:
        self._file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._kill_at = kill_at
        self._number = -1
        self._where = ["flow"]
        self._repeats: Counter[str] = Counter()
        self._watched = watched

    @contextlib.contextmanager
    def inside(self, label: str) -> Iterator[None]:
        self._where.append(label)
        self._repeats.clear()
        try:
            yield
        finally:
            self._where.pop()

    def at(self, event: str, tear: Callable[[], Any] | None = None) -> None:
        """Note an event; to die in it, first leave behind what ``tear`` leaves."""
        self._number += 1
        named = f"{self._where[-1]}: {event}"
        self._write(named)
        if self._kill_at in (self._number, named):
            if tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def aside(self, event: str) -> None:
        """Die at what another thread does, in no order with the rest; it is noted only then."""
        if self._kill_at == event:
            self._write(event)
            os.kill(os.getpid(), signal.SIGKILL)

    def repeated(self, event: str) -> None:
        """Note an event that comes several times in a step, with its number there."""
        self._repeats[event] += 1
        self.at(f"{event} {self._repeats[event]}")

    def count(self, what: str) -> None:
        self._write(COUNT + what)

    def watches(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._watched)

    def _write(self, line: str) -> None:
        os.write(self._file, (line + "\n").encode())


class Stand:
    """Stands for a module in one other module's namespace, with some functions wrapped."""

    def __init__(self, module: ModuleType, **wrapped: Callable[..., Any]) -> None:
        self._module = module
        self.__dict__.update(wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install(recorder: Recorder) -> None:
    """Wrap, in this process, everything through which the flow acts on the world."""
    _wrap_steps(recorder)
    _wrap_store(recorder)
    _wrap_publish(recorder)
    _wrap_tracking(recorder)
    _wrap_methods(recorder)
    _count_computations(recorder)


def _wrap_steps(recorder: Recorder) -> None:
    from prefect.results import ResultStore

    from tasks.engine.step import Step

    call, make = Step.run, Step._make

    def called(self: Any, job: Any, ahead: Any, *args: Any, **kwargs: Any) -> Any:
        block = kwargs.get("block")
        with recorder.inside(self.name if block is None else f"{self.name}[block {block}]"):
            recorder.at("begins")
            return call(self, job, ahead, *args, **kwargs)

    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = make(self, *args, **kwargs)
        recorder.at("committed")
        return value

    persist = ResultStore._persist_result_record

    def persisted(self: Any, result_record: Any, *args: Any, **kwargs: Any) -> Any:
        def tear() -> None:
            persist(self, result_record, *args, **kwargs)
            _halve(Path(result_record.metadata.storage_key))

        recorder.at("record torn", tear)
        return persist(self, result_record, *args, **kwargs)

    Step.run, Step._make = called, made  # type: ignore[method-assign]
    ResultStore._persist_result_record = persisted  # type: ignore[method-assign]


def _wrap_store(recorder: Recorder) -> None:
    import tasks.engine.draft as draft
    import tasks.engine.store as store

    lock, save = store.Store.lock, draft.save_file
    write_text = Path.write_text

    @contextlib.contextmanager
    def locked(self: Any, key: str, timeout_s: float = -1) -> Iterator[None]:
        with lock(self, key, timeout_s):
            recorder.at("locked")
            yield

    def saved(tensors: Any, path: Path, **kwargs: Any) -> None:
        def tear() -> None:
            save(tensors, path, **kwargs)
            _halve(path)

        recorder.at(f"{path.name} torn", tear)
        save(tensors, path, **kwargs)
        recorder.at(f"{path.name} written")

    def texted(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if not recorder.watches(self):
            return write_text(self, text, *args, **kwargs)
        name = _text_name(self)
        recorder.at(f"{name} torn", lambda: write_text(self, text[: len(text) // 2]))
        return write_text(self, text, *args, **kwargs)

    def removed(path: Path, **kwargs: Any) -> None:
        if Path(path).parent.name != "trash":
            shutil_rmtree(path, **kwargs)
            return
        recorder.at("trash made")
        shutil_rmtree(path, **kwargs)

    shutil_rmtree = store.shutil.rmtree
    store.Store.lock = locked  # type: ignore[method-assign]
    draft.save_file = saved
    draft.os = _moves(recorder, draft.os)  # type: ignore[assignment]
    store.os = _moves(recorder, store.os)  # type: ignore[assignment]
    store.shutil = Stand(store.shutil, rmtree=removed)  # type: ignore[assignment]
    Path.write_text = texted  # type: ignore[assignment]


def _wrap_publish(recorder: Recorder) -> None:
    import flows.finishing as finishing
    import flows.quantize_model as flow
    import flows.steps as steps
    import tasks.engine.output as places
    import tasks.publish as publishing

    rmtree, exchange = publishing.shutil.rmtree, places.exchange

    def removed(path: Path, **kwargs: Any) -> None:
        rmtree(path, **kwargs)
        recorder.at(f"{_move_name(path)} removed")

    def exchanged(one: Path, other: Path) -> bool:
        recorder.at(f"before exchange with {_move_name(other)}")
        done = exchange(one, other)
        recorder.at(f"exchanged with {_move_name(other)}")
        return done

    publishing.shutil = Stand(publishing.shutil, rmtree=removed)  # type: ignore[assignment]
    places.shutil = publishing.shutil  # type: ignore[assignment]
    places.os = _moves(recorder, places.os)  # type: ignore[assignment]
    places.exchange = exchanged
    acting = {
        flow: ("check", "open_tracked", "log_measured", "offer", "register"),
        finishing: ("publish",),
    }
    for module, names in acting.items():
        for name in names:
            setattr(module, name, _bracketed(recorder, getattr(module, name)))
    steps.drop_boundaries = _bracketed(recorder, steps.drop_boundaries)


def _wrap_tracking(recorder: Recorder) -> None:
    from tasks.engine import delivery
    from tasks.engine.journal import ToldRun

    names = ("open", "log_points", "set_tags", "log_file", "log_table", "log_input")
    names += ("offer", "finish")
    for name in names:
        setattr(ToldRun, name, _followed(recorder, getattr(ToldRun, name)))
    send = delivery._send

    def sent(*args: Any) -> Any:
        facts = send(*args)
        recorder.aside(f"{args[-1].kind} sent")
        return facts

    delivery._send = sent


def _wrap_methods(recorder: Recorder) -> None:
    """See what goes on inside a block: every loss of its learning, every linear of GPTQ."""
    import tasks.engine.feedback as feedback
    import tasks.learn as learning

    descend, gptq = learning.descend, feedback.gptq

    def descended(learnable: Any, loss_of: Callable[[int], Any], *args: Any, **kwargs: Any) -> Any:
        def evaluated(batch: int) -> Any:
            recorder.count("loss")
            loss = loss_of(batch)
            recorder.repeated("loss")
            return loss

        return descend(learnable, evaluated, *args, **kwargs)

    def rounded(*args: Any, **kwargs: Any) -> Any:
        recorder.count("round")
        codes = gptq(*args, **kwargs)
        recorder.repeated("rounded")
        return codes

    learning.descend, feedback.gptq = descended, rounded


def _count_computations(recorder: Recorder) -> None:
    from quantizers import rounding
    from tasks.clip import clip
    from tasks.learn import learn
    from tasks.transform import transform

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.count(what)
            return function(*args, **kwargs)

        return call

    # what every way of rounding a linear but GPTQ ends in, and what decides a block
    rounding.quantize_weight = counted("round", rounding.quantize_weight)
    object.__setattr__(transform, "compute", counted("decide", transform.compute))
    object.__setattr__(clip, "compute", counted("clip", clip.compute))
    object.__setattr__(learn, "compute", counted("learn", learn.compute))


def _bracketed(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with recorder.inside(function.__name__):
            recorder.at("begins")
            value = function(*args, **kwargs)
            recorder.at("ends")
            return value

    return call


def _followed(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        recorder.at(f"{function.__name__} told")
        return value

    return call


def _moves(recorder: Recorder, module: ModuleType) -> Stand:
    def moved(name: str) -> Callable[..., Any]:
        function = getattr(module, name)

        def call(source: Path, target: Path) -> None:
            recorder.at(f"before {name} to {_move_name(target)}")
            function(source, target)

        return call

    return Stand(module, rename=moved("rename"), replace=moved("replace"), link=moved("link"))


def _move_name(target: Path) -> str:
    if target.parent.name == "trash":
        return "trash"
    if target.parent.parent.name == "entries":
        return "entries"
    return target.parent.name if target.parent.name in RECORDS else target.name


def _text_name(path: Path) -> str:
    if path.parent.name in RECORDS:
        return path.parent.name
    # a temporary name holds the process id
    return path.name.removeprefix(".").split(".json.")[0].removesuffix(".tmp")


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
