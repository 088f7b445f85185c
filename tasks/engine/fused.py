"""transformers' blocks with one kernel each for what lies between their products.

Modules keep their names and weights; what changes is the function that computes them.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

from quantizers.between_products import rms_norm, rotated_positions, swiglu

# of quantizers/: what a result depends on beside torch and transformers
CODE = ("quantizers.between_products", "quantizers.between_products_kernel")
_ROTARY = "apply_rotary_pos_emb"


def fuse(block: nn.Module) -> None:
    """Have a block of Llama's kind compute its norms, positions and gate by quantizers' functions.

    What is not known in it stays transformers' own.
    """
    for module in block.modules():
        name, config = type(module).__name__, cast("Any", getattr(module, "config", None))
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("MLP") and config.hidden_act == "silu":
            module.forward = MethodType(_gated, module)
        elif name.endswith("Attention") and _ROTARY in type(module).forward.__code__.co_names:
            module.forward = MethodType(_given(type(module).forward, _ROTARY, _turned), module)


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    gated: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return gated


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotated_positions(query, cos, sin), rotated_positions(key, cos, sin)


def _given(function: Any, name: str, other: Any) -> FunctionType:
    """The same function, for which a global name of its module means something else."""
    changed = FunctionType(
        function.__code__,
        function.__globals__ | {name: other},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed
