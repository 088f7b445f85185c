"""What must not get out: a token in an address, files outside of the output, doors for others."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from tasks.engine.errors import InputError
from tasks.engine.source import open_source
from tests.models import edit_config, make_checkpoint, make_text
from tests.operations.services import Up

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600), pytest.mark.xdist_group("services")]

USER, TOKEN = "robot", "hunter2-token-0b5d1c"
IN_HEADER = base64.b64encode(f"{USER}:{TOKEN}".encode())
RECIPE = """
calib: {{name: text, path: {text}, n_samples: 2, seq_len: 32}}
eval: {{name: text, path: {text}, windows: 2, seq_len: 32}}
quant:
  method: Identity
  weight: {{bit: 8, symmetric: true, granularity: per_channel}}
  act: {{bit: 8, symmetric: true, granularity: per_token}}
serving: {{smoke_test: false}}
"""


@contextmanager
def guarded(server: str, port: int = 0) -> Iterator[int]:
    """Pass on to a server only what bears the token; the port, and at least one request came."""
    asked: list[bool] = []

    class Guard(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            right = self.headers.get("Authorization") == f"Basic {IN_HEADER.decode()}"
            asked.append(right)
            if not right:
                self.reply(401, b"who are you?", {})
                return
            dropped = ("host", "authorization", "connection", "accept-encoding")
            sent = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            found = httpx.request(
                self.command, server + self.path, content=body, headers=sent, timeout=60
            )
            self.reply(found.status_code, found.content, {"Content-Type": _kind(found)})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    proxy = ThreadingHTTPServer(("127.0.0.1", port), Guard)
    Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy.server_port
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert asked and all(asked)


def _kind(answer: httpx.Response) -> str:
    return answer.headers.get("Content-Type", "application/json")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yml"
    path.write_text(RECIPE.format(text=make_text(folder / "words.txt", words=2000)))
    return path


def quantize(up: Up, home: Path, uri: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line with a home and a tracking server of its own."""
    settings = {"BLOCKQUANT_HOME": str(home), "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=up.env | settings, capture_output=True, text=True, check=False, cwd=home
    )


def holding(folder: Path) -> list[str]:
    """Files that hold the token, plain or as a header holds it."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_socket():
            content = path.read_bytes()
            if TOKEN.encode() in content or IN_HEADER in content:
                found.append(str(path))
    return found


def test_the_search_finds_a_token(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plain").write_bytes(b"\0\0http://robot:" + TOKEN.encode() + b"@host\0")
    (tmp_path / "sub" / "header").write_bytes(b"Authorization: Basic " + IN_HEADER)
    (tmp_path / "none").write_bytes(b"robot")
    assert len(holding(tmp_path)) == 2


def test_a_token_reaches_nothing_that_is_kept(up: Up, recipe: Path, tmp_path: Path) -> None:
    home, output = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    said = []
    whole = make_checkpoint(tmp_path / "model")
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    with guarded(up.mlflow) as port:
        uri = f"http://{USER}:{TOKEN}@127.0.0.1:{port}"
        # a run that succeeds
        asked = ("quantize", recipe, "--model", whole, "--output", output, "--json")
        done = quantize(up, home, uri, *asked)
        said.append(done)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        # the run can be found all the same
        assert result["mlflow"]["uri"] == f"http://***@127.0.0.1:{port}"
        assert result["mlflow"]["left"] == 0
        client, run = MlflowClient(up.mlflow), result["mlflow"]["run"]
        assert client.get_run(run).info.status == "FINISHED"
        assert "errors.json" in {file.path for file in client.list_artifacts(run)}
        # a run that fails
        asked = ("quantize", recipe, "--model", broken, "--output", f"{output}-2")
        failed = quantize(up, home, uri, *asked)
        said.append(failed)
        assert failed.returncode == 1 and "NaN or Inf" in failed.stderr
    # a server that is away
    away = quantize(up, home, uri, "quantize", recipe, "--model", whole, "--output", f"{output}-3")
    said.append(away)
    assert away.returncode == 0, away.stderr
    assert "MLflow does not answer" in away.stderr
    assert list((home / "store" / "journal").glob("*.sqlite"))
    # an address that is none
    wrong = quantize(up, home, f"gopher://{USER}:{TOKEN}@host", "check", recipe, "--model", whole)
    said.append(wrong)
    assert wrong.returncode == 2 and "gopher://***@host" in wrong.stderr

    for process in said:
        assert TOKEN not in process.stdout + process.stderr
    # the homes of the run and of both servers, the databases and logs in them, the outputs
    assert holding(tmp_path) == holding(up.home) == []

    with guarded(up.mlflow, port) as _:
        sent = quantize(up, home, uri, "sync", "--json")
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert json.loads(sent.stdout)["left"] == {} and TOKEN not in sent.stderr


def test_servers_listen_on_loopback_only(up: Up) -> None:
    listening = set()
    for process in up.processes():
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                listening.add((connection.laddr.ip, connection.laddr.port))
    ports = {int(address.rpartition(":")[2]) for address in (up.prefect, up.mlflow)}
    assert {port for _, port in listening} >= ports
    assert {address for address, _ in listening} == {"127.0.0.1"}
    # and whoever controls them is their owner
    control = up.home / "services" / "control.sock"
    assert control.is_socket() and control.stat().st_mode & 0o077 == 0
    with pytest.raises(OSError), socket.create_connection((_address(), min(ports)), timeout=5):
        pass


def _address() -> str:
    """An address of this machine that others may reach; one that nobody has where there is none."""
    found = [
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]
    return found[0] if found else "192.0.2.1"


def test_nothing_is_written_outside_of_output_and_home(
    up: Up, recipe: Path, tmp_path: Path
) -> None:
    """A model that says it lies elsewhere, and a recipe whose path climbs, write where asked."""
    home, place = tmp_path / "home", tmp_path / "place"
    for folder in (home, place, tmp_path / "elsewhere"):
        folder.mkdir()
    model = make_checkpoint(tmp_path / "model", shard_size="500KB")
    climbing = "../../elsewhere/evil"
    edit_config(model, _name_or_path=climbing, auto_map={"AutoConfig": f"{climbing}.py"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["metadata"] |= {"name": climbing, climbing: 3}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if home not in p.parents}
    climbed = f"save.save_path={place}/sub/../published/../out"
    done = quantize(up, home, up.mlflow, "quantize", recipe, "--model", model, "--set", climbed)
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if home not in p.parents}
    made = {path for path in after if path not in before}
    assert made and all(path.is_relative_to(place) for path in made)
    outputs = [path.parent for path in made if path.name == "blockquant.json"]
    assert len(outputs) == 1 and not any(path.is_symlink() for path in made)
    assert all(path.is_relative_to(outputs[0]) for path in made if path.is_file())
    assert {p for p in before if after.get(p) != before[p]} <= {place, home}


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "sub/../../x"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    model = make_checkpoint(tmp_path / "model", shard_size="500KB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="which is not in the folder"):
        open_source(model)
