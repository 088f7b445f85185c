"""How a published checkpoint is tried on a real SGLang server: nothing here changes its bytes."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator

from configs.fields import Count, Fraction, Section

__all__ = ["Serving"]

# given by the recipe's own keys, or not to be had: what a run starts is its own, and local
_GIVEN = {
    "--model-path": "the checkpoint is what the run published",
    "--model": "the checkpoint is what the run published",
    "--host": "servers of a run listen on 127.0.0.1",
    "--port": "a free port is taken",
    "--tp": "write serving.tensor_parallel",
    "--tp-size": "write serving.tensor_parallel",
    "--tensor-parallel-size": "write serving.tensor_parallel",
    "--trust-remote-code": "no code of a checkpoint is run",
}


def _word(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


class Serving(Section):
    """The server: started with ``python`` and ``server_args``, or running at ``server_url``.

    Where SGLang or a GPU is missing, the run says that nothing was served, and goes on.
    """

    smoke_test: bool = True
    python: str | None = None
    # numbers among them are words too
    server_args: tuple[Annotated[str, BeforeValidator(_word)], ...] = ()
    server_url: str | None = None
    tensor_parallel: Annotated[Count, Field(ge=1)] = 1
    # an export whose sizes no kernel of SGLang takes is refused, unless this says false
    check_kernels: bool = True
    # evaluation windows that lie in the checkpoint, to be scored by its server
    windows: Annotated[Count, Field(ge=0)] = 16
    max_nll_gap: Annotated[Fraction, Field(gt=0)] | None = None
    start_timeout: Annotated[Count, Field(ge=1)] = 900
    request_timeout: Annotated[Count, Field(ge=1)] = 600
    speed: bool = False

    @field_validator("server_args")
    @classmethod
    def _nothing_that_is_given(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            name = argument.partition("=")[0]
            if name in _GIVEN:
                raise ValueError(f"{name} cannot be given: {_GIVEN[name]}; remove it")
        return value

    @field_validator("server_url")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is no address; write http://HOST:PORT")
        return value.rstrip("/")
