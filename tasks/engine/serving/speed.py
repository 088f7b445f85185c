"""How fast a running server answers: time to first token and tokens per second.

One request at a time shows latency, many at once throughput. Prompts are all different, and the
server forgets before what it knows of any, so each is computed. A first round, which is not
counted, compiles kernels.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from torch import Tensor

from tasks.engine.errors import RunError
from tasks.engine.serving.client import AnswerError, NotReadyError

ALONE = 8
AT_ONCE = 16
ROUNDS = 2
PROMPT_TOKENS = 128
NEW_TOKENS = 128


@dataclass(frozen=True)
class Answered:
    """One request: seconds to its first token and to its last, and how many came."""

    first_s: float
    all_s: float
    tokens: int


@dataclass(frozen=True)
class Speed:
    """Medians over requests, and throughput over all.

    Attributes:
        first_token_ms: time to first token of one request alone.
        tokens_per_s: tokens after the first, of one request alone.
        loaded_first_token_ms: time to first token with ``at_once`` requests at once.
        loaded_tokens_per_s: all new tokens over the time from first to last request.
        at_once: requests at once.
        prompt_tokens: of each request.
        new_tokens: of each request.
    """

    first_token_ms: float
    tokens_per_s: float
    loaded_first_token_ms: float
    loaded_tokens_per_s: float
    at_once: int
    prompt_tokens: int
    new_tokens: int

    def figures(self) -> dict[str, float]:
        """The values by their names."""
        return asdict(self)


def prompts_of(windows: Tensor) -> list[list[int]]:
    """Cut windows (W, L) into prompts that do not overlap, PROMPT_TOKENS long or as long as can be.

    Raises:
        RunError: too few tokens for all requests.
    """
    wanted = ALONE + AT_ONCE * (ROUNDS + 1)
    each = -(-wanted // len(windows))
    length = min(PROMPT_TOKENS, windows.shape[1] // each)
    if length < 1:
        raise RunError(
            f"speed: {wanted} prompts cannot be cut from the checkpoint's {windows.numel()} tokens "
            "of evaluation text; evaluate on more, and publish more serving.windows"
        )
    parts = [part for row in windows for part in row.split(length) if len(part) == length]
    return [part.tolist() for part in parts[:wanted]]


def measure_speed(
    url: str, prompts: Sequence[Sequence[int]], timeout_s: float, new_tokens: int = NEW_TOKENS
) -> Speed:
    """Time a server on prompts of one length.

    Args:
        url: the server's address.
        prompts: ALONE + AT_ONCE * (ROUNDS + 1) different ones.
        timeout_s: for one request.
        new_tokens: tokens that each request asks for.
    """
    return asyncio.run(_measure(url, prompts, timeout_s, new_tokens))


async def _measure(
    url: str, prompts: Sequence[Sequence[int]], timeout_s: float, new_tokens: int
) -> Speed:
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False) as http:

        async def ask(prompt: Sequence[int]) -> Answered:
            return await _ask(http, url, prompt, new_tokens)

        await asyncio.gather(*map(ask, prompts[:AT_ONCE]))
        alone = [await ask(prompt) for prompt in prompts[AT_ONCE : AT_ONCE + ALONE]]
        loaded, seconds = [], 0.0
        for start in range(AT_ONCE + ALONE, len(prompts), AT_ONCE):
            began = time.perf_counter()
            loaded += await asyncio.gather(*map(ask, prompts[start : start + AT_ONCE]))
            seconds += time.perf_counter() - began
    return Speed(
        1e3 * statistics.median(one.first_s for one in alone),
        statistics.median((one.tokens - 1) / (one.all_s - one.first_s) for one in alone),
        1e3 * statistics.median(one.first_s for one in loaded),
        sum(one.tokens for one in loaded) / seconds,
        AT_ONCE,
        len(prompts[0]),
        new_tokens,
    )


async def _ask(
    http: httpx.AsyncClient, url: str, prompt: Sequence[int], new_tokens: int
) -> Answered:
    body: dict[str, Any] = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "stream": True,
    }
    began, times, last = time.perf_counter(), [], ""
    try:
        async with http.stream("POST", f"{url}/generate", json=body) as answer:
            if not answer.is_success:
                raise AnswerError(f"{url}/generate: status {answer.status_code}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - began)
                    last = line.removeprefix("data: ")
    except httpx.TransportError as error:
        raise NotReadyError(f"{url}/generate: no answer ({type(error).__name__})") from error
    if len(times) < 2 or _tokens_in(last) != new_tokens:
        raise AnswerError(
            f"{url}/generate: asked for {new_tokens} tokens in parts, {_tokens_in(last)} came in "
            f"{len(times)} parts"
        )
    return Answered(times[0], times[-1], new_tokens)


def _tokens_in(part: str) -> int:
    """How many tokens came so far, as a part of a stream says; 0 where it says none."""
    try:
        return int(json.loads(part)["meta_info"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return 0
