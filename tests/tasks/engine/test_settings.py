"""Where things lie: the variables win, and every place is absolute."""

from __future__ import annotations

import os
import time
from pathlib import Path

import platformdirs
import pytest

from tasks.engine.settings import Settings, home, new_log, settings

VARIABLES = ("BLOCKQUANT_HOME", "BLOCKQUANT_STORE", "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_users(tmp_path: Path) -> None:
    base = Path(platformdirs.user_data_dir("blockquant"))
    assert home() == base
    assert settings() == Settings(
        base / "store", f"sqlite:///{base}/mlflow.db", base / "mlartifacts", base / "prefect"
    )
    assert base.is_relative_to(tmp_path / "user"), "the user's, not the machine's"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("/data/bq", "/data/bq"), ("bq", "{}/bq"), ("~/bq", "{}/user/bq"), ("", None)],
)
def test_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str | None
) -> None:
    default = home()
    monkeypatch.setenv("BLOCKQUANT_HOME", given)
    base = Path(expected.format(tmp_path)) if expected else default
    assert settings() == Settings(
        base / "store", f"sqlite:///{base}/mlflow.db", base / "mlartifacts", base / "prefect"
    )


def test_the_store_of_the_command_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKQUANT_HOME", "/data/bq")
    assert settings().store == Path("/data/bq/store")
    monkeypatch.setenv("BLOCKQUANT_STORE", "~/scratch")
    assert settings().store == tmp_path / "user/scratch"
    assert settings(Path("mine")).store == tmp_path / "mine"
    # nothing else moves with it
    assert settings(Path("mine")).prefect_home == Path("/data/bq/prefect")
    monkeypatch.setenv("BLOCKQUANT_STORE", "")
    assert settings().store == Path("/data/bq/store")


def test_a_tracking_server_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert settings().tracking_uri == "http://127.0.0.1:5000"
    assert settings().artifact_root.is_absolute()


def test_a_place_does_not_move_with_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKQUANT_HOME", "here")
    before = settings(Path("store"))
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert settings(before.store).store == before.store
    assert str(tmp_path / "here") in before.tracking_uri


def test_nothing_is_created_by_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKQUANT_HOME", str(tmp_path / "bq"))
    settings(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_logs_of_one_second_are_told_apart(tmp_path: Path) -> None:
    made = [new_log(tmp_path, "serve-") for _ in range(3) if not time.sleep(0.001)]
    assert made == sorted(set(made))
    for log in made:
        assert log.parent == tmp_path / "logs"
        assert log.name.startswith("serve-2") and log.name.endswith(f"-{os.getpid()}.log")
    assert new_log(tmp_path, suffix="").suffix == ""
