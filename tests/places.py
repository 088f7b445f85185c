"""Where tests keep what they make."""

from __future__ import annotations

from pathlib import Path

from tasks.engine.settings import Settings


def place_in(home: Path, uri: str | None = None) -> Settings:
    """A store and MLflow in a home: its own database, or the server at an address."""
    local = f"sqlite:///{home}/mlflow.db"
    return Settings(home / "store", uri or local, home / "artifacts", home / "p")
