import importlib.util

import pytest
import torch

from quantizers.devices import compiles_kernels
from quantizers.number_formats import E4M3, E5M2, int_format


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((8, 6), False), ((8, 9), True)])
def test_older_gpus_have_no_kernels_of_e4m3(
    capability: tuple[int, int], fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor = torch.zeros(1).as_subclass(OnDevice)
    assert compiles_kernels(tensor, E4M3) == fp8
    for number in (None, int_format(4), int_format(8), E5M2):
        assert compiles_kernels(tensor, number)


def test_without_a_compiler_or_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles_kernels(torch.zeros(1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not compiles_kernels(torch.zeros(1).as_subclass(OnDevice))
