"""How a published checkpoint is tried on a real SGLang server: nothing here changes its bytes."""

from __future__ import annotations

from typing import Annotated

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
    "--api-key": "a server of a run is asked by that run only",
    "--admin-api-key": "a server of a run is asked by that run only",
    "--config": "write its arguments here",
}


def _word(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


class Serving(Section):
    """The server that is started, with ``python`` and ``server_args``.

    Where SGLang or a GPU is missing, the run says that nothing was served, and goes on.
    """

    smoke_test: bool = True
    python: str | None = None
    # numbers among them are words too
    server_args: tuple[Annotated[str, BeforeValidator(_word)], ...] = ()
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
            # SGLang takes names that are cut short for the whole ones
            whole = [given for given in _GIVEN if len(name) > 2 and given.startswith(name)]
            if whole:
                raise ValueError(f"{name} cannot be given: {_GIVEN[whole[0]]}; remove it")
        return value
