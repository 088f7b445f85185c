"""What a device can do."""

import importlib.util

from torch import Tensor

__all__ = ["compiles_kernels"]


def compiles_kernels(tensor: Tensor) -> bool:
    """Whether Triton compiles kernels for the device that a tensor is on."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None
