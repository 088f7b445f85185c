"""What is asked of a server and what it may answer; the answers are recorded, some spoiled."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tasks.engine.serving.client import AnswerError, Client, NotReadyError
from tasks.engine.serving.server import free_port


class Answering:
    """A server on loopback that gives one answer to everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.text = 200, ""
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(
                    json.loads(self.rfile.read(int(self.headers["content-length"])) or "null")
                )

            def answer(self, body: Any) -> None:
                outer.asked.append((self.path, body))
                data = outer.text.encode()
                self.send_response(outer.status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.client = Client(f"http://127.0.0.1:{self.server.server_address[1]}", 5.0)


@pytest.fixture
def answering() -> Iterator[Answering]:
    """A server whose answer the test sets."""
    found = Answering()
    thread = Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture
def scored(recording: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Tokens, and the recorded answer to a request for their log-probabilities."""
    exchange = next(e for e in recording["exchanges"] if (e["body"] or {}).get("return_logprob"))
    return exchange["body"]["input_ids"], json.loads(exchange["answer"])


def test_recorded_log_probabilities(answering, scored):
    tokens, answer = scored
    answering.text = json.dumps(answer)
    entries = answer["meta_info"]["input_token_logprobs"]
    # the first token is predicted from nothing
    assert entries[0][0] is None and len(entries) == len(tokens)
    assert answering.client.token_nll(tokens) == [-entry[0] for entry in entries[1:]]
    path, body = answering.asked[0]
    assert path == "/generate"
    assert body["return_logprob"] is True and body["logprob_start_len"] == 0
    assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 1}


def test_the_last_token_of_the_vocabulary_is_said_as_zero(answering, scored):
    tokens, answer = scored
    answer["meta_info"]["input_token_logprobs"][5][1] = 0
    answering.text = json.dumps(answer)
    assert len(answering.client.token_nll(tokens)) == len(tokens) - 1


def test_log_probabilities_of_other_tokens(answering, scored):
    tokens, answer = scored
    answer["meta_info"]["input_token_logprobs"][5][1] += 1
    answering.text = json.dumps(answer)
    with pytest.raises(AnswerError, match=f"{len(tokens)} came, 1 of them of other tokens"):
        answering.client.token_nll(tokens)
    del answer["meta_info"]["input_token_logprobs"][5:]
    answering.text = json.dumps(answer)
    with pytest.raises(AnswerError, match="those of 5 came, 0 of them of other tokens"):
        answering.client.token_nll(tokens)
    del answer["meta_info"]["input_token_logprobs"]
    answering.text = json.dumps(answer)
    with pytest.raises(AnswerError, match="those of 0 came"):
        answering.client.token_nll(tokens)


def test_a_log_probability_that_is_no_number(answering, scored):
    tokens, answer = scored
    # SGLang writes NaN as null
    answer["meta_info"]["input_token_logprobs"][5][0] = None
    answering.text = json.dumps(answer)
    with pytest.raises(AnswerError, match="1 log-probabilities are not numbers; the model gives"):
        answering.client.token_nll(tokens)


def test_recorded_greedy_tokens(answering, recording):
    exchange = next(
        e for e in recording["exchanges"] if e["body"] and "return_logprob" not in e["body"]
    )
    answering.text = exchange["answer"]
    count = exchange["body"]["sampling_params"]["max_new_tokens"]
    found = answering.client.greedy(exchange["body"]["input_ids"], count)
    assert found == json.loads(exchange["answer"])["output_ids"] and len(found) == count
    assert answering.asked[0] == ("/generate", exchange["body"])
    with pytest.raises(AnswerError, match=f"asked for 5 tokens, {count} came"):
        answering.client.greedy([1, 2], 5)


def test_recorded_refusals(answering, recording):
    said = {
        "too long": "status 400: .*is longer than the model's context length",
        "no input": "status 400: .*should be provided",
        "malformed": "status 400: .*JSON decode error",
    }
    assert set(said) == set(recording["odd"])
    for name, odd in recording["odd"].items():
        answering.status, answering.text = odd["status"], odd["answer"]
        with pytest.raises(AnswerError, match=said[name]) as raised:
            answering.client.token_nll([1, 2, 3])
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", '{"text": "half', "[]", "<html>", '{"output_ids": "x"}'])
def test_answers_that_are_not_sglangs(answering, text):
    answering.text = text
    for ask in (
        answering.client.model_path,
        answering.client.version,
        lambda: answering.client.greedy([1], 1),
    ):
        with pytest.raises(AnswerError, match="answers what is not SGLang's"):
            ask()


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_is_not_ready_or_about_to_die(answering, status):
    answering.status, answering.text = status, "why"
    with pytest.raises(NotReadyError, match=f"status {status}: why"):
        answering.client.model_path()


def test_a_server_that_takes_too_long():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
        said = r"/server_info: no answer within 0\.2 s \(serving\.request_timeout\)"
        with pytest.raises(NotReadyError, match=said):
            client.version()


def test_a_server_is_told_to_forget(answering):
    answering.text = "{}"
    before = len(answering.asked)
    answering.client.forget()
    assert [path for path, _ in answering.asked[before:]] == ["/flush_cache"]
    # one that does not know the word, or is gone, is no reason to stop
    answering.status = 404
    answering.client.forget()
    Client(f"http://127.0.0.1:{free_port()}").forget()


def test_nothing_at_the_address():
    with pytest.raises(NotReadyError, match=r"no answer \(ConnectError\)"):
        Client(f"http://127.0.0.1:{free_port()}").model_path()


def test_proxies_are_not_asked(answering, recording, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    answering.text = next(
        e["answer"] for e in recording["exchanges"] if e["path"] == "/server_info"
    )
    assert answering.client.version() == recording["found"]["sglang"]
