"""What `make up` starts, once for all tests of the group ``services``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.operations.services import Up, brought_up


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Prefect, MLflow and a worker, in a home of their own."""
    with brought_up(tmp_path_factory.mktemp("up") / "home") as services:
        yield services
