"""How speed is measured, on a server on loopback whose delays are known."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from tasks.engine.errors import RunError
from tasks.engine.serving.client import AnswerError
from tasks.engine.serving.speed import ALONE, AT_ONCE, ROUNDS, measure_speed, prompts_of

FIRST_S, EACH_S = 0.05, 0.01
REQUESTS = ALONE + AT_ONCE * (ROUNDS + 1)


@pytest.fixture
def streaming(recording):
    """The recorded stream's parts, each after a while."""
    parts = [part for part in recording["stream"].split("\n\n") if part]
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            time.sleep(FIRST_S)
            for part in parts:
                self.wfile.write(f"{part}\n\n".encode())
                self.wfile.flush()
                time.sleep(EACH_S)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.request_queue_size = 128
    server.server_bind()
    server.server_activate()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_recorded_stream_with_known_delays(streaming, recording):
    url, asked = streaming
    prompts = [[number, 1, 2] for number in range(REQUESTS)]
    # the recorded answer has four tokens
    assert recording["stream"].count("data: {") == 4
    speed = measure_speed(url, prompts, 10.0, new_tokens=4)
    assert 1e3 * FIRST_S <= speed.first_token_ms < 3e3 * FIRST_S
    assert 0.3 / EACH_S < speed.tokens_per_s <= 1.05 / EACH_S
    assert speed.loaded_first_token_ms >= 1e3 * FIRST_S
    # sixteen at once are faster than one after the other, and no faster than their delays
    alone = 4 / (FIRST_S + 3 * EACH_S)
    assert 2 * alone < speed.loaded_tokens_per_s <= 1.05 * AT_ONCE * alone
    assert (speed.at_once, speed.prompt_tokens, speed.new_tokens) == (AT_ONCE, 3, 4)
    assert sorted(body["input_ids"][0] for body in asked) == list(range(REQUESTS))
    assert all(body["stream"] and body["sampling_params"]["ignore_eos"] for body in asked)


def test_fewer_tokens_than_asked_for(streaming):
    url, _ = streaming
    prompts = [[number] for number in range(REQUESTS)]
    with pytest.raises(AnswerError, match="asked for 5 tokens in parts, 4 came in 4 parts"):
        measure_speed(url, prompts, 10.0, new_tokens=5)


@pytest.mark.parametrize(
    ("windows", "length", "wanted"), [(8, 1030, 128), (16, 504, 126), (2, 48, 1), (56, 9, 9)]
)
def test_prompts_do_not_overlap(windows, length, wanted):
    tokens = torch.arange(windows * length).reshape(windows, length)
    prompts = prompts_of(tokens)
    assert len(prompts) == REQUESTS and {len(prompt) for prompt in prompts} == {wanted}
    assert len({token for prompt in prompts for token in prompt}) == REQUESTS * wanted


def test_too_few_tokens_for_prompts():
    said = f"{REQUESTS} prompts cannot be cut from the checkpoint's 40 tokens"
    with pytest.raises(RunError, match=said):
        prompts_of(torch.zeros(1, 40, dtype=torch.int64))
