"""Where tests keep what they make."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.engine.settings import Settings


def new_home(home: Path, prepared: Path) -> Path:
    """Make a home, with an MLflow database that lies migrated in another: that takes seconds."""
    home.mkdir(parents=True)
    shutil.copy(prepared / "mlflow.db", home / "mlflow.db")
    return home


def place_in(home: Path, uri: str | None = None) -> Settings:
    """A store and MLflow in a home: its own database, or the server at an address."""
    local = f"sqlite:///{home}/mlflow.db"
    return Settings(home / "store", uri or local, home / "artifacts", home / "p")
