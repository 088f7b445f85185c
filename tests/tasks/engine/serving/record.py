"""Record what a real SGLang server says, for the tests of what speaks to it.

    PYTHONPATH=. python record.py CHECKPOINT RECORDING.json PYTHON [SERVER ARGUMENTS]

CHECKPOINT is what tests/conftest.py makes, PYTHON the interpreter of an environment with SGLang.
The recording holds every exchange of one smoke test, some requests that a server refuses, an answer
in parts, and what a server says that cannot load its checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from configs.serving_schema import Serving
from tasks.engine.errors import RunError
from tasks.engine.served_windows import read_windows
from tasks.engine.serving.client import Client
from tasks.smoke_test import serve_and_compare, served

# where the recorded checkpoint lay, in what the server says
PLACE = "CHECKPOINT"


def main(checkpoint: Path, recording: Path, python: str, arguments: list[str]) -> None:
    """Serve, record, write the file."""
    exchanges: list[dict[str, Any]] = []
    # few tokens: bf16 there and float32 here differ by more than on whole texts
    serving = Serving(python=python, server_args=tuple(arguments), max_nll_gap=0.05)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        plain = httpx.Client.request
        httpx.Client.request = _recorded(plain, exchanges)  # type: ignore[method-assign]
        found = serve_and_compare(checkpoint, serving, "cpu", log)
        with served(checkpoint, serving, log) as (client, _):
            client.version()
            # requests that are refused are kept by their names
            httpx.Client.request = plain  # type: ignore[method-assign]
            odd = _odd_requests(client, read_windows(checkpoint).tokens[0].tolist())
            stream = _stream(client, read_windows(checkpoint).tokens[0].tolist())
        started = log.read_text(encoding="utf-8", errors="replace")
        refused = _refused(checkpoint, Path(folder), serving)
    written = {
        "found": found,
        "exchanges": exchanges,
        "odd": odd,
        "stream": stream,
        "starts": {"log": _end_of(started)},
        "refused": refused,
    }
    text = json.dumps(written, indent=1).replace(str(checkpoint), PLACE)
    recording.write_text(text + "\n", encoding="utf-8")


def _recorded(request: Any, exchanges: list[dict[str, Any]]) -> Any:
    def recording(self: httpx.Client, method: str, url: str, **more: Any) -> httpx.Response:
        answer: httpx.Response = request(self, method, url, **more)
        exchanges.append(
            {
                "method": method,
                "path": httpx.URL(url).path,
                "body": more.get("json"),
                "status": answer.status_code,
                "answer": answer.text,
            }
        )
        return answer

    return recording


def _odd_requests(client: Client, tokens: list[int]) -> dict[str, Any]:
    """Requests that a server refuses."""
    url = f"{client.url}/generate"
    asked = {
        "too long": {"json": {"input_ids": tokens * 50, "sampling_params": {"max_new_tokens": 1}}},
        "malformed": {"content": b"{nope", "headers": {"content-type": "application/json"}},
        "no input": {"json": {"sampling_params": {"max_new_tokens": 1}}},
    }
    found = {}
    for name, body in asked.items():
        answer = httpx.post(url, timeout=600, trust_env=False, **body)  # type: ignore[arg-type]
        found[name] = {"status": answer.status_code, "answer": answer.text}
    return found


def _stream(client: Client, tokens: list[int]) -> str:
    """What comes of a request that asks for its tokens one by one."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        "stream": True,
    }
    url = f"{client.url}/generate"
    with httpx.stream("POST", url, json=body, timeout=600, trust_env=False) as answer:
        return "".join(answer.iter_text())


def _refused(checkpoint: Path, folder: Path, serving: Serving) -> dict[str, Any]:
    """What a server says of a checkpoint in a format that it does not know."""
    damaged = folder / "damaged"
    shutil.copytree(checkpoint, damaged)
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format"] = "nonsense"
    (damaged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    log = folder / "refused.log"
    try:
        with served(damaged, serving, log):
            raise AssertionError("a damaged checkpoint was served")
    except RunError as error:
        text = log.read_text(encoding="utf-8", errors="replace").replace(str(damaged), PLACE)
        return {"error": str(error).replace(str(folder), ""), "log": _end_of(text)}


def _end_of(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if "Ignore import error" not in line]
    return lines[-60:]


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
