"""What a checkpoint must hold to become the champion: limits decide, they change no work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator

from configs.fields import Fraction, Section

__all__ = ["AgainstChampion", "Gate", "QualityLimits", "usual_limits"]

_Nats = Annotated[Fraction, Field(ge=0)]
_Share = Annotated[Fraction, Field(ge=0, le=1)]


class AgainstChampion(Section):
    """By how much each figure may be worse than the present champion's.

    KL says most of a small loss, so by default it may be no worse at all; the others move a little
    with the text that was calibrated on.
    """

    nll_increase: _Nats = 0.002
    kl: _Nats = 0.0
    top1_agreement: _Share = 0.005
    server_nll: _Nats = 0.005
    # figures of another evaluation, or of other windows of it, say nothing of each other
    same_evaluation: bool = True


class Gate(Section):
    """Limits of ``champion``, and the registered model that it belongs to.

    A limit that is not given is the scheme's usual one.
    """

    # false: no version is registered, so none is champion
    registry: bool = True
    # by default the source's name and the scheme
    model_name: str | None = None
    max_nll_increase: _Nats | None = None
    max_kl: _Nats | None = None
    min_top1_agreement: _Share | None = None
    # between the server's NLL and the measured one; by default what the smoke test allows
    max_server_nll_gap: _Nats | None = None
    require_served: bool = False
    against_champion: AgainstChampion = Field(default_factory=AgainstChampion)

    @field_validator("model_name")
    @classmethod
    def _a_name_that_mlflow_takes(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or set(value) & set("/:")):
            raise ValueError(
                f"{value!r} is no name of a registered model: give one without / and :"
            )
        return value


@dataclass(frozen=True)
class QualityLimits:
    """Largest NLL increase and KL (nats), smallest share of tokens found likeliest by both."""

    nll_increase: float
    kl: float
    top1_agreement: float


def usual_limits(bits: int, float_codes: bool) -> QualityLimits:
    """What a quantization of its kind should hold, about twice what the shipped recipes lose.

    Args:
        bits: of a weight's code, 4 at least.
        float_codes: e4m3 and the like, which lose more than 8 bit integers.
    """
    if float_codes:
        return QualityLimits(0.02, 0.02, 0.9)
    if bits >= 8:
        return QualityLimits(0.01, 0.01, 0.93)
    return QualityLimits(0.1, 0.1, 0.75)
