"""What ``make up`` deploys of ``prefect.yaml``: what is missing or was changed since, and no more.

Deploying takes back what an operator set meanwhile: a schedule that was paused, parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tasks.engine.store import write_text

FILE = "deployed.json"


@dataclass(frozen=True)
class Definition:
    """One deployment as it is described: its flow, and a digest of all that is deployed of it."""

    name: str
    entrypoint: str
    digest: str


def definitions(repository: Path) -> list[Definition]:
    """Read the deployments of ``prefect.yaml``; a flow's parameters are part of its deployment."""
    described: dict[str, Any] = yaml.safe_load((repository / "prefect.yaml").read_text("utf-8"))
    deployments = described.pop("deployments")
    found = []
    for each in deployments:
        code = (repository / each["entrypoint"].partition(":")[0]).read_bytes()
        said = json.dumps([described, each], sort_keys=True, default=str).encode()
        digest = hashlib.sha256(said + code).hexdigest()
        found.append(Definition(each["name"], each["entrypoint"], digest))
    return found


def stale(wanted: Iterable[Definition], known: dict[str, str], folder: Path) -> list[str]:
    """Names of what is to be deployed: what is not known by now, or not as it was kept.

    Args:
        wanted: the deployments as they are described now.
        known: ids of those that the server has, by name.
        folder: where :func:`keep` kept what was deployed last.
    """
    try:
        kept = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        kept = {}
    return [
        each.name
        for each in wanted
        if each.name not in known or kept.get(known[each.name]) != asdict(each)
    ]


def keep(wanted: Iterable[Definition], known: dict[str, str], folder: Path) -> None:
    """Keep what was deployed, by the server's ids."""
    deployed = {known[each.name]: asdict(each) for each in wanted if each.name in known}
    write_text(folder / FILE, json.dumps(deployed, indent=1))


def ids(api: str, wanted: Iterable[Definition]) -> dict[str, str]:
    """Ask a Prefect API for the ids of deployments, by name; one of another flow is not meant."""
    entrypoints = {each.name: each.entrypoint for each in wanted}
    asked = {"deployments": {"name": {"any_": list(entrypoints)}}}
    url = f"{api}/deployments/filter"
    answer = httpx.post(url, json=asked, timeout=60, trust_env=False).raise_for_status()
    return {
        each["name"]: each["id"]
        for each in answer.json()
        if each["entrypoint"] == entrypoints[each["name"]]
    }
