"""The objective of a stage by the name in its block of the recipe: the built-in ones and registered ones."""

from __future__ import annotations

from mohawkify.objectives import hidden_state, logits, matrix  # noqa: F401 - each registers its objective
from mohawkify.objectives.objective import OBJECTIVES, Objective, TeacherStudent
from mohawkify.recipe.stages import StageRecipe, stage_block


def make_objective(models: TeacherStudent, block: StageRecipe) -> Objective:
    """The objective that a stage's block of the recipe names."""
    stage_block(block.objective)  # loads the file of another package that registers both
    return OBJECTIVES[block.objective](models, block)
