"""Where things lie on this machine when a command does not say so: every default is absolute."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from platformdirs import user_data_path


@dataclass(frozen=True)
class Settings:
    """Folders and addresses of one user on one machine."""

    store: Path
    tracking_uri: str
    artifact_root: Path
    prefect_home: Path


def home() -> Path:
    """Return the data folder: ``$BLOCKQUANT_HOME``, else the platform's user data folder."""
    given = os.environ.get("BLOCKQUANT_HOME")
    return Path(given).expanduser().absolute() if given else user_data_path("blockquant").absolute()


def settings(store: Path | None = None) -> Settings:
    """Resolve the settings; ``store`` and the ``BLOCKQUANT_*`` and MLflow variables win."""
    base = home()
    given_store = store or os.environ.get("BLOCKQUANT_STORE")
    return Settings(
        store=Path(given_store).expanduser().absolute() if given_store else base / "store",
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base / 'mlflow.db'}",
        artifact_root=base / "mlartifacts",
        prefect_home=base / "prefect",
    )


def new_log(store: Path, kind: str = "", suffix: str = ".log") -> Path:
    """Return where a run or server that begins now logs: a path of its own, which sorts by time."""
    # to the microsecond: a process may begin two in one second
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return store / "logs" / f"{kind}{moment}-{os.getpid()}{suffix}"
