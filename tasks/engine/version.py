"""The model before rounding, as the steps so far leave it: rotated, its channels transformed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantizers.channel_transform import ChannelTransform
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import apply_transforms, from_tensors, head_dim
from tasks.engine.job import Job, require, result_tensors
from tasks.engine.rotating import Rotation, rotated_block, rotated_outside, rotation_from
from tasks.engine.store import load_tensors

DECISION = "transform.safetensors"
ROTATION = "rotation.safetensors"


@dataclass(frozen=True)
class Version:
    """Which decisions are put onto the source's weights, in their order.

    Attributes:
        rotation: key of the rotation of the residual stream, if there is one.
        decisions: per block, keys of the transforms of the steps that are done.
    """

    rotation: str | None = None
    decisions: tuple[tuple[str, ...], ...] = ()

    def of_block(self, block: int) -> tuple[str, ...]:
        """Keys of a block's transforms."""
        return self.decisions[block] if self.decisions else ()

    def lineage(self, job: Job, block: int) -> list[str | None]:
        """What decides a block's weights."""
        # which tensors turn which way, and what a norm adds, is the architecture's
        kind = None if self.rotation is None else job.plan.architecture.model_type
        return [job.block_digest(block), self.rotation, kind, *self.of_block(block)]

    def after(self, decided: Sequence[str | None]) -> Version:
        """The version one step further, given what it decided for each block."""
        decisions = tuple(
            (*self.of_block(block), *([] if key is None else [key]))
            for block, key in enumerate(decided)
        )
        return Version(self.rotation, decisions)


SOURCE = Version()


def version_block(job: Job, version: Version, block: int) -> Mapping[str, Tensor]:
    """A block's tensors by their names in it: the source's as stored, else as apply_transforms."""
    if version.rotation is None and not version.of_block(block):
        return job.read_block(block)

    def compute() -> Mapping[str, Tensor]:
        tensors: Mapping[str, Tensor] = job.read_block(block)
        if version.rotation is not None:
            rotation = _rotation(job, version.rotation)
            tensors = rotated_block(tensors, job.plan.architecture, rotation)
        for key in version.of_block(block):
            tensors = dict(_transformed(job, tensors, key))
        return job.resident(tensors)

    return job.memo.get("version block", f"{block} {version.lineage(job, block)}", compute)


def block_transforms(job: Job, decision: str | None) -> Mapping[str, ChannelTransform]:
    """The transforms of a block that were decided, by the names of groups."""
    if decision is None:
        return {}
    return from_tensors(result_tensors(job, decision, DECISION))


def transformed_block(
    job: Job, block: int, decision: str | None, version: Version = SOURCE
) -> Mapping[str, Tensor]:
    """A block's tensors after one decision more, by their names in it, made when looked at."""
    tensors = version_block(job, version, block)
    if decision is None:
        return tensors
    # a decision says which version it was taken for
    return job.memo.get(
        "transformed block", f"{decision} {block}", lambda: _transformed(job, tensors, decision)
    )


def outside_tensors(job: Job, version: Version) -> dict[str, Tensor]:
    """The tensors outside of the blocks: the source's as stored, or rotated, as exported.

    A rotated model's head is no longer its embedding: both are there.
    """
    if version.rotation is None:
        # nothing is computed with them
        return job.source.read(job.plan.outside)
    return _rotated(job, version.rotation, job.plan.outside)


def embedding_of(job: Job, version: Version) -> Tensor:
    """The embedding (V, D), on the device: the source's as stored, or rotated, as exported."""
    name = job.plan.architecture.embedding
    if version.rotation is None:
        return job.source.read([name], job.device)[name]
    return _rotated(job, version.rotation, [name])[name]


def _rotated(job: Job, rotation: str, names: Sequence[str]) -> dict[str, Tensor]:
    stored = job.source.read(names, job.device)
    turn, dtype = _rotation(job, rotation), export_dtype(job.dtype)
    return stored | rotated_outside(stored, job.plan.architecture, turn, dtype)


def _transformed(job: Job, tensors: Mapping[str, Tensor], decision: str) -> Mapping[str, Tensor]:
    transforms = block_transforms(job, decision)
    dtype = export_dtype(job.dtype)
    return apply_transforms(tensors, transforms, job.plan.architecture, head_dim(job), dtype)


def _rotation(job: Job, key: str) -> Rotation:
    return rotation_from(load_tensors(require(job, key).file(ROTATION), job.device))
