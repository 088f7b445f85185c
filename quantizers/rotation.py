"""Rotations of the residual stream: QuaRot's offline part (arXiv 2404.00456, section 3).

With an orthogonal Q, hidden states x become x Q: embedding and head E become E Q, linears that read
the stream W Q, linears that write to it Q^T W. A norm without factors, x / rms(x), commutes with Q.
Everything is float64.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["Rotation", "RotationKind", "draw_rotation", "fold_norm", "rotate"]


class RotationKind(StrEnum):
    """How an orthogonal matrix is drawn."""

    HADAMARD = "hadamard"  # random signs, then a Hadamard matrix where one can be constructed
    RANDOM = "random"  # uniform among all


@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal Q = diag(signs) (C kron S) / sqrt(K), S Sylvester's matrix of size K / c.

    Attributes:
        signs: (K,) float64.
        core: C, (c, c) float64, with C C^T = c I.
    """

    signs: Tensor
    core: Tensor

    @property
    def size(self) -> int:
        """K."""
        return len(self.signs)


def draw_rotation(size: int, seed: int, kind: RotationKind = RotationKind.HADAMARD) -> Rotation:
    """Draw a rotation on the CPU.

    HADAMARD needs a size of the form c * 2^k, with a core c that Paley's constructions give from a
    prime; the same for a seed everywhere. Other sizes get a random orthogonal matrix, whose last
    bits are those of the machine's QR decomposition.
    """
    generator = torch.Generator().manual_seed(seed)
    core_size = None if kind is RotationKind.RANDOM else _core_size(size)
    if core_size is None:
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        orthogonal, upper = torch.linalg.qr(normal)
        # the sign of R's diagonal decides: without it the draw is not uniform (Mezzadri 2007)
        core = orthogonal * upper.diagonal().sign() * math.sqrt(size)
        return Rotation(torch.ones(size, dtype=torch.float64), core)
    bits = torch.randint(0, 2, (size,), generator=generator)
    return Rotation(bits.to(torch.float64) * 2 - 1, _paley(core_size))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rows (..., K) after the rotation, x Q; float64, on the device of x."""
    rows = x.to(torch.float64) * rotation.signs.to(x.device)
    core = rotation.core.to(x.device)
    shape = rows.shape
    rows = rows.reshape(-1, len(core), rotation.size // len(core))
    width = 1
    while width < rows.shape[2]:
        pairs = rows.reshape(len(rows), len(core), -1, 2, width)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rows = torch.stack((first + second, first - second), -2).reshape(rows.shape)
        width *= 2
    rows = torch.einsum("nck,cd->ndk", rows, core)
    return rows.reshape(shape) / math.sqrt(rotation.size)


def fold_norm(weight: Tensor, norm: Tensor, offset: float = 0.0) -> Tensor:
    """The weight (N, K) float64 of a linear after a norm (K,) whose factors are then one.

    Args:
        weight: (N, K).
        norm: (K,), the norm's weight as stored.
        offset: 1 where the norm multiplies by 1 + weight, as Gemma's do.
    """
    return weight.to(torch.float64) * (norm.to(torch.float64) + offset)


def _core_size(size: int) -> int | None:
    """The smallest c with size = c * 2^k that has a core: 1, or one of Paley's."""
    core = size & -size
    odd = size // core
    if odd == 1:
        return 1
    candidate = 4 * odd
    while candidate <= size:
        if size % candidate == 0 and _paley_order(candidate) is not None:
            return candidate
        candidate *= 2
    return None


def _paley_order(size: int) -> tuple[int, int] | None:
    """The prime q and the construction, 1 or 2, that give a Hadamard matrix of a size."""
    if size % 4 == 0 and _is_prime(size - 1):
        return size - 1, 1
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return size // 2 - 1, 2
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _paley(size: int) -> Tensor:
    """Paley's Hadamard matrix (doi 10.1002/sapm1933121311) of order q + 1, or 2 (q + 1)."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley_order(size)
    assert found is not None
    prime, construction = found
    numbers = torch.arange(prime)
    symbol = -torch.ones(prime, dtype=torch.float64)
    symbol[numbers * numbers % prime] = 1
    symbol[0] = 0
    jacobsthal = symbol[(numbers[:, None] - numbers[None, :]) % prime]
    border = torch.ones(prime, dtype=torch.float64)
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    conference[1:, 1:] = jacobsthal
    conference[0, 1:] = border
    conference[1:, 0] = -border if construction == 1 else border
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if construction == 1:
        return identity + conference
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(identity, minus)
