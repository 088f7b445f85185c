"""What tests of MLflow share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engine.settings import Settings
from tests.places import place_in


@pytest.fixture
def place(home: Path) -> Settings:
    """A store and an MLflow database of the test's own."""
    return place_in(home)
