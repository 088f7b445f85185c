"""Stands where an interpreter with SGLang stands: says over HTTP what a real server said once.

    replay.py -c PROBE                          what of SGLang and a GPU there is
    replay.py -m sglang.launch_server ...       a server on 127.0.0.1

REPLAY_RECORDING names the recording, which record.py made; REPLAY_HOW says what goes wrong:
nothing, or slow, silent, refuses, dies, another, malformed, wrong, nan. A request that was not
recorded is answered with status 599.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDING = json.loads(Path(os.environ["REPLAY_RECORDING"]).read_text(encoding="utf-8"))
HOW = os.environ.get("REPLAY_HOW", "")
SLOW_S = 2.0
# longer than any test
FOREVER_S = 600.0


def key_of(path: str, body: Any) -> str:
    """What makes two requests the same."""
    return json.dumps([path, body], sort_keys=True)


ANSWERS = {key_of(e["path"], e["body"]): e for e in RECORDING["exchanges"]}


class Replay(BaseHTTPRequestHandler):
    """Answers as recorded."""

    checkpoint = ""
    scored = 0

    def do_GET(self) -> None:
        """Answer what has no body."""
        self.reply(None)

    def do_POST(self) -> None:
        """Answer what has one."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("stream"):
            self.send(200, RECORDING["stream"], "text/event-stream")
            return
        if body.get("return_logprob"):
            type(self).scored += 1
            if HOW == "dies" and self.scored == 2:
                print("RuntimeError: CUDA error: device-side assert triggered", flush=True)
                os._exit(9)
        self.reply(body)

    def reply(self, body: Any) -> None:
        """Send what was recorded for this request, spoiled where that is asked for."""
        found = ANSWERS.get(key_of(self.path, body))
        if found is None:
            self.send(599, f"not recorded: {self.path} {json.dumps(body)[:300]}")
            return
        text = found["answer"].replace("CHECKPOINT", self.checkpoint)
        if HOW == "another" and self.path == "/model_info":
            text = text.replace(self.checkpoint, "/another/model")
        if body is not None and HOW == "malformed":
            text = text[: len(text) // 2]
        if body is not None and HOW == "wrong" and body.get("return_logprob"):
            answer = json.loads(text)
            for scored in answer["meta_info"]["input_token_logprobs"][1:]:
                scored[0] -= 0.2
            text = json.dumps(answer)
        if body is not None and HOW == "nan" and body.get("return_logprob"):
            answer = json.loads(text)
            answer["meta_info"]["input_token_logprobs"][3][0] = None
            text = json.dumps(answer)
        self.send(found["status"], text)

    def send(self, status: int, text: str, kind: str = "application/json") -> None:
        """Send an answer."""
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say what was asked for, as the real server does."""
        print(format % args, flush=True)


def serve(arguments: list[str]) -> None:
    """Serve as sglang.launch_server does, its own processes beside it."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    for line in RECORDING["refused" if HOW == "refuses" else "starts"]["log"]:
        print(line, flush=True)
    if HOW == "refuses":
        sys.exit(1)
    # a scheduler: it outlives the server that started it unless somebody ends it
    waiting = f"import time; time.sleep({FOREVER_S})"
    subprocess.Popen([sys.executable, "-c", waiting, "scheduler of", given["--model-path"]])
    if HOW == "silent":
        time.sleep(FOREVER_S)
    time.sleep(SLOW_S if HOW == "slow" else 0)
    Replay.checkpoint = given["--model-path"]
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((given["--host"], int(given["--port"])), Replay).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        print(json.dumps({"sglang": RECORDING["found"]["sglang"], "gpu": "recorded"}))
    else:
        serve(sys.argv[3:])
