"""The closed choices of a recipe: one enum each, spelled as LLMC spells them."""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "METHODS_WITHOUT_CALIBRATION",
    "ActAlgorithm",
    "ActGranularity",
    "ClipVersion",
    "DataName",
    "EvaluationDtype",
    "EvaluationType",
    "FloatFormat",
    "Importance",
    "Method",
    "QuantType",
    "RotateMode",
    "TorchDtype",
    "TransVersion",
    "WeightAlgorithm",
    "WeightGranularity",
]


class Method(StrEnum):
    """What chooses the codes. Identity is ours: calibrated, changes nothing, then rounds."""

    RTN = "RTN"
    IDENTITY = "Identity"
    AWQ = "Awq"
    GPTQ = "GPTQ"
    SMOOTHQUANT = "SmoothQuant"
    OSPLUS = "OsPlus"
    OMNIQUANT = "OmniQuant"
    QUAROT = "Quarot"


# The rotation of Quarot is drawn from the seed, and round to nearest looks at weights only.
METHODS_WITHOUT_CALIBRATION = frozenset({Method.RTN, Method.QUAROT})


class FloatFormat(StrEnum):
    """Float8 number formats, in place of a number of bits."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"


class QuantType(StrEnum):
    """LLMC's name of the number formats' family; ``float-quant`` reads the same."""

    INT = "int_quant"
    FLOAT = "float_quant"


class WeightGranularity(StrEnum):
    """Which weights share a scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"
    PER_BLOCK = "per_block"


class ActGranularity(StrEnum):
    """Which activations share a scale; per_group: group_size neighbours of one token."""

    PER_TOKEN = "per_token"
    PER_TENSOR = "per_tensor"
    PER_GROUP = "per_group"


class WeightAlgorithm(StrEnum):
    """LLMC's ``calib_algo`` of weights; learnable reads as minmax, for a method that learns."""

    MINMAX = "minmax"
    MSE = "mse"
    LEARNABLE = "learnable"


class ActAlgorithm(StrEnum):
    """LLMC's ``calib_algo`` of activations; static_percentile is ours."""

    MINMAX = "minmax"
    MSE = "mse"
    LEARNABLE = "learnable"
    STATIC_MINMAX = "static_minmax"
    STATIC_MOVING_MINMAX = "static_moving_minmax"
    STATIC_HIST = "static_hist"
    STATIC_PERCENTILE = "static_percentile"


class DataName(StrEnum):
    """Where text comes from: a known data set, a file, a hub id, or the model itself."""

    PILEVAL = "pileval"
    WIKITEXT2 = "wikitext2"
    C4 = "c4"
    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    DATASET = "dataset"
    SELF_GENERATED = "self_generated"


class EvaluationDtype(StrEnum):
    """The dtype that the model is evaluated in; auto is float32 on a CPU, else bfloat16."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class EvaluationType(StrEnum):
    """What is measured; LLMC's other types are not offered."""

    PPL = "ppl"


class TorchDtype(StrEnum):
    """The dtype that the source is said to hold; auto says nothing, another is refused."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class TransVersion(StrEnum):
    """AWQ's formula for channel scales; best, ours, takes per group what loses least."""

    V1 = "v1"
    V2 = "v2"
    BEST = "best"


class ClipVersion(StrEnum):
    """LLMC's ways to apply a clip."""

    V1 = "v1"
    V2 = "v2"


class Importance(StrEnum):
    """How AWQ measures the size of a channel's inputs; LLMC knows the mean only."""

    MEAN_ABS = "mean_abs"
    ROOT_MEAN_SQUARE = "root_mean_square"


class RotateMode(StrEnum):
    """How Quarot draws its rotation."""

    HADAMARD = "hadamard"
    RANDOM = "random"
