"""What a store says of itself while processes work on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tasks.engine.messages import Journal
from tasks.engine.store import Store
from tasks.looks.status import in_store, is_held
from tests.conftest import ROOT
from tests.tasks.conftest import put_tokens, random_tokens

# a process that holds locks until it is told to end
HOLDER = """
import sys
from filelock import FileLock
held = [FileLock(path) for path in sys.argv[1:]]
for lock in held:
    lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_process_holds_is_running(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = put_tokens(store, random_tokens(2, 8))
    busy, idle = (Journal(store.root / "journal" / f"{name}.sqlite") for name in ("busy", "idle"))
    for journal in (busy, idle):
        journal.add_all([("set_tags", {"tags": {}})])
        journal.lock().acquire()
        journal.lock().release(force=True)
    step = store.root / "locks" / "beef.lock"
    (store.root / "staging" / "beef").mkdir(parents=True)
    locks = [str(busy.lock().lock_file), str(step)]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *locks],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        found = in_store(store.root)
    finally:
        holder.communicate()
    assert found["running"] == [{"identity": "busy", "run": None, "messages": 1}]
    assert found["left"] == [{"identity": "idle", "run": None, "messages": 1}]
    assert found["steps"] == 1
    assert found["entries"] == {"calibration_set": {"entries": 1, "bytes": entry.size}}
    after = in_store(store.root)
    assert (after["running"], after["steps"]) == ([], 0)
    assert [left["identity"] for left in after["left"]] == ["busy", "idle"]


def test_to_look_makes_nothing(tmp_path: Path) -> None:
    found = in_store(tmp_path / "none")
    assert found == {"running": [], "left": [], "steps": 0, "entries": {}}
    assert not is_held(tmp_path / "none.lock")
    assert list(tmp_path.iterdir()) == []
