"""What tests share: a Prefect server, a prepared MLflow database, homes of their own, the CLI."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.models import DEMO_MODEL, make_checkpoint, make_text
from tests.places import new_home
from tests.replaying import processes_of, recording, replayed

# fixtures
__all__ = ["processes_of", "recording", "replayed"]

# files whose tests take minutes, the longest first
LONGEST = (
    "integration/test_quality.py",
    "integration/test_resume.py",
    "operations/test_killed_services.py",
    "integration/test_random_kills.py",
    "operations/test_production.py",
    "operations/test_sweep.py",
    "operations/test_deployments.py",
    "integration/test_outliers.py",
    "integration/test_resume_methods.py",
    "integration/test_several_devices.py",
    "integration/test_learning.py",
    "integration/test_memory.py",
    "flows/test_serving_cli.py",
    "flows/test_llmc_files.py",
)
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# what it asserts is told as tests' own assertions are
pytest.register_assert_rewrite("tests.integration.resuming")
# no test reaches for a hub, whatever the machine's network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# what `datasets` makes of a test's texts is not kept
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="blockquant-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["DO_NOT_TRACK"] = "true"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Each worker, and what its tests start, computes with its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // len(specs))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share fixtures, so one worker takes them, unless a test names a group.

    Before pytest-xdist looks for groups, which it does once.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_file(item)))
    # none is left to run alone at the end
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(_file(item), len(LONGEST)))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


@dataclass(frozen=True)
class Outcome:
    """What one command gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object that --json printed."""
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test for which this machine lacks something; fail where all of it should be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and texts; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of pytest-xdist share for the time of this run."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server and the environment that leads to it, one for the whole session."""
    from prefect.settings import PREFECT_HOME, temporary_settings

    from flows.prefect_api import prefect_api, quiet_defaults

    folder = tmp_path_factory.mktemp("prefect")
    os.environ["PREFECT_HOME"] = str(folder)
    quiet_defaults(folder)
    # what Prefect read before is the user's own, which all workers would share
    with temporary_settings({PREFECT_HOME: folder}), prefect_api(folder / "server.log") as url:
        yield {"PREFECT_API_URL": url, "PREFECT_HOME": str(folder)}


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose MLflow database is migrated already: that takes seconds."""
    from tasks.engine.settings import Settings
    from tasks.engine.tracking import prepared_client

    folder = tmp_path_factory.mktemp("prepared")
    prepared_client(
        Settings(folder / "store", f"sqlite:///{folder / 'mlflow.db'}", folder / "a", folder / "p")
    )
    return folder


@pytest.fixture
def home(tmp_path: Path, prepared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: store, MLflow database and artifacts."""
    folder = new_home(tmp_path / "home", prepared_home)
    monkeypatch.setenv("BLOCKQUANT_HOME", str(folder))
    monkeypatch.delenv("BLOCKQUANT_STORE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(home: Path, tmp_path: Path) -> Cli:
    """Run the command line as a user does, in a process of its own, from an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*arguments: object, env: dict[str, str] | None = None, limit: float = 240) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of random words."""
    return make_text(tmp_path_factory.mktemp("texts") / "words.txt")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded trained model."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def recorded_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, prepared_home: Path, services: dict[str, str]
) -> Path:
    """The checkpoint that the recorded server served; tests/tasks/engine/serving/record.py."""
    folder = tmp_path_factory.mktemp("recorded")
    text = make_text(folder / "words.txt", words=2000)
    shutil.copytree(prepared_home, folder / "home")
    evaluated = f"eval={{name: text, path: {text}, windows: 2, seq_len: 48, dtype: float32}}"
    command = [sys.executable, "-m", "flows.cli", "quantize", "rtn_w4a16", "--set", evaluated]
    command += ["--model", str(DEMO_MODEL), "--output", str(folder / "checkpoint")]
    environment = os.environ | services | {"PYTHONPATH": str(ROOT)}
    environment |= {"BLOCKQUANT_HOME": str(folder / "home")}
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
    return folder / "checkpoint"
