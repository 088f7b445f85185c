"""Run a command in a session of its own that ends when the starter does, however that ends.

    python guard.py COMMAND...    the starter holds the other end of standard input

Standard input closes when the starter closes it, or dies by any signal; then the command is asked
to end, and after GRACE_S, or when it ends by itself, its whole group is killed, and whatever else
it left. Needs Linux and the standard library only, so it starts at once and anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

GRACE_S = 15
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run the command; returns its status, 128 and the signal's number where one ended it."""
    # processes that the command leaves behind become this one's children
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_guard
    )
    ended = os.pidfd_open(server.pid)
    select.select([sys.stdin, ended], [], [])
    status = server.poll()
    if status is None:
        # not its group: a server whose workers die first takes that for a crash
        os.kill(server.pid, signal.SIGTERM)
        select.select([ended], [], [], GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    status = server.wait() if status is None else status
    while left := _children():
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os.waitpid(-1, 0)
    return status if status >= 0 else 128 - status


def _children() -> list[int]:
    """Processes of this one, dead ones that nobody waited for included."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
            return [int(child) for child in listed.read().split()]
    except OSError:
        return []


def _die_with_guard() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
