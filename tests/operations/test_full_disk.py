"""A disk without room for the store: one line, and the same command goes on once there is some."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Cli, skip_or_fail
from tests.integration.resuming import assert_tracked, contents

pytestmark = [pytest.mark.ops, pytest.mark.usefixtures("services")]
# the export of the run below takes 4.3 MB: the check finds room for it, but the store takes more
SMALL, LARGE = "4500k", "64m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that is too small."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        skip_or_fail(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_goes_on_when_its_full_disk_has_room_again(
    cli: Cli, home: Path, tiny: Path, words: Path, disk: Path, tmp_path: Path
) -> None:
    given = (
        *("quantize", "rtn_w4a16", "--model", tiny, "--set", "serving.check_kernels=false"),
        *("--set", "eval.name=text", "--set", f"eval.path={words}"),
        *("--set", "eval.windows=2", "--set", "eval.seq_len=32"),
        *("--set", "serving.smoke_test=false"),
    )
    whole = cli(*given, "--output", tmp_path / "whole" / "out")
    assert whole.status == 0, whole.err
    expected = contents(tmp_path / "whole" / "out")

    output = tmp_path / "again" / "out"
    env = {"BLOCKQUANT_STORE": str(disk / "store")}
    full = cli(*given, "--output", output, env=env)
    lines = full.err.strip().splitlines()
    assert full.status != 0
    assert "Traceback" not in full.err
    assert "no room is left on its disk; make some, and the same command goes on" in lines[-1]
    assert not output.exists()
    # what was done before stays
    assert list((disk / "store" / "entries").glob("*/*/manifest.json"))

    subprocess.run(["mount", "-o", f"remount,size={LARGE}", disk], check=True)
    done = cli(*given, "--output", output, "--json", env=env)
    assert done.status == 0, done.err
    assert contents(output) == expected
    assert os.listdir(output.parent) == ["out"]
    assert list((disk / "store" / "staging").iterdir()) == []
    result = done.json
    assert result["mlflow"]["left"] == 0
    assert_tracked(home, runs=2)
