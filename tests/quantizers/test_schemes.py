import dataclasses

import pytest
import torch

from quantizers.number_formats import E4M3, int_format
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme

INT4, INT8 = int_format(4), int_format(8)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (WeightScheme(INT4, True, Granularity.GROUP, group_size=128), (200, 3)),
        (WeightScheme(INT4, True, Granularity.GROUP, group_size=384), (200, 1)),
        (WeightScheme(INT8, True, Granularity.CHANNEL), (200, 1)),
        (WeightScheme(E4M3, True, Granularity.TENSOR), (1,)),
        (WeightScheme(E4M3, True, Granularity.BLOCK, block_shape=(128, 128)), (2, 3)),
        (WeightScheme(E4M3, True, Granularity.BLOCK, block_shape=(64, 256)), (4, 2)),
        (WeightScheme(E4M3, True, Granularity.BLOCK, block_shape=(512, 512)), (1, 1)),
    ],
)
def test_scale_shape(scheme, shape):
    assert scheme.scale_shape(200, 384) == shape


def test_group_size_that_does_not_divide_names_both_numbers():
    scheme = WeightScheme(INT4, True, Granularity.GROUP, group_size=128)
    with pytest.raises(ValueError, match=r"128.*200"):
        scheme.scale_shape(64, 200)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_weights_are_refused(shape):
    with pytest.raises(ValueError, match="nothing to quantize"):
        WeightScheme(INT8, True, Granularity.CHANNEL).scale_shape(*shape)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"granularity": Granularity.TOKEN}, "no tokens"),
        ({"number_format": E4M3, "symmetric": False}, "symmetric"),
        ({"granularity": Granularity.GROUP}, "group_size"),
        ({"granularity": Granularity.GROUP, "group_size": 0}, "group_size"),
        ({"granularity": Granularity.GROUP, "group_size": -1}, "granularity channel"),
        ({"group_size": 128}, "remove it"),
        ({"granularity": Granularity.BLOCK}, "block_shape"),
        ({"granularity": Granularity.BLOCK, "block_shape": (128, 0)}, "block_shape"),
        ({"block_shape": (128, 128)}, "remove it"),
        ({"scale_dtype": torch.float64}, "float32"),
        ({"scale_dtype": torch.int8}, "float32"),
    ],
)
def test_contradictions_are_refused_with_a_way_out(changes, text):
    scheme = WeightScheme(INT8, True, Granularity.CHANNEL)
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(scheme, **changes)


def test_schemes_are_values():
    first = WeightScheme(INT4, True, Granularity.GROUP, 128, None, torch.bfloat16)
    second = WeightScheme(int_format(4), True, Granularity("group"), 128, None, torch.bfloat16)
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.symmetric = False


@pytest.mark.parametrize(
    ("symmetric", "granularity", "dynamic", "text"),
    [
        (False, Granularity.TOKEN, True, "symmetric"),
        (True, Granularity.GROUP, True, "group_size"),
        (True, Granularity.GROUP, False, "dynamic"),
        (True, Granularity.CHANNEL, False, "token, group or tensor"),
        (True, Granularity.TOKEN, False, "dynamic"),
    ],
)
def test_activation_schemes_without_a_kernel_are_refused(symmetric, granularity, dynamic, text):
    with pytest.raises(ValueError, match=text):
        ActivationScheme(INT8, symmetric, granularity, dynamic)


@pytest.mark.parametrize(
    ("granularity", "size"), [(Granularity.TOKEN, 128), (Granularity.GROUP, 0)]
)
def test_activation_group_sizes_go_with_groups_only(granularity, size):
    with pytest.raises(ValueError, match="group_size"):
        ActivationScheme(E4M3, True, granularity, True, size)
