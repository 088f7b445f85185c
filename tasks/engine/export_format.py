"""The compressed-tensors format: which tensors a quantized linear becomes, and how to read it back.

Layouts follow compressed-tensors 0.20 as SGLang 0.5.15 loads them; one place for writing, reading
and describing them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.schema import Act, Quant
from quantizers.number_formats import E4M3, NumberFormat, int_format, number_format
from quantizers.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points
from quantizers.rounding import QuantizedWeight, dequantize
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme
from tasks.engine.errors import InputError

PACKED = "pack-quantized"
INT8 = "int-quantized"
FLOAT8 = "float-quantized"
INPUT_SCALE = "input_scale"

_STRATEGY = {
    Granularity.TENSOR: "tensor",
    Granularity.CHANNEL: "channel",
    Granularity.GROUP: "group",
    Granularity.BLOCK: "block",
    Granularity.TOKEN: "token",
}
_GRANULARITY = {strategy: granularity for granularity, strategy in _STRATEGY.items()}
_CONFIG_GRANULARITY = {
    "per_tensor": Granularity.TENSOR,
    "per_channel": Granularity.CHANNEL,
    "per_group": Granularity.GROUP,
    "per_block": Granularity.BLOCK,
    "per_token": Granularity.TOKEN,
}


@dataclass(frozen=True)
class Scheme:
    """How linears are quantized and stored."""

    weight: WeightScheme
    activation: ActivationScheme | None
    format: str

    def expected(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a quantized linear (N=rows, K=columns)."""
        bits = self.weight.number_format.bits
        scale: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_scale": (self.weight.scale_dtype, self.weight.scale_shape(rows, columns))
        }
        if self.activation is not None and not self.activation.dynamic:
            scale[INPUT_SCALE] = (torch.float32, (1,))
        if self.format != PACKED:
            if not self.weight.symmetric:
                scale["weight_zero_point"] = (torch.int8, scale["weight_scale"][1])
            return {"weight": (self.weight.number_format.code_dtype, (rows, columns))} | scale
        packed: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (rows, -(-columns * bits // 32))),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.weight.symmetric:
            groups = scale["weight_scale"][1][1]
            packed["weight_zero_point"] = (torch.int32, (-(-rows * bits // 32), groups))
        return packed | scale


def export_dtype(source: torch.dtype) -> torch.dtype:
    """Dtype of untouched tensors and of weight-only scales: the source's, float32 as bf16."""
    return torch.float16 if source == torch.float16 else torch.bfloat16


def scheme_of(quant: Quant, source: torch.dtype) -> Scheme:
    """Build the scheme that a recipe's ``quant`` section asks for, for a source of one dtype."""
    weight = quant.weight
    granularity = _CONFIG_GRANULARITY[str(weight.granularity)]
    codes = _number_format(weight.bit)
    layout = _layout(codes, quant.act is None and weight.need_pack)
    weight_only = quant.act is None and not codes.is_float
    block = (weight.block_size or 128,) * 2 if granularity is Granularity.BLOCK else None
    return Scheme(
        WeightScheme(
            codes,
            weight.symmetric,
            granularity,
            weight.group_size,
            block,
            export_dtype(source) if weight_only else torch.float32,
        ),
        None if quant.act is None else _activation(quant.act),
        layout,
    )


def _activation(act: Act) -> ActivationScheme:
    return ActivationScheme(
        _number_format(act.bit),
        act.symmetric,
        _CONFIG_GRANULARITY[str(act.granularity)],
        dynamic=not act.static,
        group_size=act.group_size,
    )


def _number_format(bit: int | str) -> NumberFormat:
    return int_format(bit) if isinstance(bit, int) else number_format(str(bit))


def _layout(codes: NumberFormat, packed: bool) -> str:
    if codes.is_float:
        return FLOAT8
    return PACKED if packed else INT8


def compress(
    quantized: QuantizedWeight,
    scheme: Scheme,
    input_scale: Tensor | None = None,
    check: bool = True,
) -> dict[str, Tensor]:
    """Turn codes (N, K) and scales into the tensors of the format, by their names' endings.

    Where codes are not to be checked, those that do not fit are others after they are packed.
    """
    scale = {"weight_scale": quantized.scale}
    if input_scale is not None:
        scale[INPUT_SCALE] = input_scale
    if scheme.format != PACKED:
        if quantized.zero_point is not None:
            scale["weight_zero_point"] = quantized.zero_point
        return {"weight": quantized.codes} | scale
    bits = scheme.weight.number_format.bits
    shape = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    packed = pack_codes(quantized.codes, bits, check=check)
    tensors = {"weight_packed": packed, "weight_shape": shape} | scale
    if quantized.zero_point is not None:
        tensors["weight_zero_point"] = pack_zero_points(quantized.zero_point, bits)
    return tensors


def decompress(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Read a quantized linear back: the inverse of :func:`compress`."""
    scale = tensors["weight_scale"]
    zero_point = tensors.get("weight_zero_point")
    if scheme.format != PACKED:
        return QuantizedWeight(tensors["weight"], scale, zero_point)
    bits = scheme.weight.number_format.bits
    rows, columns = (int(extent) for extent in tensors["weight_shape"])
    return QuantizedWeight(
        unpack_codes(tensors["weight_packed"], bits, columns),
        scale,
        None if zero_point is None else unpack_zero_points(zero_point, bits, rows),
    )


def restore(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight (N, K) that a server computes with, in the dtype of its scales.

    Weight-only kernels dequantize to the model's dtype; int8 and FP8 kernels scale in float32.
    """
    return dequantize(decompress(tensors, scheme), scheme.weight, scheme.weight.scale_dtype)


def restore_block(
    tensors: Mapping[str, Tensor], quantized: Iterable[str], scheme: Scheme, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the weights of a block, by their names in it, from its exported tensors.

    Args:
        tensors: the block's tensors as exported, by their names in the block.
        quantized: names of the linears that are quantized.
        scheme: how they are.
        dtype: what every weight is returned in.
    """
    linears = set(quantized)
    weights = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    for name, tensor in tensors.items():
        module, _, ending = name.rpartition(".")
        if module in linears and ending != "bias":
            parts[module][ending] = tensor
        else:
            weights[name] = tensor.to(dtype)
    for module, members in parts.items():
        weights[f"{module}.weight"] = restore(members, scheme).to(dtype)
    return weights


def quantization_config(scheme: Scheme, ignore: Iterable[str]) -> dict[str, Any]:
    """Describe the scheme as ``quantization_config`` of an exported ``config.json``."""
    weight, activation = scheme.weight, scheme.activation
    weights = _describe(weight.number_format, weight.granularity) | {
        "symmetric": weight.symmetric,
        "group_size": weight.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    if weight.block_shape is not None:
        weights["block_structure"] = list(weight.block_shape)
    inputs = None
    if activation is not None:
        inputs = _describe(activation.number_format, activation.granularity) | {
            "symmetric": activation.symmetric,
            "group_size": activation.group_size,
            "dynamic": activation.dynamic,
        }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _describe(codes: NumberFormat, granularity: Granularity) -> dict[str, Any]:
    kind = "float" if codes.is_float else "int"
    return {"num_bits": codes.bits, "type": kind, "strategy": _STRATEGY[granularity]}


def scheme_from_config(config: Mapping[str, Any], model_dtype: torch.dtype) -> Scheme:
    """Read the scheme of an exported checkpoint from its ``quantization_config``.

    Raises:
        InputError: not one of the formats that this project writes.
    """
    try:
        (group,) = config["config_groups"].values()
        layout = config["format"]
        if layout not in (PACKED, INT8, FLOAT8):
            raise ValueError(f"the format {layout!r} is not known here")
        weights, inputs = group["weights"], group.get("input_activations")
        block = weights.get("block_structure")
        granularity = _GRANULARITY[weights["strategy"]]
        weight = WeightScheme(
            _stored_format(weights),
            bool(weights["symmetric"]),
            granularity,
            weights.get("group_size") if granularity is Granularity.GROUP else None,
            tuple(block) if block else None,
            model_dtype if layout != FLOAT8 and inputs is None else torch.float32,
        )
        activation = None
        if inputs is not None:
            strategy = _GRANULARITY[inputs["strategy"]]
            activation = ActivationScheme(
                _stored_format(inputs),
                bool(inputs["symmetric"]),
                strategy,
                bool(inputs["dynamic"]),
                inputs.get("group_size") if strategy is Granularity.GROUP else None,
            )
        return Scheme(weight, activation, layout)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"config.json: quantization_config: not one that blockquant writes ({error}); "
            "give a checkpoint exported by `blockquant quantize`"
        ) from error


def _stored_format(described: Mapping[str, Any]) -> NumberFormat:
    if described["type"] == "int":
        return int_format(int(described["num_bits"]))
    if (described["type"], int(described["num_bits"])) != ("float", 8):
        raise ValueError(f"no format {described['type']} of {described['num_bits']} bits")
    return E4M3
