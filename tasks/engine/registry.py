"""Model versions of checkpoints in MLflow's registry, and the one of them that is champion.

All that a decision needs is kept with the version, so it can be made where and when the server is
there: by the run, by ``blockquant sync``, or again once the checkpoint was served elsewhere.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.engine.gate import Decision, Figures, as_values, decide, figures_of, limits_of
from tasks.engine.offer import Offer, in_place, lost
from tasks.engine.output import content_of, holds
from tasks.engine.publication import REPORT
from tasks.engine.settings import Settings
from tasks.engine.tracking import IDENTITY_TAG, UNKNOWN, Run, prepared_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("blockquant")

CHAMPION = "champion"
GATE = "gate"
GATE_FILE = "gate.json"
# tags of a version that are read again: what it was made of, what was offered, what was decided
CONTENT_TAG = "blockquant.content"
OFFER_TAG = "blockquant.offer"
DECIDED_TAG = "blockquant.decided"
LOCATION_TAG = "location"
# what two models of one name are told apart by
SOURCE_TAG, DIGEST_TAG = "source.path", "source.digest"
# what a server says that has no registry, or lets nobody read there
NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "PERMISSION_DENIED")
# how long another process may take to decide
LOCK_S = 60.0
LONGEST_TAG = 4900


def offer(run: Run, settings: Settings, offered: Offer, here: bool = True) -> dict[str, Any]:
    """Register a checkpoint and make it the champion if the gate holds; said again, says the same.

    Runs that share a store decide one after another. One that is not where it is said to lie is
    refused, as ``offer.lost`` tells: ``here`` is whether it was published on this machine.

    Returns:
        ``model``, ``version``, ``champion`` (whether it is now), ``location`` (where it lies now),
        ``gate`` (in a line), ``reasons``.
    """
    lock = settings.store / "journal" / "registry.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_S):
        return _offer(run, run.client(), offered, here)


def _offer(run: Run, client: MlflowClient, offered: Offer, here: bool) -> dict[str, Any]:
    known = _known(client, offered)
    champion = champion_of(client, offered.model)
    mark = f"{run.id} {offered.digest}"
    if known is not None and known.tags.get(DECIDED_TAG) == mark:
        # sent again after its answer was lost
        return _kept(known, champion)
    is_champion = known is not None and _are_one(known, champion)
    other = None if is_champion else champion
    decision = _decision(offered, other, is_champion)
    if in_the_way := _in_the_way(client, offered):
        decision = decision.refused(in_the_way)
    elif decision.accepted or is_champion:
        offered = in_place(offered)
        # the offer may come late: by now another one may have been published there
        if gone := lost(offered, here):
            decision = decision.refused(gone)
    # after the move: where a version's files are is said once and for all
    version = known or _registered(run, client, offered)
    number = str(version.version)
    found: dict[str, Any] = {
        "model": offered.model,
        "version": number,
        "champion": decision.accepted,
        LOCATION_TAG: offered.location,
        GATE: decision.summary,
        "reasons": [asdict(reason) for reason in decision.reasons],
    }
    if decision.accepted:
        client.set_registered_model_alias(offered.model, CHAMPION, number)
        if other is not None and other.tags.get(LOCATION_TAG) == offered.location:
            _tag(client, other, {LOCATION_TAG: f"replaced by version {number}"})
    elif is_champion:
        found["champion"] = True
        log.warning("%s version %s stays champion until another is", offered.model, number)
    known_of_it = {
        "limits": offered.limits,
        "figures": offered.figures,
        "compared_with": None if other is None else _described(other),
    }
    run.log_json({**found, **known_of_it}, GATE_FILE)
    run.set_tags({GATE: decision.summary, "model.name": offered.model, "model.version": number})
    # last: a process that dies before it decides again
    _tag(
        client,
        version,
        {
            **_tags(offered),
            GATE: decision.summary,
            "run": run.id,
            OFFER_TAG: json.dumps(asdict(offered)),
            DECIDED_TAG: mark,
        },
    )
    _say(found)
    return found


def _say(found: Mapping[str, Any]) -> None:
    log.info("%s version %s: %s", found["model"], found["version"], found[GATE])
    for reason in found["reasons"]:
        log.debug("gate: %s: %s", "holds" if reason["holds"] else "does not hold", reason["line"])


def _decision(offered: Offer, champion: ModelVersion | None, is_champion: bool) -> Decision:
    figures, limits = figures_of(offered.figures), limits_of(offered.limits)
    if is_champion:
        return decide(figures, limits, alone="it is the champion already")
    if champion is None:
        return decide(figures, limits)
    against = f"champion version {champion.version}"
    if _is_of_another(offered, champion):
        alone = decide(figures, limits, alone=f"{against} is not compared with")
        source = champion.tags[SOURCE_TAG]
        line = f"{against} is of another model of this name ({source}); set gate.model_name"
        return alone.refused(line)
    return decide(figures, limits, _figures(champion), against)


def _in_the_way(client: MlflowClient, offered: Offer) -> str | None:
    """Why a checkpoint cannot take its place: a champion of another registered model lies there."""
    place = offered.place
    for one in _champions_at(client, place) if place else ():
        if one.name != offered.model and _lies_at(Path(place), one):
            return (
                f"{place} holds the champion of {one.name}, version {one.version}; give another "
                f"output, or remove the alias {CHAMPION} of {one.name} in MLflow"
            )
    return None


def _lies_at(folder: Path, version: ModelVersion) -> bool:
    """Say whether a folder holds what its version says, as far as that can be told."""
    tags = version.tags
    if IDENTITY_TAG not in tags or CONTENT_TAG not in tags:
        return True
    return holds(folder, tags[IDENTITY_TAG], tags[CONTENT_TAG])


def _is_of_another(offered: Offer, champion: ModelVersion) -> bool:
    """Say whether a champion's source is another model: other weights of another place.

    New weights of the same place are the model's next state, and the same ones may have moved.
    """
    tags = (SOURCE_TAG, DIGEST_TAG)
    if offered.named or any(tag not in champion.tags for tag in tags):
        return False
    return all(champion.tags[tag] != offered.facts.get(tag) for tag in tags)


def _are_one(version: ModelVersion, other: ModelVersion | None) -> bool:
    return other is not None and str(other.version) == str(version.version)


def _figures(version: ModelVersion) -> Figures:
    """Figures of a version; none of one that somebody else registered."""
    try:
        return figures_of(json.loads(version.tags[OFFER_TAG])["figures"])
    except (KeyError, ValueError, TypeError):
        return Figures()


def _described(version: ModelVersion) -> dict[str, Any]:
    return {"version": str(version.version), "figures": as_values(_figures(version))}


def _kept(version: ModelVersion, champion: ModelVersion | None) -> dict[str, Any]:
    return {
        "model": version.name,
        "version": str(version.version),
        "champion": _are_one(version, champion),
        LOCATION_TAG: version.tags.get(LOCATION_TAG, ""),
        GATE: version.tags[GATE],
        "reasons": [],
    }


def _tags(offered: Offer) -> dict[str, str]:
    numbers = {k: v for k, v in offered.figures.items() if isinstance(v, float)}
    return {
        IDENTITY_TAG: offered.identity,
        CONTENT_TAG: offered.content,
        LOCATION_TAG: offered.location,
        **{name: repr(value) for name, value in numbers.items()},
        "served": str(offered.figures["served"]),
        "served.reason": str(offered.figures["served_reason"]),
        **offered.facts,
    }


def _known(client: MlflowClient, offered: Offer) -> ModelVersion | None:
    """The version of this very checkpoint, None where it is not registered."""
    asked = f"name = '{_quoted(offered.model)}' and tags.`{CONTENT_TAG}` = '{offered.content}'"
    known = client.search_model_versions(asked, max_results=1)
    return known[0] if known else None


def _registered(run: Run, client: MlflowClient, offered: Offer) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(offered.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        offered.model,
        source=_source(run, offered.location),
        run_id=run.id,
        tags={name: value[:LONGEST_TAG] for name, value in _tags(offered).items()},
        await_creation_for=0,
    )


def _source(run: Run, location: str) -> str:
    """Where a version's files are, as MLflow may be told."""
    if "://" in location:
        return location
    if not run.uri.startswith(("http://", "https://")):
        return Path(location).as_uri()
    # a server takes no folders of its clients: the run says which folder of which machine it is
    where = {"location": location, "host": socket.gethostname()}
    run.log_json(where, "checkpoint/location.json")
    return f"runs:/{run.id}/checkpoint"


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _as_text(text: str) -> str:
    """A text in a filter of tags, where MLflow takes either quotes and no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def champion_of(client: MlflowClient, model: str) -> ModelVersion | None:
    """The version that is champion, None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, CHAMPION)
    except MlflowException as error:
        # no such alias, or an alias of a version that was deleted, or no such model
        if error.error_code in UNKNOWN:
            return None
        raise


def is_champions(settings: Settings, folder: Path) -> bool:
    """Say whether a folder is where a champion lies, as its version has it.

    True where the server does not answer: what is not known to be no champion's is kept.
    """
    from mlflow.exceptions import MlflowException

    try:
        return bool(_champions_at(prepared_client(settings), str(folder)))
    except MlflowException as error:
        return error.error_code not in NO_REGISTRY


def _champions_at(client: MlflowClient, folder: str) -> list[ModelVersion]:
    """The champions whose versions say that they lie in a folder."""
    at = client.search_model_versions(f"tags.`{LOCATION_TAG}` = {_as_text(folder)}")
    found = [champion_of(client, name) for name in sorted({version.name for version in at})]
    return [one for one in found if one is not None and one.tags.get(LOCATION_TAG) == folder]


def champions(client: MlflowClient) -> list[dict[str, Any]]:
    """Each champion: its model, version, location, scheme, figures, decision and run."""
    found = []
    token = None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        for model in page:
            version = champion_of(client, model.name)
            if version is not None:
                found.append(_champion(version))
        token = page.token
        if not token:
            return found


def _champion(version: ModelVersion) -> dict[str, Any]:
    figures = _figures(version)
    return {
        "model": version.name,
        "version": str(version.version),
        LOCATION_TAG: version.tags.get(LOCATION_TAG, version.source),
        "scheme": version.tags.get("scheme"),
        "served": version.tags.get("served"),
        "nll_increase": figures.nll_increase,
        "kl": figures.kl,
        "top1_agreement": figures.top1_agreement,
        GATE: version.tags.get(GATE),
        "run": version.tags.get("run", version.run_id),
    }


def version_of(run: Run) -> ModelVersion | None:
    """The version that a run registered, None where it registered none.

    Raises:
        MlflowException: the server does not answer.
    """
    from mlflow.exceptions import MlflowException

    client = run.client()
    tags = client.get_run(run.id).data.tags
    try:
        return client.get_model_version(tags["model.name"], tags["model.version"])
    except KeyError:
        return None
    except MlflowException as error:
        if error.error_code in UNKNOWN:
            return None
        raise


def is_of_run(folder: Path, run: Run) -> bool:
    """Say whether a folder holds the checkpoint that a run registered; True where it has none."""
    version = version_of(run)
    if version is None or CONTENT_TAG not in version.tags:
        return True
    report = (folder / REPORT).read_text(encoding="utf-8")
    return content_of(version.tags[IDENTITY_TAG], report) == version.tags[CONTENT_TAG]


def served_later(run: Run, settings: Settings, served: Mapping[str, Any]) -> dict[str, Any] | None:
    """Decide again about a run's version with what came of serving it; None where it has none.

    Args:
        run: the run that registered it.
        settings: where the tracking server and the store are.
        served: the figures that say what came of serving it.

    Raises:
        MlflowException: the server does not answer.
    """
    version = version_of(run)
    try:
        kept = None if version is None else Offer(**json.loads(version.tags[OFFER_TAG]))
    except (KeyError, ValueError, TypeError):
        return None
    if kept is None:
        return None
    decided_again = replace(kept, figures={**kept.figures, **served})
    # it may have been served from a copy on another machine
    return offer(run, settings, decided_again, here=False)


def _tag(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Set the tags that differ, in their order."""
    for name, value in tags.items():
        short = value if name == OFFER_TAG else value[:LONGEST_TAG]
        if version.tags.get(name) != short:
            client.set_model_version_tag(version.name, str(version.version), name, short)
