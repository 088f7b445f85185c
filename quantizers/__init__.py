"""Mathematics of quantization on tensors: formats, scales, rounding, packing, statistics.

Imports torch and the standard library only. Functions return new tensors, leave their arguments
as they were, and work on the device of their arguments.
"""

from quantizers.activations import quantize_dequantize_activation
from quantizers.errors import NonFiniteError
from quantizers.losses import relative_output_error, relative_weight_error
from quantizers.number_formats import E4M3, E5M2, NumberFormat, int_format, number_format
from quantizers.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points
from quantizers.rounding import (
    QuantizedWeight,
    dequantize,
    expand_scale,
    quantize_weight,
    round_to_nearest,
)
from quantizers.scales import weight_scales
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme
from quantizers.statistics import InputStatistics, add_batch, empty_statistics

__all__ = [
    "E4M3",
    "E5M2",
    "ActivationScheme",
    "Granularity",
    "InputStatistics",
    "NonFiniteError",
    "NumberFormat",
    "QuantizedWeight",
    "WeightScheme",
    "add_batch",
    "dequantize",
    "empty_statistics",
    "expand_scale",
    "int_format",
    "number_format",
    "pack_codes",
    "pack_zero_points",
    "quantize_dequantize_activation",
    "quantize_weight",
    "relative_output_error",
    "relative_weight_error",
    "round_to_nearest",
    "unpack_codes",
    "unpack_zero_points",
    "weight_scales",
]
