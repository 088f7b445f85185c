"""Schemes: which number format, and which entries of a tensor share one scale."""

from dataclasses import dataclass
from enum import StrEnum

import torch

from quantizers.number_formats import NumberFormat

__all__ = ["ActivationScheme", "Granularity", "WeightScheme"]

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Granularity(StrEnum):
    """Which entries share one scale. N is out features, K in features."""

    TENSOR = "tensor"  # the whole tensor
    CHANNEL = "channel"  # one row of a weight
    GROUP = "group"  # group_size neighbours within a row of a weight or of activations
    BLOCK = "block"  # a rectangle of a weight
    TOKEN = "token"  # one row of activations


@dataclass(frozen=True)
class WeightScheme:
    """How the weight (N, K) of a linear is quantized.

    Attributes:
        number_format: the format of the codes.
        symmetric: no zero point; the only choice for float formats.
        granularity: TENSOR, CHANNEL, GROUP or BLOCK.
        group_size: entries per group along K; for GROUP only.
        block_shape: (rows, columns) of a block; for BLOCK only.
        scale_dtype: the dtype that scales are stored in: float32, bfloat16 or float16.

    Raises:
        ValueError: the attributes contradict each other.
    """

    number_format: NumberFormat
    symmetric: bool
    granularity: Granularity
    group_size: int | None = None
    block_shape: tuple[int, int] | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse contradictions where the scheme is made, not where it is used."""
        if self.granularity is Granularity.TOKEN:
            raise ValueError("weights have no tokens: use tensor, channel, group or block")
        if self.number_format.is_float and not self.symmetric:
            raise ValueError(f"{self.number_format.name} has no zero point: set symmetric to True")
        self._check_group_size()
        self._check_block_shape()
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"scales cannot be stored as {self.scale_dtype}: "
                "use torch.float32, torch.bfloat16 or torch.float16"
            )

    def _check_group_size(self) -> None:
        if self.granularity is Granularity.GROUP:
            if self.group_size is None or self.group_size < 1:
                raise ValueError(
                    f"granularity group needs a positive group_size, not {self.group_size}: "
                    "set it, 128 for example, or use granularity channel for one scale per row"
                )
        elif self.group_size is not None:
            raise ValueError(
                f"group_size {self.group_size} means nothing with granularity "
                f"{self.granularity}: remove it or use granularity group"
            )

    def _check_block_shape(self) -> None:
        if self.granularity is Granularity.BLOCK:
            if self.block_shape is None or min(self.block_shape) < 1:
                raise ValueError(
                    f"granularity block needs two positive sizes as block_shape, "
                    f"not {self.block_shape}: set it, (128, 128) for example"
                )
        elif self.block_shape is not None:
            raise ValueError(
                f"block_shape {self.block_shape} means nothing with granularity "
                f"{self.granularity}: remove it or use granularity block"
            )

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales, and of the zero points, of a weight (rows, columns).

        Args:
            rows: N, out features.
            columns: K, in features.

        Returns:
            (1,) for TENSOR, (N, 1) for CHANNEL, (N, K / group_size) for GROUP,
            (ceil(N / block rows), ceil(K / block columns)) for BLOCK.

        Raises:
            ValueError: an empty weight, or a group size that does not divide K.
        """
        if rows < 1 or columns < 1:
            raise ValueError(f"a weight of shape ({rows}, {columns}) has nothing to quantize")
        if self.granularity is Granularity.GROUP:
            assert self.group_size is not None
            if columns % self.group_size:
                raise ValueError(
                    f"group size {self.group_size} does not divide {columns} in features: "
                    "choose a divisor, or granularity channel"
                )
            return rows, columns // self.group_size
        if self.granularity is Granularity.BLOCK:
            assert self.block_shape is not None
            return -(-rows // self.block_shape[0]), -(-columns // self.block_shape[1])
        return (rows, 1) if self.granularity is Granularity.CHANNEL else (1,)

    def width(self, columns: int) -> int:
        """Neighbouring entries of one row that share a scale: K unless GROUP or BLOCK."""
        if self.granularity is Granularity.GROUP:
            assert self.group_size is not None
            return self.group_size
        if self.granularity is Granularity.BLOCK:
            assert self.block_shape is not None
            return self.block_shape[1]
        return columns


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of a linear are quantized when it runs.

    Attributes:
        number_format: the format of the codes.
        symmetric: True; SGLang's kernels know no zero point for activations.
        granularity: TOKEN, TENSOR, or GROUP: group_size neighbours of one token.
        dynamic: scales come from the values at hand, not from calibration.
        group_size: entries per group along K; for GROUP only.

    Raises:
        ValueError: a scheme that no kernel offers.
    """

    number_format: NumberFormat
    symmetric: bool
    granularity: Granularity
    dynamic: bool
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the serving kernels would silently ignore."""
        if not self.symmetric:
            raise ValueError(
                "asymmetric activations are ignored by the serving kernels: set symmetric to True"
            )
        if self.granularity not in (Granularity.TOKEN, Granularity.TENSOR, Granularity.GROUP):
            raise ValueError(
                f"activations have no granularity {self.granularity}: use token, group or tensor"
            )
        if self.granularity is not Granularity.TENSOR and not self.dynamic:
            raise ValueError(
                f"per-{self.granularity} scales are known only when the model runs: "
                "set dynamic to True, or granularity to tensor"
            )
        grouped = self.granularity is Granularity.GROUP
        if grouped != (self.group_size is not None) or (grouped and int(self.group_size or 0) < 1):
            raise ValueError(
                f"group_size {self.group_size} does not go with granularity {self.granularity}: "
                "granularity group needs a positive one, the others none"
            )
