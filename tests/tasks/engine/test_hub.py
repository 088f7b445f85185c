"""Hub models, against a stand-in for the hub: its real client, a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from configs.loading import load_recipe
from tasks.check import Request, check
from tasks.engine.disk import DiskFullError
from tasks.engine.errors import InputError
from tasks.engine.hub import fetched, is_hub_id, look_up
from tasks.engine.source import open_source
from tests.models import DEMO_MODEL, make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A model's files as the hub serves them, and the weights that were asked for whole."""

    folder: Path
    downloads: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            files = sorted(p for p in hub.folder.iterdir() if p.is_file())
            if path.startswith("/api/models/org/model/tree/"):
                listed = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in files
                ]
                return self._send(200, json.dumps(listed).encode())
            if path.startswith("/api/models/org/model"):
                siblings = [{"rfilename": f.name} for f in files]
                described = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
                return self._send(200, json.dumps(described).encode())
            file = hub.folder / path.rsplit("/", 1)[1]
            if not path.startswith("/org/model/resolve/") or not file.is_file():
                return self._send(404, b"", X_Error_Code="EntryNotFound")
            body = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
            asked = self.headers.get("Range")
            if asked is None:
                if self.command == "GET" and file.suffix == ".safetensors":
                    hub.downloads.append(file.name)
                return self._send(200, body, **headers)
            first, last = asked.removeprefix("bytes=").split("-")
            part = body[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
            return self._send(206, part, Content_Range=place, **headers)

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(make_checkpoint(tmp_path / "served", shard_size="1MB"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()


def test_headers_say_the_same_as_files_stand_in_hub(hub: Hub) -> None:
    local = open_source(hub.folder)
    remote = look_up("org/model")
    assert len({info.file for info in local.tensors.values()}) > 1
    assert dict(remote.tensors) == dict(local.tensors)
    assert remote.config == local.config
    assert hub.downloads == []


def test_weights_are_downloaded_once_stand_in_hub(hub: Hub) -> None:
    local = open_source(hub.folder)
    # as some repositories have: all once more, of another layout
    (hub.folder / "consolidated.safetensors").write_bytes(b"not read")
    source = fetched(look_up("org/model"), "org/model")
    assert sorted(hub.downloads) == sorted({info.file for info in local.tensors.values()})
    assert source.digest(source.tensors) == local.digest(local.tensors)
    hub.downloads.clear()
    again = fetched(look_up("org/model"), "org/model")
    assert again.path == source.path
    assert hub.downloads == []


def test_check_downloads_no_weights_stand_in_hub(hub: Hub, tmp_path: Path) -> None:
    request = Request(load_recipe("rtn_w4a16"), "org/model", tmp_path / "out", tmp_path / "store")
    job, prediction = check(request)
    assert hub.downloads == []
    local, expected = check(
        Request(load_recipe("rtn_w4a16"), str(hub.folder), tmp_path / "out", tmp_path / "store")
    )
    assert job.plan == local.plan
    assert prediction.export_bytes == expected.export_bytes
    job, _ = check(request, download=True)
    assert hub.downloads != []
    assert job.source.digest(job.source.tensors) == local.source.digest(local.source.tensors)


def test_refused_before_any_download_stand_in_hub(hub: Hub, tmp_path: Path) -> None:
    recipe = load_recipe("rtn_w4a16", ["ignored_layers=[mlp.nothing]"])
    with pytest.raises(InputError, match="matches no linear"):
        check(Request(recipe, "org/model", tmp_path / "out", tmp_path / "store"), download=True)
    assert hub.downloads == []


def test_unknown_model_stand_in_hub(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"model org/none: .* give a local folder"):
        look_up("org/none")


def test_no_safetensors_stand_in_hub(hub: Hub) -> None:
    for file in hub.folder.glob("*.safetensors*"):
        file.unlink()
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="give a local folder of safetensors"):
        look_up("org/model")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
    ],
    ids=["of the system", "of the hub's own store"],
)
def test_a_full_disk_is_no_bad_input_stand_in_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    source = look_up("org/model")

    def http_get(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", http_get)
    with pytest.raises(DiskFullError) as raised:
        fetched(source, "org/model")
    assert str(raised.value).startswith(f"{tmp_path / 'cache'}: no room is left on its disk")


@pytest.mark.parametrize("named", ["/org/model", "./org", "~/model", "model", "a/b/c"])
def test_what_is_no_hub_id(named: str) -> None:
    assert not is_hub_id(named)


def test_a_folder_is_no_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO_MODEL.parent.parent)
    assert not is_hub_id("assets/demo-model")
    assert is_hub_id("org/model")
