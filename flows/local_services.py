"""``make up`` and ``make down``: Prefect, MLflow and workers on this machine, kept by supervisor.

Everything listens on loopback; what dies is started again; state and logs lie in
``$BLOCKQUANT_HOME/services``.
"""

from __future__ import annotations

import configparser
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import httpx
import psutil
from filelock import FileLock
from supervisor.xmlrpc import SupervisorTransport

from flows.local_deployments import definitions, ids, keep, stale
from flows.local_runs import end_lost
from flows.local_servers import POOL, SERVICES, Services, saved, worker_name
from flows.prefect_api import OFFLINE, unproxied
from tasks.engine.errors import InputError, RunError, one_line
from tasks.engine.settings import home, settings

PORTS = {"BLOCKQUANT_PREFECT_PORT": 4200, "BLOCKQUANT_MLFLOW_PORT": 5000}
# a new database is created and migrated first
START_LIMIT_S = 300.0
# of a worker, whose runs end first, and of a server; then of all
WORKER_STOP_S = 60
SERVER_STOP_S = 15
STOP_LIMIT_S = 120.0
# of the name of a unix socket; supervisor makes it under a longer one first
LONGEST_SOCKET = 95
REPOSITORY = Path(__file__).resolve().parent.parent


def up() -> Services:
    """Start what is not running yet, deploy, and wait until all of it answers.

    Raises:
        InputError: a setting cannot be worked with.
        RunError: a service did not start; with the end of its log.
    """
    folder = home() / "services"
    if not (REPOSITORY / "prefect.yaml").is_file():
        raise InputError(f"up: no prefect.yaml in {REPOSITORY}; run it from a clone")
    if len(os.fsencode(_socket(folder))) > LONGEST_SOCKET:
        raise InputError(f"BLOCKQUANT_HOME: {folder.parent} is too long a name; give a shorter one")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "up.lock"):
        before = saved(folder)
        running = before if before is not None and _is_running(folder) else None
        services = running or _supervised(folder, before)
        _start(services, "mlflow")
        _start(services, "prefect")
        _wait(services, "prefect", lambda: _answers(f"{services.prefect_url}/api/health"))
        _deploy(services)
        if running is None:
            end_lost(f"{services.prefect_url}/api", folder)
        for number in range(services.workers):
            _start(services, f"worker-{number}")
        _wait(services, "mlflow", lambda: _answers(f"{services.mlflow_url}/health"))
        for number in range(services.workers):
            name = f"worker-{number}"
            _wait(services, name, lambda n=number: _is_online(services, n))  # type: ignore[misc]
    return services


def down() -> bool:
    """End what ``up`` started, and nothing else; whether anything ran."""
    folder = home() / "services"
    if not folder.is_dir():
        return False
    with FileLock(folder / "up.lock"):
        ran = _is_running(folder)
        if ran:
            # it may end by itself meanwhile
            with suppress(OSError, Fault, psutil.NoSuchProcess, psutil.TimeoutExpired):
                supervisor = psutil.Process(_control(folder).supervisor.getPID())
                _control(folder).supervisor.shutdown()
                supervisor.wait(STOP_LIMIT_S)
        return _end_leftovers(folder) > 0 or ran


def environment(services: Services) -> dict[str, str]:
    """What the services are started with, over what the user set; no telemetry, no proxies."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SUPERVISOR")}
    # another server's, and a value that would be written into the deployments
    for name in ("PREFECT_API_URL", "BLOCKQUANT_REPOSITORY"):
        kept.pop(name, None)
    place = {"BLOCKQUANT_HOME": str(home()), SERVICES: str(services.folder)}
    prefect = {"PREFECT_HOME": str(settings().prefect_home)}
    return {**OFFLINE, **prefect, **kept, **place, **unproxied(kept)}


def _supervised(folder: Path, before: Services | None) -> Services:
    """End what is left of the last time, and have supervisor run, with no service yet."""
    _end_leftovers(folder)
    services = _chosen(folder, before)
    services.save()
    _start_supervisor(services)
    return services


def _chosen(folder: Path, before: Services | None) -> Services:
    """The ports and workers asked for; else those of the last time, where they are free.

    Raises:
        InputError: a port that was asked for is taken.
    """
    last = (before.prefect_port, before.mlflow_port) if before else (None, None)
    ports: list[int] = []
    for (name, default), used in zip(PORTS.items(), last, strict=True):
        given = _number(name)
        port = _free_port(given or used or default, ports)
        if given is not None and port != given:
            raise InputError(f"{name}: {given} is taken; give another one or unset it")
        ports.append(port)
    workers = _number("BLOCKQUANT_WORKERS") or 1
    runs = _number("BLOCKQUANT_WORKER_RUNS") or 1
    return Services(folder, REPOSITORY, ports[0], ports[1], workers, runs)


def _number(name: str) -> int | None:
    given = os.environ.get(name)
    if not given:
        return None
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise InputError(f"{name}: {given} is no number from 1 to 65535; give one or unset it")
    return int(given)


def _free_port(wanted: int, taken: list[int]) -> int:
    """The port that is wanted where it is free, else any."""
    for port in (wanted, 0):
        if port in taken:
            continue
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise RunError("no free port on 127.0.0.1")


def _socket(folder: Path) -> Path:
    return folder / "control.sock"


def _control(folder: Path) -> Any:
    transport = SupervisorTransport(None, None, f"unix://{_socket(folder)}")
    return ServerProxy("http://127.0.0.1", transport=transport)


def _is_running(folder: Path) -> bool:
    try:
        return bool(_control(folder).supervisor.getState()["statename"] == "RUNNING")
    except (OSError, Fault):
        return False


def _start_supervisor(services: Services) -> None:
    folder = services.folder
    config = configparser.RawConfigParser()
    config.read_dict(_config(services))
    with (folder / "supervisord.conf").open("w", encoding="utf-8") as file:
        config.write(file)
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", file.name]
    done = subprocess.run(
        command, env=environment(services), capture_output=True, text=True, check=False
    )
    deadline = time.monotonic() + 30
    while done.returncode == 0 and time.monotonic() < deadline:
        if _is_running(folder):
            return
        time.sleep(0.05)
    raise RunError(f"supervisor did not start: {_last(done.stdout + done.stderr)}")


def _config(services: Services) -> dict[str, dict[str, str]]:
    folder = str(services.folder).replace("%", "%%")
    sections = {
        "unix_http_server": {"file": f"{folder}/control.sock", "chmod": "0700"},
        "supervisord": {
            "logfile": f"{folder}/supervisord.log",
            "pidfile": f"{folder}/supervisord.pid",
            "childlogdir": folder,
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
        "supervisorctl": {"serverurl": f"unix://{folder}/control.sock"},
    }
    workers = [f"worker-{n}" for n in range(services.workers)]
    for name in ("mlflow", "prefect", *workers):
        command = shlex.join([sys.executable, "-m", "flows.local_servers", name])
        sections[f"program:{name}"] = {
            "command": command.replace("%", "%%"),
            "directory": str(services.repository).replace("%", "%%"),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": "2",
            "startretries": "5",
            "stopasgroup": "true",
            "killasgroup": "true",
            # the highest is stopped first: runs end while the servers hear of it
            "priority": "2" if name in workers else "1",
            "stopwaitsecs": str(WORKER_STOP_S if name in workers else SERVER_STOP_S),
            "redirect_stderr": "true",
            "stdout_logfile": f"{folder}/{name}.log",
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "1",
        }
    return sections


def _start(services: Services, name: str) -> None:
    """Start a service that does not run; it may take its time to answer."""
    # running, or started again right now
    with suppress(Fault):
        _control(services.folder).supervisor.startProcess(name, False)


def _wait(services: Services, name: str, answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if answers():
            return
        state = _control(services.folder).supervisor.getProcessInfo(name)["statename"]
        if state == "FATAL":
            break
        time.sleep(0.2)
    log = services.folder / f"{name}.log"
    said = _last(log.read_text(errors="replace") if log.exists() else "")
    raise RunError(f"{name} did not start: {said}; all of its log is in {log}")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _is_online(services: Services, number: int) -> bool:
    """Whether a worker was seen in the pool since its process was started."""
    workers = f"{services.prefect_url}/api/work_pools/{POOL}/workers/filter"
    try:
        found = httpx.post(workers, json={}, timeout=10, trust_env=False).raise_for_status().json()
    except httpx.HTTPError:
        return False
    info = _control(services.folder).supervisor.getProcessInfo(f"worker-{number}")
    return info["statename"] in ("STARTING", "RUNNING") and any(
        worker["status"] == "ONLINE"
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= info["start"]
        for worker in found
        if worker["name"] == worker_name(number)
    )


def _deploy(services: Services) -> None:
    """Deploy what is missing or was described anew since; what an operator set stays."""
    pool = f"{services.prefect_url}/api/work_pools/{POOL}"
    if not _answers(pool):
        _prefect(services, "work-pool", "create", "--type", "process", POOL)
    api, wanted = f"{services.prefect_url}/api", definitions(services.repository)
    names = stale(wanted, ids(api, wanted), services.folder)
    if names:
        _prefect(services, "--no-prompt", "deploy", *(f"--name={name}" for name in names))
        keep(wanted, ids(api, wanted), services.folder)


def _prefect(services: Services, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=services.repository,
        env=environment(services) | {"PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"prefect {' '.join(arguments)}: {_last(done.stdout + done.stderr)}")


def _end_leftovers(folder: Path) -> int:
    """End processes of these services that outlive their supervisor; how many there were."""
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(SERVICES) == str(folder):
                left.append(process)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=10)[1]:
        with suppress(psutil.Error):
            process.kill()
    return len(left)


def main(arguments: list[str]) -> int:
    """Run ``up`` or ``down``; failures are one line."""
    try:
        if arguments == ["up"]:
            services = up()
            shown = {"Prefect": services.prefect_url, "MLflow": services.mlflow_url}
            print("\n".join(f"{name}: {url}" for name, url in shown.items()))
        elif arguments == ["down"]:
            print("ended" if down() else "nothing was running")
        else:
            raise InputError("python -m flows.local_services up, or down")
    except Exception as error:
        print(f"blockquant: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
