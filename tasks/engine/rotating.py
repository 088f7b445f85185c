"""Rotating a model's residual stream: what reads it, what writes it, embedding and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantizers.rotation import Rotation, fold_norm, rotate
from tasks.engine.architectures import Architecture

__all__ = ["Rotation", "rotated_block", "rotated_outside", "rotation_from", "rotation_tensors"]

# entries of an embedding that are rotated at once
PART_ENTRIES = 1 << 22


def rotation_tensors(rotation: Rotation) -> dict[str, Tensor]:
    """Name the tensors of a rotation, for a file."""
    return {"signs": rotation.signs, "core": rotation.core}


def rotation_from(tensors: Mapping[str, Tensor]) -> Rotation:
    """Read :func:`rotation_tensors` back."""
    return Rotation(tensors["signs"], tensors["core"])


def rotated_block(
    tensors: Mapping[str, Tensor], architecture: Architecture, rotation: Rotation
) -> dict[str, Tensor]:
    """A block's tensors whose hidden states are rotated: norms of one, linears in float32.

    Args:
        tensors: by their names in the block.
        architecture: of the block.
        rotation: of the hidden size.
    """
    done = dict(tensors)
    for group in architecture.groups:
        if group.fed_by in architecture.linears:
            continue
        norm = tensors[f"{group.fed_by}.weight"]
        for linear in group.linears:
            weight = fold_norm(tensors[f"{linear}.weight"], norm, architecture.norm_offset)
            done[f"{linear}.weight"] = rotate(weight, rotation).float()
        done[f"{group.fed_by}.weight"] = torch.full_like(norm, 1 - architecture.norm_offset)
    for linear in architecture.stream_writers:
        turned = rotate(tensors[f"{linear}.weight"].mT, rotation).mT
        done[f"{linear}.weight"] = turned.float().contiguous()
        if f"{linear}.bias" in tensors:
            done[f"{linear}.bias"] = rotate(tensors[f"{linear}.bias"], rotation).float()
    return done


def rotated_outside(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    rotation: Rotation,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Embedding, final norm and head of a rotated model; the head takes the norm and is untied.

    Args:
        tensors: the embedding alone, or all three, a tied head left out.
        architecture: of the model.
        rotation: of the hidden size.
        dtype: of the rotated embedding and head, each rounded to float32 before.
    """
    embedding = tensors[architecture.embedding]
    turned = _by_parts(embedding, lambda part: rotate(part, rotation), dtype)
    norm = tensors.get(architecture.final_norm)
    if norm is None:
        return {architecture.embedding: turned}

    def folded(part: Tensor) -> Tensor:
        return rotate(fold_norm(part, norm, architecture.norm_offset), rotation)

    return {
        architecture.embedding: turned,
        architecture.final_norm: torch.full_like(norm, 1 - architecture.norm_offset),
        architecture.head: _by_parts(tensors.get(architecture.head, embedding), folded, dtype),
    }


def _by_parts(matrix: Tensor, turn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """A matrix of many rows, turned some at a time: all of them in float64 would fill memory."""
    done = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    rows = max(1, PART_ENTRIES // matrix.shape[1])
    for part, room in zip(matrix.split(rows), done.split(rows), strict=True):
        room.copy_(turn(part).float())
    return done
