"""Draw the rotation of a model's residual stream."""

from __future__ import annotations

from typing import Any

from configs.schema import ResolvedStep
from configs.special_keys import QuarotSpecial
from quantizers.rotation import RotationKind, draw_rotation
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.rotating import rotation_tensors
from tasks.engine.step import step
from tasks.engine.version import ROTATION


def _depends_on(job: Job, recipe_step: ResolvedStep) -> dict[str, Any]:
    special = recipe_step.quant.special
    assert isinstance(special, QuarotSpecial)
    return {
        "kind": str(special.rotate_mode),
        "seed": job.recipe.base.seed,
        "size": int(job.source.config["hidden_size"]),
    }


@step(depends_on=_depends_on)
def rotate(job: Job, draft: Draft, recipe_step: ResolvedStep) -> dict[str, Any]:
    """Draw an orthogonal matrix of the hidden size: signs and a core, or the matrix itself."""
    special = recipe_step.quant.special
    assert isinstance(special, QuarotSpecial)
    size = int(job.source.config["hidden_size"])
    kind = RotationKind(special.rotate_mode.value)
    rotation = draw_rotation(size, job.recipe.base.seed, kind)
    draft.save_tensors(ROTATION, rotation_tensors(rotation))
    # where no Hadamard matrix is constructed, or none was asked for, the core is the whole
    return {"size": size, "core": len(rotation.core)}
