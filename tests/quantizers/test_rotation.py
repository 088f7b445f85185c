"""Rotations against dense products and the definition of a Hadamard matrix."""

import math

import pytest
import torch

from quantizers.rotation import RotationKind, draw_rotation, fold_norm, rotate

# hidden sizes of models in use, and small ones
SIZES = [1, 2, 8, 12, 20, 24, 28, 36, 40, 60, 96, 128, 160, 512, 640, 896]
SERVED = [1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 3840, 4096, 5120, 5376, 6144, 7168, 8192]


def dense(rotation):
    return rotate(torch.eye(rotation.size, dtype=torch.float64), rotation)


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices(size):
    scaled = dense(draw_rotation(size, 0)) * math.sqrt(size)
    matrix = scaled.round()
    assert torch.allclose(scaled, matrix, atol=1e-12)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", SERVED)
def test_sizes_of_models_have_one(size):
    # from its rows: the whole is large
    rotation = draw_rotation(size, 0)
    assert rotation.core.abs().unique().tolist() == [1.0]
    core = rotation.core
    assert torch.equal(core @ core.T, len(core) * torch.eye(len(core), dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92, 100])
def test_other_sizes_get_a_random_orthogonal_matrix(size):
    matrix = dense(draw_rotation(size, 0))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert len(matrix.abs().unique()) > size


@pytest.mark.parametrize("kind", RotationKind)
@pytest.mark.parametrize("size", [96, 128])
def test_a_rotation_is_orthogonal_and_seeded(size, kind):
    matrix = dense(draw_rotation(size, 7, kind))
    identity = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, identity, atol=1e-12)
    assert torch.equal(matrix, dense(draw_rotation(size, 7, kind)))
    assert not torch.allclose(matrix, dense(draw_rotation(size, 8, kind)))
    if kind is RotationKind.HADAMARD:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(size)))


def test_rows_are_rotated_as_by_the_dense_matrix(device):
    rotation = draw_rotation(96, 3)
    x = torch.randn(2, 5, 96, device=device)
    found = rotate(x, rotation)
    assert found.dtype == torch.float64
    assert torch.allclose(found, x.double() @ dense(rotation).to(device), atol=1e-12)


def test_a_layer_computes_what_it_did(device):
    draw = torch.Generator().manual_seed(0)
    rotation = draw_rotation(48, 1)
    x = torch.randn(10, 48, generator=draw, dtype=torch.float64)
    norm = 1 + 0.3 * torch.randn(48, generator=draw)
    reading = torch.randn(64, 48, generator=draw, dtype=torch.float64)
    writing = torch.randn(48, 64, generator=draw, dtype=torch.float64)

    def normed(rows):
        return rows / rows.square().mean(-1, keepdim=True).sqrt()

    before = x + torch.relu((normed(x) * norm.double()) @ reading.T) @ writing.T
    rotated = rotate(x, rotation)
    read = rotate(fold_norm(reading, norm), rotation)
    written = rotate(writing.T, rotation).T
    after = rotated + torch.relu(normed(rotated) @ read.T) @ written.T
    assert torch.allclose(after, rotate(before, rotation), atol=1e-10)


def test_norms_that_add_one():
    weight, norm = torch.randn(4, 6), torch.randn(6)
    assert torch.allclose(fold_norm(weight, norm, 1.0), (weight * (1 + norm)).double(), atol=1e-6)


def test_an_outlier_channel_is_spread():
    x = torch.zeros(1, 128)
    x[0, 5] = 100
    assert rotate(x, draw_rotation(128, 0)).abs().max() < 9
