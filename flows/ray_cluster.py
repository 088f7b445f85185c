"""A Ray cluster for the children of a sweep: one that is there, or one that comes and goes."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

from prefect.settings import PREFECT_API_URL

from flows.prefect_api import NEVER_PROXIED
from flows.runner import Runner
from tasks.engine.errors import InputError, RunError, one_line

# what workers on other machines are to have of our environment
HANDED_OVER = ("BLOCKQUANT_", "MLFLOW_", "HF_", "PREFECT_", "DO_NOT_TRACK", "NO_PROXY", "no_proxy")
# a sweep hands over parameters and figures only; the least that Ray takes is 75 MB
OBJECT_STORE_BYTES = 100_000_000


def handed_over() -> dict[str, str]:
    """What of our environment workers of a cluster that is not ours are to have."""
    return {k: v for k, v in os.environ.items() if k.startswith(HANDED_OVER)}


@contextmanager
def cluster(runner: Runner) -> Iterator[Any]:
    """A task runner on the cluster that is named, else on one of this machine that ends with us."""
    require_reachable(runner)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray would share the GPUs' names with tasks that asked for none
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as stack:
        if runner.address is None:
            if "RAY_AUTH_MODE" not in os.environ:
                # nobody else on this machine is to give our workers work
                os.environ["RAY_AUTH_MODE"] = "token"
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
            cores = (runner.threads or 1) * (runner.children_at_once or 1)
            given: Mapping[str, Any] = {
                "address": "local",
                "num_cpus": max(cores, os.cpu_count() or 1),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": folder,
            }
        else:
            given = {"address": runner.address}
        yield stack.enter_context(_started(runner, {**quiet, **given}))


@contextmanager
def _started(runner: Runner, options: dict[str, Any]) -> Iterator[Any]:
    from prefect_ray import RayTaskRunner

    pool: AbstractContextManager[Any] = RayTaskRunner(init_kwargs=options)
    try:
        pool.__enter__()
    except ConnectionError as error:
        raise InputError(
            f"--address {runner.address}: no Ray cluster answers there; start one with "
            "`ray start --head`, or give no address for one that comes and goes with the sweep"
        ) from error
    except Exception as error:
        raise RunError(f"--runner ray: Ray does not start: {one_line(error)}") from error
    try:
        yield pool
    finally:
        pool.__exit__(None, None, None)


def require_room(runner: Runner, room: Mapping[str, float]) -> None:
    """Refuse children that no machine of the cluster has room for: they would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = room["num_cpus"], room["num_gpus"]
    if any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes):
        return
    most = max((n.get("CPU", 0) for n in nodes), default=0)
    cards = max((n.get("GPU", 0) for n in nodes), default=0)
    raise InputError(
        f"--cores {cpus} --gpus {gpus}: no machine of the Ray cluster has as many; the most are "
        f"{most:g} cores and {cards:g} GPUs"
    )


def require_reachable(runner: Runner) -> None:
    """Refuse workers on other machines whose Prefect server would be one of this machine only."""
    address, api = runner.address, urlsplit(str(PREFECT_API_URL.value() or ""))
    if address is None or api.hostname not in NEVER_PROXIED:
        return
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname
    if host not in ("auto", *NEVER_PROXIED):
        raise InputError(
            f"--address {address}: its workers do not reach a Prefect server that listens on this "
            "machine only; set PREFECT_API_URL to one that they reach"
        )
