"""What is asked of a running SGLang server, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from tasks.engine.errors import RunError

Answer = TypeVar("Answer", bound=BaseModel)


class NotReadyError(RunError):
    """Nothing answers at the address, or not yet."""


class AnswerError(RunError):
    """The server answered, and not with what it was asked for."""


class _ModelInfo(BaseModel):
    model_path: str


class _ServerInfo(BaseModel):
    version: str


class _Meta(BaseModel):
    # [logprob, token, text] of each token of the input; the first one has no logprob
    input_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    completion_tokens: int


class _Generated(BaseModel):
    output_ids: list[int]
    meta_info: _Meta


@dataclass(frozen=True)
class Client:
    """A client of one server.

    Attributes:
        url: http://HOST:PORT.
        timeout_s: how long one request may take; the first ones compile kernels.
    """

    url: str
    timeout_s: float = 600.0

    def model_path(self) -> str:
        """The checkpoint that the server serves, as it names it; answers as soon as it is up."""
        return self._ask("GET", "/model_info", _ModelInfo, timeout_s=10.0).model_path

    def forget(self) -> None:
        """Let the server forget the prompts it knows, so that it computes them anew."""
        with contextlib.suppress(httpx.TransportError), self._http() as http:
            http.post(f"{self.url}/flush_cache")

    def version(self) -> str:
        """The server's version of SGLang."""
        return self._ask("GET", "/server_info", _ServerInfo).version

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` likeliest next tokens, one after the other."""
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        found = self._generate(tokens, sampling).output_ids
        if len(found) != count:
            raise AnswerError(f"{self.url}: asked for {count} tokens, {len(found)} came")
        return found

    def token_nll(self, tokens: Sequence[int]) -> list[float]:
        """The negative log-likelihood of each token but the first, nats."""
        answer = self._generate(
            tokens,
            {"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        scored = answer.meta_info.input_token_logprobs or []
        # SGLang says 0 where the last token of the vocabulary stands, and scores the right one
        others = [
            place
            for place, (asked, scored_one) in enumerate(zip(tokens, scored, strict=False))
            if scored_one[1] not in (asked, 0)
        ]
        if len(scored) != len(tokens) or others:
            raise AnswerError(
                f"{self.url}: asked for the log-probabilities of {len(tokens)} tokens, those of "
                f"{len(scored)} came, {len(others)} of them of other tokens"
            )
        found = [logprob for logprob, _, _ in scored[1:] if logprob is not None]
        if len(found) != len(tokens) - 1:
            raise AnswerError(
                f"{self.url}: {len(tokens) - 1 - len(found)} log-probabilities are not numbers; "
                "the model gives NaN"
            )
        return [-logprob for logprob in found]

    def _generate(self, tokens: Sequence[int], sampling: dict[str, Any], **more: Any) -> _Generated:
        body = {"input_ids": list(tokens), "sampling_params": sampling, **more}
        return self._ask("POST", "/generate", _Generated, body)

    def _http(self, timeout_s: float | None = None) -> httpx.Client:
        # no proxy stands between this machine and itself
        return httpx.Client(timeout=timeout_s or self.timeout_s, trust_env=False)

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[Answer],
        body: dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        place = f"{self.url}{path}"
        try:
            with self._http(timeout_s) as http:
                answer = http.request(method, place, json=body)
        except httpx.TimeoutException as error:
            raise NotReadyError(
                f"{place}: no answer within {timeout_s or self.timeout_s:g} s "
                "(serving.request_timeout)"
            ) from error
        except httpx.TransportError as error:
            raise NotReadyError(f"{place}: no answer ({type(error).__name__})") from error
        if answer.is_server_error:
            # not ready yet, or about to die
            raise NotReadyError(f"{place}: status {answer.status_code}: {_short(answer.text)}")
        if not answer.is_success:
            raise AnswerError(f"{place}: status {answer.status_code}: {_short(answer.text)}")
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise AnswerError(
                f"{place}: answers what is not SGLang's: {_short(answer.text)}"
            ) from error


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
