"""What a device can do."""

import importlib.util

import torch
from torch import Tensor

from quantizers.number_formats import E4M3, NumberFormat

__all__ = ["compiles_kernels"]

# the first that Triton compiles E4M3 for
_E4M3_CAPABILITY = (8, 9)


def compiles_kernels(tensor: Tensor, number: NumberFormat | None = None) -> bool:
    """Whether Triton compiles kernels for the device that a tensor is on.

    Args:
        tensor: that they are to read.
        number: the format that they round to, if they do.
    """
    if not tensor.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    return number != E4M3 or torch.cuda.get_device_capability(tensor.device) >= _E4M3_CAPABILITY
