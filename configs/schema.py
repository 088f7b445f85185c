"""The recipe: LLMC's vocabulary as one frozen model per section, checked as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.data_schema import Calibration, Evaluation
from configs.fields import (
    Bits,
    Count,
    Fraction,
    Layers,
    NoEffect,
    NotHashed,
    Section,
    Seed,
    choice,
    effective,
)
from configs.gate_schema import Gate
from configs.methods import (
    finds_scales_on_the_way,
    has_clip,
    has_learned_clip,
    has_learned_transform,
    has_transform,
    needs_calibration,
)
from configs.serving_schema import Serving
from configs.special_keys import SPECIAL_KEYS, GptqSpecial, NoSpecial, Special
from configs.vocabulary import (
    METHODS_WITHOUT_CALIBRATION,
    ActAlgorithm,
    ActGranularity,
    FloatFormat,
    Method,
    QuantType,
    TorchDtype,
    WeightAlgorithm,
    WeightGranularity,
)

__all__ = [
    "Act",
    "Base",
    "Calibration",
    "Evaluation",
    "Gate",
    "Model",
    "Quant",
    "Recipe",
    "ResolvedStep",
    "Save",
    "Serving",
    "Step",
    "Weight",
]

Data = TypeVar("Data", Calibration, Evaluation)

_FOLLOWS = NotHashed("follows from bit")
_QTORCH = NoEffect("torch has native float8")
_STE = NoEffect("rounding is straight-through wherever a method learns")
_QMAX = NoEffect("it never had one in LLMC either")


class Base(Section):
    """What every step falls back to."""

    seed: Seed = 42


class Model(Section):
    """The source checkpoint; ``--model`` gives the path where a recipe does not."""

    type: Annotated[str | None, NoEffect("the checkpoint's config.json names it")] = None
    path: Annotated[str | None, NotHashed("weights are known by their digest")] = None
    tokenizer_mode: Annotated[str | None, NoEffect("it never had one in LLMC either")] = None
    torch_dtype: Annotated[TorchDtype, choice(TorchDtype)] = TorchDtype.AUTO


class _Numbers(Section):
    """What weights and activations share: the number format of their codes."""

    bit: Bits = Field(description="a number of bits (2..8), e4m3 or e5m2")
    symmetric: bool = True
    quant_type: Annotated[QuantType | None, choice(QuantType), _FOLLOWS] = None
    use_qtorch: Annotated[bool | None, _QTORCH] = None
    ste: Annotated[bool | None, _STE] = None
    qmax_to_tensor: Annotated[bool | None, _QMAX] = None

    @property
    def is_float(self) -> bool:
        """Whether codes are float8."""
        return isinstance(self.bit, FloatFormat)

    @model_validator(mode="after")
    def _floats_have_no_zero_point(self) -> Self:
        if self.is_float and not self.symmetric:
            raise ValueError(f"{self.bit} has no zero point: write symmetric: true")
        return self


class Weight(_Numbers):
    """How the weights of a linear are stored. group_size -1 reads as per_channel."""

    granularity: Annotated[WeightGranularity, choice(WeightGranularity)] = Field(
        description="per_channel, per_group, per_block or per_tensor"
    )
    group_size: Annotated[Count, Field(ge=1)] | None = None
    block_size: Annotated[Count, Field(ge=1)] | None = Field(
        default_factory=lambda data: (
            128 if data.get("granularity") is WeightGranularity.PER_BLOCK else None
        )
    )
    need_pack: bool = False
    # Where a method searches or learns a linear's ranges, those are taken.
    calib_algo: Annotated[WeightAlgorithm, choice(WeightAlgorithm)] = WeightAlgorithm.MINMAX

    @model_validator(mode="before")
    @classmethod
    def _row_as_group(cls, data: Any) -> Any:
        return _whole_row(data, WeightGranularity.PER_CHANNEL)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Weight:
        _check_group_size(self.granularity, self.group_size)
        if self.block_size is not None and self.granularity is not WeightGranularity.PER_BLOCK:
            raise ValueError(
                f"block_size means nothing with granularity {self.granularity}: "
                "remove it, or write granularity: per_block"
            )
        return self


class Act(_Numbers):
    """How the inputs of a linear are quantized while the model runs.

    per_group is what SGLang's kernels for FP8 blocks do, and LLMC's word for it: each token in
    groups of group_size neighbours.
    """

    granularity: Annotated[ActGranularity, choice(ActGranularity)] = Field(
        description="per_token, per_tensor or per_group"
    )
    group_size: Annotated[Count, Field(ge=1)] | None = None
    static: bool = False
    # What a static scale covers; dynamic scales cover what is at hand.
    calib_algo: Annotated[ActAlgorithm | None, choice(ActAlgorithm)] = None
    percentile: Annotated[Fraction, Field(gt=0, le=100)] = 99.99

    @model_validator(mode="before")
    @classmethod
    def _token_as_group(cls, data: Any) -> Any:
        return _whole_row(data, ActGranularity.PER_TOKEN)

    @model_validator(mode="after")
    def _sizes_and_times_fit(self) -> Act:
        _check_group_size(self.granularity, self.group_size)
        if self.static and self.granularity is not ActGranularity.PER_TENSOR:
            raise ValueError(
                f"static needs granularity per_tensor, not {self.granularity}: a token's range "
                "is known only while the model runs; write static: false"
            )
        return self


def _whole_row(data: Any, granularity: StrEnum) -> Any:
    """Read LLMC's group_size -1, a group that is a whole row, as the granularity it means."""
    if not isinstance(data, dict) or str(data.get("group_size")) != "-1":
        return data
    kept = {key: value for key, value in data.items() if key != "group_size"}
    given = str(kept.get("granularity")).replace("-", "_").casefold()
    return kept | {"granularity": granularity.value} if given == "per_group" else kept


def _check_group_size(granularity: str, group_size: int | None) -> None:
    if granularity == "per_group" and group_size is None:
        raise ValueError("granularity per_group needs a group_size; write group_size: 128")
    if granularity != "per_group" and group_size is not None:
        raise ValueError(
            f"group_size means nothing with granularity {granularity}: "
            "remove it, or write granularity: per_group"
        )


class Quant(Section):
    """One quantization: the method, the number formats, and the method's own keys."""

    method: Annotated[Method, choice(Method, "method")] = Field(
        description=f"one of {', '.join(Method)}"
    )
    quant_type: Annotated[QuantType | None, choice(QuantType), _FOLLOWS] = None
    weight: Weight = Field(description="bit, symmetric, granularity, group_size, need_pack")
    act: Act | None = None
    special: Special = Field(default_factory=lambda data: _special_of(data)())
    quant_out: bool = False

    @field_validator("special", mode="before")
    @classmethod
    def _keys_of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        # Errors found here are reported under special, each with its own key.
        return _special_of(info.data).model_validate(value) if "method" in info.data else {}

    @model_validator(mode="after")
    def _searched_ranges_are_used(self) -> Quant:
        if finds_scales_on_the_way(self) and self.weight.calib_algo is WeightAlgorithm.MSE:
            raise ValueError(
                "weight.calib_algo mse searches ranges before the first column is rounded: write "
                "special.static_groups: true, or calib_algo: minmax"
            )
        return self

    @model_validator(mode="after")
    def _refitted_scales_are_of_rows(self) -> Quant:
        shared = self.weight.granularity in (
            WeightGranularity.PER_TENSOR,
            WeightGranularity.PER_BLOCK,
        )
        if shared and isinstance(self.special, GptqSpecial) and self.special.refit_scales:
            raise ValueError(
                f"special.refit_scales: scales {self.weight.granularity} are not refitted, as rows "
                "share them: write 0, or weight.granularity: per_channel"
            )
        return self

    @model_validator(mode="after")
    def _number_formats_agree(self) -> Quant:
        for name, section in (("weight", self.weight), ("act", self.act)):
            declared = section.quant_type or self.quant_type if section is not None else None
            if section is None or declared is None:
                continue
            actual = QuantType.FLOAT if section.is_float else QuantType.INT
            if declared is not actual:
                where = f"{name}.quant_type" if section.quant_type else "quant_type"
                raise ValueError(
                    f"{where} {declared} contradicts {name}.bit {section.bit}: "
                    f"remove it, or write {name}.quant_type: {actual}"
                )
        return self


def _special_of(data: dict[str, Any]) -> type[Special]:
    return SPECIAL_KEYS[data["method"]] if "method" in data else NoSpecial


class Step(Section):
    """One of several quantizations that a combination applies in order."""

    name: Annotated[str | None, NotHashed("a label")] = None
    quant: Quant = Field(description="method, weight and act")
    calib: Calibration | None = None


class Save(Section):
    """What is published; whatever is made is measured all the same.

    save_sgl: the quantized checkpoint. save_trans: the model before rounding, as the steps left it,
    in the folder transformed_model; with it alone nothing is rounded for an export.
    """

    save_trans: bool = False
    save_sgl: bool = Field(default_factory=lambda data: not data.get("save_trans"))
    save_fake: Annotated[bool, NoEffect("evaluation reads the export itself")] = False
    save_path: str | None = None


@dataclass(frozen=True)
class ResolvedStep:
    """A step with its calibration: None if the step reads none, else with its seed filled in."""

    quant: Quant
    calib: Calibration | None


class Recipe(Section):
    """A whole recipe: one quantization (quant), or several in order (steps)."""

    base: Base = Field(default_factory=Base)
    model: Model = Field(default_factory=Model)
    calib: Calibration | None = None
    eval: Evaluation | None = None
    quant: Quant | None = None
    steps: tuple[Step, ...] | None = None
    save: Save = Field(default_factory=Save)
    serving: Serving = Field(default_factory=Serving)
    gate: Gate = Field(default_factory=Gate)
    ignored_layers: Layers = ()

    def resolved_steps(self) -> tuple[ResolvedStep, ...]:
        """Return the steps in order, each with the calibration that it reads."""
        return tuple(
            ResolvedStep(quant, _seeded(calib, self.base.seed))
            if calib is not None and needs_calibration(quant)
            else ResolvedStep(quant, None)
            for quant, calib in self._written_steps()
        )

    @property
    def calibrated(self) -> bool:
        """Whether a step reads calibration windows."""
        return any(step.calib is not None for step in self.resolved_steps())

    @property
    def rotated(self) -> bool:
        """Whether a step rotates the residual stream, and so what is outside of the blocks."""
        return any(step.quant.method is Method.QUAROT for step in self.resolved_steps())

    def resolved_eval(self) -> Evaluation:
        """Return the evaluation with its seed filled in: base.seed + 1 unless given."""
        evaluation = self.eval or Evaluation()
        return _seeded(evaluation, self.base.seed + 1)

    def canonical(self) -> dict[str, Any]:
        """Return, as JSON types, what the result depends on besides the source model.

        Defaults are filled in. Keys without effect, places (model.path, save), serving, the gate
        and labels are left out, and one ``quant`` reads the same as one of ``steps``.
        """
        return {
            "base": effective(self.base),
            "model": effective(self.model),
            "steps": [_canonical_step(step) for step in self.resolved_steps()],
            "eval": effective(self.resolved_eval()),
            "ignored_layers": list(self.ignored_layers),
        }

    def _written_steps(self) -> tuple[tuple[Quant, Calibration | None], ...]:
        if self.quant is not None:
            return ((self.quant, self.calib),)
        return tuple(
            (step.quant, step.calib.placed(f"steps.{n}.calib") if step.calib else self.calib)
            for n, step in enumerate(self.steps or ())
        )

    @model_validator(mode="after")
    def _one_way_to_quantize(self) -> Recipe:
        if self.quant is not None and self.steps is not None:
            raise ValueError("quant and steps are both given: keep one of them")
        if self.quant is None and not self.steps:
            raise ValueError(
                "quant: missing; give a section quant with method and weight, or a list steps"
            )
        return self

    @model_validator(mode="after")
    def _clips_are_used(self) -> Recipe:
        clips: str | None = None
        for number, (quant, _) in enumerate(self._written_steps()):
            if has_transform(quant) or has_learned_transform(quant):
                clips = None
            if clips is not None and finds_scales_on_the_way(quant):
                raise ValueError(
                    f"steps.{number}.quant.special.static_groups: false, so no scale heeds the "
                    f"ranges that {clips} finds: write static_groups: true, or {clips}: false"
                )
            if has_clip(quant) or has_learned_clip(quant):
                key = "weight_clip" if has_clip(quant) else "lwc"
                clips = f"steps.{number}.quant.special.{key}"
        return self

    @model_validator(mode="after")
    def _text_for_all(self) -> Recipe:
        for quant, calib in self._written_steps():
            if needs_calibration(quant) and calib is None:
                by_method = quant.method not in METHODS_WITHOUT_CALIBRATION
                reason = f"method {quant.method}" if by_method else "act.static: true"
                raise ValueError(
                    f"calib: missing; {reason} needs calibration text: write "
                    "calib: {name: pileval, n_samples: 128, seq_len: 512}"
                )
        return self

    @model_validator(mode="after")
    def _evaluated_on_other_text(self) -> Recipe:
        evaluation = self.resolved_eval()
        for step in self.resolved_steps():
            if step.calib is not None and step.calib.generates_the_same_as(evaluation):
                raise ValueError(
                    f"eval.seed: {evaluation.seed} is the calibration's seed too, so the model "
                    "would be evaluated on the text it was calibrated with; give another seed"
                )
        return self


def _seeded(section: Data, seed: int) -> Data:
    return section if section.seed is not None else section.model_copy(update={"seed": seed})


def _canonical_step(step: ResolvedStep) -> dict[str, Any]:
    quant = effective(step.quant)
    if step.calib is None:
        # Nothing streams through the blocks, so what they would pass on does not matter.
        del quant["quant_out"]
    return {"quant": quant, "calib": effective(step.calib) if step.calib else None}
