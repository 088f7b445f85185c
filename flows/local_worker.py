"""The worker that ``make up`` keeps running: Prefect's, which ends when it is stuck.

``python -m flows.local_worker POOL NAME LIMIT``. A Prefect server that dies while a worker submits
a run can leave the worker's event loop busy for good: anyio 4.16 walks the contexts of an
exception, which may form a ring. It takes no run then, and does not end by itself.

Told to end by SIGTERM, it has its runs end first, which say so while the servers are there.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows.local_runs import note
from flows.local_servers import SERVICES

if TYPE_CHECKING:
    from prefect.workers.process import ProcessWorker

# nothing in a worker keeps its event loop from turning for as long
STUCK_S = 60.0
# how long runs that are to end may take to say so, and the worker to say it of those killed then
RUN_LIMIT_S = 30.0
KILLED_LIMIT_S = 10.0


async def ending_when_stuck(awaited: Awaitable[None], limit_s: float = STUCK_S) -> None:
    """Await something; where the event loop stands still for ``limit_s`` seconds, the process ends.

    By status 1, each thread's stack on standard error. The runs of a worker go on without it. What
    is left to do at the end of the process has the same time.
    """
    watch = partial(faulthandler.dump_traceback_later, limit_s, exit=True)

    async def beat() -> None:
        while True:
            await asyncio.sleep(limit_s / 10)
            watch()

    watch()
    beating = asyncio.create_task(beat())
    try:
        await awaited
    finally:
        beating.cancel()


async def work(pool: str, name: str, limit: int, folder: Path) -> None:
    """Work for a pool, at no more runs than ``limit`` at a time, until a signal.

    What it takes is noted in ``folder``.
    """
    from prefect.utilities.processutils import setup_signal_handlers_worker
    from prefect.workers.process import ProcessWorker

    say = partial(print, flush=True)
    # within the event loop, which hears the first interrupt then
    setup_signal_handlers_worker(os.getpid(), f"the worker {name}", say)
    worker = ProcessWorker(pool, name=name, limit=limit)
    ending = _end_when_told(worker, folder)
    with suppress(asyncio.CancelledError):
        await worker.start(printer=say)
    ending.cancel()


def _end_when_told(worker: ProcessWorker, folder: Path) -> asyncio.Task[None]:
    """On SIGTERM take no more runs, have those under way end, then end: Prefect kills them."""
    told = asyncio.Event()
    take = worker.get_and_submit_flow_runs

    async def take_until_told() -> list[Any]:
        taken = [] if told.is_set() else await take()
        for run in taken:
            note(folder, str(run.id), run.run_count)
        return taken

    async def end() -> None:
        await told.wait()
        # twice: what a signal raises is lost where Python is just forgetting an object
        gently = [(signal.SIGTERM, RUN_LIMIT_S / 2)] * 2
        for asked, limit_s in (*gently, (signal.SIGKILL, KILLED_LIMIT_S)):
            _signal_runs(asked)
            deadline = time.monotonic() + limit_s
            while _is_busy(worker) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    worker.get_and_submit_flow_runs = take_until_told  # type: ignore[method-assign]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    return asyncio.create_task(end())


def _is_busy(worker: ProcessWorker) -> bool:
    """Whether it has a run, or is to tell the server how one ended."""
    # one that has not begun to work has no limiter
    with suppress(RuntimeError):
        return worker.limiter.borrowed_tokens > 0
    return False


def _signal_runs(asked: signal.Signals) -> None:
    """Send a signal to the runs of this worker; each is a session of its own."""
    for process in psutil.Process().children():
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, asked)


def main(pool: str, name: str, limit: str) -> None:
    """Be the worker."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    with suppress(KeyboardInterrupt):
        asyncio.run(ending_when_stuck(work(pool, name, int(limit), Path(os.environ[SERVICES]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
