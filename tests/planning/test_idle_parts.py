"""Parts that a recipe names to train although nothing in them would learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from mohawkify.errors import RecipeError
from mohawkify.objectives.catalogue import make_objective
from mohawkify.objectives.trainable import part_of_parameters
from mohawkify.planning.planning import student_of
from mohawkify.recipe.loading import apply_overrides, parse_recipe
from mohawkify.recipe.schema import Recipe
from mohawkify.teacher.resolve import resolve_teacher
from tests.commands import RECIPE
from tests.tiny import save_teacher, tiny_pair, tiny_teacher

TIED, NO_NORM = ("llama", {"tie_word_embeddings": True}), ("olmo", {"tie_word_embeddings": False})
UNTIED = ("llama", {"tie_word_embeddings": False})


def recipe(settings: str) -> Recipe:
    return apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), [f"stages.{each}" for each in settings.split(" stages.")])


@pytest.mark.parametrize(
    ("teacher", "setting", "message"),
    [
        (TIED, "distill.train=[head]", "train: found head, .*: this teacher's head is its embedding"),
        (TIED, "distill.train=[mixer, head]", "train: found head, .*: this teacher's head is its embedding"),
        (NO_NORM, "distill.train=[mixer, norm]", "train: found norm, .*: this student has no such parameters"),
        (NO_NORM, "align.train=[norm]", "train: found norm, .*: this student has no such parameters"),
        (
            UNTIED,
            "align.train=[mixer, norm] stages.align.target=mixer",
            "train: found norm, .*: target: mixer trains the mixers",
        ),
        (
            UNTIED,
            "align.train=[mlp] stages.align.target=mixer",
            "train: found mlp, .*: target: mixer trains the mixers",
        ),
    ],
)
def test_they_are_refused(teacher: tuple, setting: str, message: str, tmp_path: Path) -> None:
    found = resolve_teacher(str(save_teacher(tiny_teacher(teacher[0], **teacher[1]), tmp_path)))
    with pytest.raises(RecipeError, match=f"stages.{setting.partition('.')[0]}.{message}"):
        student_of(found, recipe(setting))


@pytest.mark.parametrize(
    ("teacher", "setting"),
    [
        (TIED, "distill.train=[embedding, head]"),
        (TIED, "distill.train=[mixer, mlp, norm, embedding, head]"),
        (UNTIED, "distill.train=[mixer, head]"),
        (UNTIED, "align.target=mixer"),
        (NO_NORM, "distill.temperature=1.0"),
        (NO_NORM, "align.train=[mlp]"),
    ],
)
def test_all_others_learn(teacher: tuple, setting: str, tmp_path: Path) -> None:
    pair = tiny_pair(teacher[0], tmp_path, **teacher[1])
    wanted = recipe(setting)
    student_of(resolve_teacher(str(tmp_path)), wanted)
    part_of = part_of_parameters(pair.student, pair.spec)
    for block in (wanted.stages.align, wanted.stages.distill):
        learning = {part_of[name] for name in make_objective(pair, block).parameters()}
        named = {"mixer"} if getattr(block, "target", None) == "mixer" else set(block.train)
        absent = {part for part in named if part not in part_of.values()}
        assert named - absent <= learning
        assert absent <= ({"head"} if teacher is TIED else {"norm"})
