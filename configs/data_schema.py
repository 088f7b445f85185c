"""Where calibration and evaluation text comes from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from configs.fields import Count, NoEffect, NotHashed, Section, Seed, choice
from configs.vocabulary import DataName, EvaluationDtype, EvaluationType

__all__ = ["Calibration", "Evaluation", "TaskScores"]

_FETCHING = NotHashed("how text is fetched does not change it")
_MEMORY = NotHashed("it changes nothing but memory")
_LOOKS = NotHashed("it changes what is shown, not what is made")

Length = Annotated[Count, Field(ge=2)]

_NEED_A_PATH = {
    DataName.TEXT: "a text file",
    DataName.JSONL: "a JSON lines file",
    DataName.PARQUET: "a parquet file",
    DataName.DATASET: "a data set's id on the hub",
}


class _Data(Section):
    """The keys that calibration and evaluation share."""

    download: Annotated[bool, _FETCHING] = True
    path: str | None = None
    bs: Annotated[Count, Field(ge=-1), _MEMORY] = -1
    text_column: str = "text"
    split: str | None = None


def _check_path(name: DataName, download: bool, path: str | None) -> None:
    if path is not None or name is DataName.SELF_GENERATED:
        return
    if name in _NEED_A_PATH:
        raise ValueError(f"path: missing; name {name.value} needs the path of {_NEED_A_PATH[name]}")
    if not download:
        raise ValueError(
            f"path: missing; with download: false, {name.value} is read from a path: "
            "give it, or write download: true"
        )


class Calibration(_Data):
    """The text that statistics are collected on: n_samples windows of seq_len tokens."""

    name: Annotated[DataName, choice(DataName)] = Field(description=f"one of {', '.join(DataName)}")
    n_samples: Annotated[Count, Field(ge=1)] = 128
    seq_len: Length = 512
    preproc: str | None = None
    seed: Seed | None = None
    _place: str = PrivateAttr("calib")

    @property
    def place(self) -> str:
        """Where the recipe has it: what its keys begin with."""
        return self._place

    def placed(self, place: str) -> Calibration:
        """The same, where the recipe has it elsewhere."""
        found = self.model_copy()
        found._place = place
        return found

    @model_validator(mode="after")
    def _text_can_be_found(self) -> Calibration:
        _check_path(self.name, self.download, self.path)
        return self

    def generates_the_same_as(self, evaluation: Evaluation) -> bool:
        """Whether the model would write the same text for both."""
        both = self.name is DataName.SELF_GENERATED and evaluation.name is self.name
        return both and self.seed == evaluation.seed


class TaskScores(Section):
    """Tasks of lm-evaluation-harness: names that it knows, or YAML files that describe one each.

    limit: so many documents of each task, None means all; num_fewshot: examples before each
    question, None means what the task says.
    """

    tasks: Annotated[
        tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
    ] = ()
    limit: Annotated[Count, Field(ge=1)] | None = None
    num_fewshot: Annotated[Count, Field(ge=0)] | None = None


class Evaluation(_Data):
    """The text that perplexity is measured on; windows None means all there are.

    report: whether pictures and a page of what was measured are made; sample_tokens: how far the
    beginnings of its sample text are continued; lm_eval: tasks that are scored too.
    """

    name: Annotated[DataName, choice(DataName)] = DataName.SELF_GENERATED
    seq_len: Length = Field(
        default_factory=lambda data: 512 if data.get("name") is DataName.SELF_GENERATED else 2048
    )
    # Text that the model writes itself has no end, so all of it is no choice there.
    windows: Annotated[Count, Field(ge=1)] | None = Field(
        default_factory=lambda data: 16 if data.get("name") is DataName.SELF_GENERATED else None
    )
    seed: Seed | None = None
    dtype: Annotated[EvaluationDtype, choice(EvaluationDtype)] = EvaluationDtype.AUTO
    type: Annotated[EvaluationType, choice(EvaluationType)] = EvaluationType.PPL
    report: Annotated[bool, _LOOKS] = True
    sample_tokens: Annotated[Count, Field(ge=0), _LOOKS] = 16
    lm_eval: Annotated[TaskScores, _LOOKS] = TaskScores()
    eval_pos: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        NoEffect("the source and the export are always evaluated"),
    ] = None
    inference_per_block: Annotated[bool | None, NoEffect("memory decides how the model is run")] = (
        None
    )
    # Not in the seed document, but in a file of its recipes (gptq_w4a16.yml).
    eval_token_consist: Annotated[
        bool | None, NoEffect("agreement with the source model is always measured")
    ] = None

    @property
    def place(self) -> str:
        """Where the recipe has it: what its keys begin with."""
        return "eval"

    @model_validator(mode="after")
    def _text_can_be_found(self) -> Evaluation:
        _check_path(self.name, self.download, self.path)
        if self.name is DataName.SELF_GENERATED and self.path is not None:
            raise ValueError(
                f"path: {self.path} would not be read, the model writes its own text; "
                "write name: text beside it"
            )
        if self.name is DataName.SELF_GENERATED and self.windows is None:
            raise ValueError("windows: text that the model writes has no end; write windows: 16")
        return self
