"""Libraries are loaded without looking through them for garbage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.flows.conftest import bare_environment

LOADED = """
import gc
import sys
sys.path.insert(0, sys.argv[1])
from flows.loading import end_without_collecting, load

before = gc.get_freeze_count()
load("library")
import library
assert not library.collects and gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen - before > 100_000

# what a run made since then stays in sight of the collector
made = [[] for _ in range(100_000)]
load("library")
assert gc.get_freeze_count() == frozen

try:
    load("broken")
except ZeroDivisionError:
    assert gc.isenabled()
else:
    raise AssertionError("what a library raises is to be heard")

end_without_collecting()
import atexit
# called last
atexit._run_exitfuncs()
assert gc.get_freeze_count() > frozen + 100_000
print("done")
"""
LIBRARY = """
import gc
collects = gc.isenabled()
objects = [[] for _ in range(100_000)]
"""


def test_loaded_modules_are_left_out_of_collections(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "broken.py").write_text("1 / 0")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path)],
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
