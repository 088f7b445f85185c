"""The keys under ``quant.special``: one section per method, after LLMC's vocabulary."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from configs.fields import Count, Fraction, NoEffect, NotHashed, Section, choice
from configs.vocabulary import ClipVersion, Importance, Method, RotateMode, TransVersion

__all__ = [
    "SPECIAL_KEYS",
    "AwqSpecial",
    "GptqSpecial",
    "NoSpecial",
    "OmniQuantSpecial",
    "OsPlusSpecial",
    "QuarotSpecial",
    "SmoothQuantSpecial",
    "Special",
]

_STORED = NoEffect("every step's decision is kept in the store and passed on from there")
_ALWAYS_BATCHED = NoEffect("the search needs the Gram matrix only, never a batch of inputs")
_ONE_CLIP = NoEffect("a clip is always the range that a scale comes from")
_FLOAT64 = NoEffect("rotations are always computed in float64")
_REFUSED_ELSE_OFF = NotHashed("true is refused, so it is always off")


def _no_owq(value: bool) -> bool:
    if value:
        raise ValueError(
            "true is not offered: OWQ keeps some columns in 16 bits, which no format that "
            "SGLang loads can hold; write false"
        )
    return value


def _no_online_rotation(value: bool) -> bool:
    if value:
        raise ValueError(
            "true is not offered: the server would have to rotate activations while it runs, "
            "and SGLang has no kernel for it; write false"
        )
    return value


Owq = Annotated[bool, AfterValidator(_no_owq), _REFUSED_ELSE_OFF]
OnlineRotate = Annotated[bool, AfterValidator(_no_online_rotation), _REFUSED_ELSE_OFF]
Alpha = Annotated[Fraction, Field(ge=0, le=1)]
ClipSteps = Annotated[Count, Field(ge=1, le=256)]
ClipShrink = Annotated[Fraction, Field(gt=0, le=1)]
LearningRate = Annotated[Fraction, Field(gt=0)]


class NoSpecial(Section):
    """RTN and Identity take no special keys."""


class AwqSpecial(Section):
    """AWQ (arXiv 2306.00978): the scale search and the clip search.

    Not in LLMC: trans_version best, importance, ratios, refine, clip_query_key, clip_steps and
    clip_shrink; their defaults are LLMC's fixed choices.
    """

    trans: bool = True
    trans_version: Annotated[TransVersion, choice(TransVersion)] = TransVersion.V2
    importance: Annotated[Importance, choice(Importance)] = Importance.MEAN_ABS
    ratios: Annotated[Count, Field(ge=1, le=1000)] = 20
    refine: bool = False
    do_gqa_trans: bool = True
    weight_clip: bool = True
    clip_query_key: bool = False
    clip_steps: ClipSteps = 10
    clip_shrink: ClipShrink = 0.5
    clip_version: Annotated[ClipVersion, choice(ClipVersion), _ONE_CLIP] = ClipVersion.V1
    clip_sym: Annotated[bool | None, NoEffect("a factor moves both ends of a range")] = None
    awq_bs: Annotated[Count | None, _ALWAYS_BATCHED] = None
    save_mem: Annotated[bool, NoEffect("one block at a time is on the device in any case")] = False
    save_scale: Annotated[bool, _STORED] = False
    scale_path: Annotated[str | None, _STORED] = None
    save_clip: Annotated[bool, _STORED] = False
    clip_path: Annotated[str | None, _STORED] = None


class GptqSpecial(Section):
    """GPTQ (arXiv 2210.17323): rounding with error feedback.

    Not in LLMC: weight_clip, which searches the ranges that scales come from first, with its
    clip_query_key, clip_steps and clip_shrink; refit_scales, how often scales are refitted to
    the codes and these found anew; descend, how often all codes are rounded once more, each with
    all others as they are (QuantEase, arXiv 2309.01885); make_up, the share of the errors of what
    was rounded before that weights are moved to make up for (GPTAQ, arXiv 2504.02692).
    """

    actorder: bool = True
    static_groups: bool = True
    percdamp: Annotated[Fraction, Field(gt=0)] = 0.01
    blocksize: Annotated[Count, Field(ge=1)] = 128
    true_sequential: bool = True
    weight_clip: bool = False
    clip_query_key: bool = True
    clip_steps: ClipSteps = 10
    clip_shrink: ClipShrink = 0.5
    refit_scales: Annotated[Count, Field(ge=0, le=16)] = 0
    descend: Annotated[Count, Field(ge=0, le=64)] = 0
    make_up: Annotated[Fraction, Field(ge=0, le=1)] = 0.0
    chunk_num: Annotated[Count | None, NoEffect("statistics are summed in fixed chunks")] = None
    owq: Owq = False
    online_rotate: OnlineRotate = False
    fp32_had: Annotated[bool, _FLOAT64] = False

    @model_validator(mode="after")
    def _clipped_scales_are_found_before(self) -> Self:
        if self.weight_clip and not self.static_groups:
            raise ValueError(
                "weight_clip searches the scales before the first column is rounded: write "
                "static_groups: true, or weight_clip: false"
            )
        return self


class OmniQuantSpecial(Section):
    """OmniQuant (arXiv 2308.13137): learned clipping and learned channel scales.

    search_clip_init starts from a clip search of the step's own; search_scale_init starts let from
    AWQ's scales, else from SmoothQuant's with alpha.
    """

    aug_loss: bool = False
    lwc: bool = True
    let: bool = False
    lwc_lr: LearningRate = 0.01
    let_lr: LearningRate = 0.005
    use_shift: bool = False
    alpha: Alpha = 0.5
    deactive_amp: Annotated[bool, NoEffect("learned steps never use autocast")] = True
    epochs: Annotated[Count, Field(ge=1)] = 5
    wd: Annotated[Fraction, Field(ge=0)] = 0.0
    search_clip_init: bool = False
    load_clip: Annotated[bool, _STORED] = False
    clip_path: Annotated[str | None, _STORED] = None
    search_scale_init: bool = False
    scale_path: Annotated[str | None, _STORED] = None

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not self.lwc and not self.let:
            raise ValueError("lwc and let are both false: nothing is learned; write lwc: true")
        return self


class QuarotSpecial(Section):
    """QuaRot (arXiv 2404.00456), the offline part."""

    rotate_mode: Annotated[RotateMode, choice(RotateMode)] = RotateMode.HADAMARD
    fp32_had: Annotated[bool, _FLOAT64] = False
    online_rotate: OnlineRotate = False


class SmoothQuantSpecial(Section):
    """SmoothQuant (arXiv 2211.10438)."""

    alpha: Alpha = 0.5


class OsPlusSpecial(Section):
    """Outlier Suppression+ (arXiv 2304.09145)."""

    alpha: Annotated[Alpha, NoEffect("the threshold is searched")] = 0.5
    # Not in the seed document, but in the file that LLMC ships for this method.
    true_sequential: Annotated[bool, NoEffect("statistics are collected once per block")] = True


# what only tasks.clip reads of AWQ's and GPTQ's keys
CLIP_KEYS = ("weight_clip", "clip_query_key", "clip_steps", "clip_shrink")

Special = (
    NoSpecial
    | AwqSpecial
    | GptqSpecial
    | OmniQuantSpecial
    | QuarotSpecial
    | SmoothQuantSpecial
    | OsPlusSpecial
)

SPECIAL_KEYS: dict[Method, type[Special]] = {
    Method.RTN: NoSpecial,
    Method.IDENTITY: NoSpecial,
    Method.AWQ: AwqSpecial,
    Method.GPTQ: GptqSpecial,
    Method.OMNIQUANT: OmniQuantSpecial,
    Method.QUAROT: QuarotSpecial,
    Method.SMOOTHQUANT: SmoothQuantSpecial,
    Method.OSPLUS: OsPlusSpecial,
}
