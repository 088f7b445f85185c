"""What tests of MLflow share, and those of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tasks.engine.settings import Settings
from tasks.engine.source import Source, open_source
from tests.models import DEMO_MODEL
from tests.places import place_in


@pytest.fixture
def place(home: Path) -> Settings:
    """A store and an MLflow database of the test's own."""
    return place_in(home)


@pytest.fixture(scope="module")
def source() -> Source:
    """The demo model."""
    return open_source(DEMO_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo model's, as transformers loads it."""
    return AutoTokenizer.from_pretrained(DEMO_MODEL)
