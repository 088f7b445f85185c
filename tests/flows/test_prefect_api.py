"""The Prefect server that comes and goes with a command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from flows.prefect_api import prefect_api, quiet_defaults, waiting_server
from tasks.engine.errors import InputError
from tests.flows.conftest import bare_environment

# a whole life of a server; what the API says shows that it was this one that answered
SERVED = """
import sys
import time
from pathlib import Path
from flows.prefect_api import prefect_api, quiet_defaults

quiet_defaults(Path(sys.argv[1]))
import httpx
with prefect_api(Path(sys.argv[2])) as url:
    print(httpx.get(f"{url}/admin/version").json())
"""
# what is to be done meanwhile goes wrong
FAILED = """
import sys
from pathlib import Path
from flows.prefect_api import prefect_api, quiet_defaults, waiting_server

quiet_defaults(Path(sys.argv[1]))
with waiting_server() as server:
    try:
        with prefect_api(Path(sys.argv[2]), server, lambda: 1 / 0):
            print("served")
    except ZeroDivisionError:
        print("failed", server.process.wait(timeout=5))
"""


def serve(home: Path, log: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVED, str(home), str(log)],
        env=bare_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_served(process: subprocess.Popen[str], log: Path) -> None:
    out, complaint = process.communicate()
    said = log.read_text() if log.exists() else ""
    assert (process.returncode, said) == (0, ""), complaint + said
    assert out.strip() == version("prefect")
    assert not log.exists()


@pytest.mark.ops
@pytest.mark.timeout(600)
def test_servers_that_start_at_once_in_an_empty_home(tmp_path: Path) -> None:
    logs = [tmp_path / f"{name}.log" for name in ("one", "two", "three")]
    processes = [serve(tmp_path / "home", log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        assert_served(process, log)


@pytest.mark.ops
def test_a_proxy_is_not_asked_for_loopback(tmp_path: Path) -> None:
    proxy = "http://127.0.0.1:9"
    log = tmp_path / "server.log"
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
    assert_served(serve(tmp_path / "home", log, **proxies), log)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "127.0.0.1,localhost"),
        ("", "127.0.0.1,localhost"),
        ("example.org", "example.org,127.0.0.1,localhost"),
        ("localhost,example.org", "localhost,example.org,127.0.0.1"),
        ("127.0.0.1,localhost", "127.0.0.1,localhost"),
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_loopback_is_kept_from_proxies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str | None, after: str
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before
    quiet_defaults(tmp_path)
    quiet_defaults(tmp_path)
    assert os.environ[name] == after


def test_a_server_that_waits_writes_no_file_and_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    with waiting_server() as server:
        assert server is not None
        # a port is held, and no one answers there
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{server.port}/api/health", timeout=0.5)
        # time to load and to write, if it did
        time.sleep(8)
        assert server.process.poll() is None
    assert server.process.returncode is not None
    # Prefect makes its folder as it is imported
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_server_ends_where_what_is_done_meanwhile_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILED, str(tmp_path), str(tmp_path / "server.log")],
        env=bare_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "failed -9\n", "")


def test_every_thread_knows_the_local_server(services: dict[str, str]) -> None:
    """Those that begin without the settings of the one that began them."""
    from prefect.settings import PREFECT_API_URL

    with ThreadPoolExecutor(1) as other:
        assert other.submit(PREFECT_API_URL.value).result() == services["PREFECT_API_URL"]


def test_no_server_waits_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with waiting_server() as server:
        assert server is None


class Guarded(BaseHTTPRequestHandler):
    """Stands for a proxy before a server: whoever does not say the word is sent away."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers.get("x-word") == "river" else 403)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("word", ["river", "sea"])
def test_a_stand_in_for_a_guarded_server_is_asked_as_prefect_asks(
    word: str, tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CUSTOM_HEADERS, temporary_settings

    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server, ThreadPoolExecutor(1) as beside:
        serving = beside.submit(server.serve_forever)
        url = f"http://127.0.0.1:{server.server_port}/api"
        headers = {"x-word": word}
        try:
            with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_CUSTOM_HEADERS: headers}):
                if word == "river":
                    with prefect_api(tmp_path / "said") as used:
                        assert used == url
                else:
                    with pytest.raises(InputError, match="no Prefect server answers there"):
                        prefect_api(tmp_path / "said").__enter__()
        finally:
            server.shutdown()
            serving.result()


def test_no_web_page_may_ask_the_local_server(services: dict[str, str]) -> None:
    asked = {"Origin": "http://example.org", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{services['PREFECT_API_URL']}/flow_runs/filter", headers=asked)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
