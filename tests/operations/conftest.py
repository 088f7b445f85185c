"""What `make up` starts, once for all tests of a group; a failure tells what it said."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.operations.services import Up, brought_up

SHOWN_LINES = 20


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Prefect, MLflow and a worker, in a home of their own."""
    with brought_up(tmp_path_factory.mktemp("up") / "home") as services:
        yield services


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of the services' logs to what a failure shows."""
    report = yield
    found = getattr(item, "funcargs", {}).get("up")
    if report.failed and isinstance(found, Up):
        for log in sorted((found.home / "services").glob("*.log")):
            said = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            report.sections.append((log.name, "\n".join(said)))
    return report
