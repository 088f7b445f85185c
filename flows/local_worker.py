"""The worker that ``make up`` keeps running: Prefect's, which ends when it is stuck.

``python -m flows.local_worker POOL NAME LIMIT``. A Prefect server that dies while a worker submits
a run can leave the worker's event loop busy for good: anyio 4.16 walks the contexts of an
exception, which may form a ring. It takes no run then, and does not end by itself.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial

# nothing in a worker keeps its event loop from turning for as long
STUCK_S = 60.0


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


async def work(pool: str, name: str, limit: int) -> None:
    """Work for a pool, at no more runs than ``limit`` at a time, until a signal."""
    from prefect.utilities.processutils import setup_signal_handlers_worker
    from prefect.workers.process import ProcessWorker

    say = partial(print, flush=True)
    # within the event loop, which hears the first interrupt then
    setup_signal_handlers_worker(os.getpid(), f"the worker {name}", say)
    with suppress(asyncio.CancelledError):
        await ProcessWorker(pool, name=name, limit=limit).start(printer=say)


def main(pool: str, name: str, limit: str) -> None:
    """Be the worker."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    with suppress(KeyboardInterrupt):
        asyncio.run(ending_when_stuck(work(pool, name, int(limit))))


if __name__ == "__main__":
    main(*sys.argv[1:])
