"""Rotating a model's residual stream: what reads it, what writes it, embedding and head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.rotation import Rotation, fold_norm, rotate
from tasks.engine.architectures import Architecture

__all__ = ["Rotation", "rotated_block", "rotated_outside", "rotation_from", "rotation_tensors"]


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
    tensors: Mapping[str, Tensor], architecture: Architecture, rotation: Rotation
) -> dict[str, Tensor]:
    """Embedding, final norm and head of a rotated model; the head takes the norm and is untied."""
    embedding, norm = tensors[architecture.embedding], tensors[architecture.final_norm]
    head = tensors.get(architecture.head, embedding)
    folded = fold_norm(head, norm, architecture.norm_offset)
    return {
        architecture.embedding: rotate(embedding, rotation).float(),
        architecture.final_norm: torch.full_like(norm, 1 - architecture.norm_offset),
        architecture.head: rotate(folded, rotation).float(),
    }
