"""What is deployed again, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.local_deployments import definitions, keep, stale

DESCRIBED = """
pull: [{step: {directory: "{{ $HERE }}"}}]
deployments:
  - {name: one, entrypoint: one.py:flow, parameters: {recipe: a}}
  - {name: two, entrypoint: two.py:flow}
"""
KNOWN = {"one": "id-1", "two": "id-2"}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose two deployments are deployed."""
    (tmp_path / "prefect.yaml").write_text(DESCRIBED)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def flow(recipe): ...\n")
    assert stale(definitions(tmp_path), {}, tmp_path) == ["one", "two"]
    keep(definitions(tmp_path), KNOWN, tmp_path)
    return tmp_path


def test_what_was_deployed_as_it_is_described_is_not_deployed_again(repository: Path) -> None:
    assert stale(definitions(repository), KNOWN, repository) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "names"),
    [
        ("prefect.yaml", "recipe: a", "recipe: b", ["one"]),
        ("prefect.yaml", "HERE", "THERE", ["one", "two"]),
        ("two.py", "recipe", "model", ["two"]),
        ("deployed.json", "{", "", ["one", "two"]),
    ],
)
def test_what_changed_is(
    repository: Path, file: str, before: str, after: str, names: list[str]
) -> None:
    path = repository / file
    path.write_text(path.read_text().replace(before, after))
    assert stale(definitions(repository), KNOWN, repository) == names


def test_what_a_server_lacks_or_has_anew_is(repository: Path) -> None:
    assert stale(definitions(repository), {"one": "id-1"}, repository) == ["two"]
    assert stale(definitions(repository), KNOWN | {"one": "id-3"}, repository) == ["one"]
