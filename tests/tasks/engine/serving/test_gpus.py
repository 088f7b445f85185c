"""Whose locks are taken before a server takes a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engine.errors import RunError
from tasks.engine.serving import gpus


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o700])
def test_a_folder_that_others_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    folder = tmp_path / "locks"
    monkeypatch.setattr(gpus, "LOCKS", folder)
    # made with what only this user may do
    with gpus.alone_on(["0"], 1):
        assert (folder / "0.holder").is_file()
    folder.chmod(mode)
    if mode == 0o700:
        with gpus.alone_on(["0"], 1):
            pass
    else:
        with pytest.raises(RunError, match="only this user"), gpus.alone_on(["0"], 1):
            pass


def test_a_link_in_place_of_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    with pytest.raises(RunError, match="only this user"), gpus.alone_on(["0"], 1):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
