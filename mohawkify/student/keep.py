"""The layers of a hybrid: what a recipe keeps of the teacher's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mohawkify.errors import RecipeError
from mohawkify.families.adapter import Adapter
from mohawkify.mixers.attention_heads import key_heads
from mohawkify.recipe.schema import KeepRecipe, StudentRecipe
from mohawkify.student.layer_spec import ATTENTION, LayerSpec
from mohawkify.teacher.teacher_spec import TeacherSpec


def design_layers(teacher: TeacherSpec, adapter: Adapter, recipe: StudentRecipe) -> tuple[LayerSpec, ...]:
    """The specification of every decoder layer.

    Raises:
        RecipeError: a layer or head to keep does not exist, none is left to graft, or the family knows no windows.
    """
    num_layers, num_heads = teacher.num_hidden_layers, teacher.num_attention_heads
    # A plan needs no scores: all choices are as large.
    kept_layers, kept_heads = choose(recipe.keep, num_layers, num_heads, None)
    for key, layers in (("layers", kept_layers), ("heads", tuple(layer for layer, _ in kept_heads))):
        wrong = [index for index in layers if index >= num_layers]
        if wrong:
            raise RecipeError(f"student.keep.{key}: found layer {wrong[0]}, expected layers 0 to {num_layers - 1}")
    for layer, head in kept_heads:
        if head >= num_heads:
            raise RecipeError(f"student.keep.heads: found head {head}, expected heads 0 to {num_heads - 1}")
        if layer in kept_layers:
            raise RecipeError(f"student.keep.heads: found a head of layer {layer}, which student.keep.layers keeps")
    narrow = recipe.keep.window
    if narrow is not None and adapter.capture is not None:
        raise RecipeError(f"student.keep.window: found {narrow}, but {adapter.title} attends in a way of its own")
    specs = []
    for index in range(num_layers):
        heads = tuple(sorted(head for layer, head in kept_heads if layer == index))
        own = teacher.window_of(index)
        window = narrow if own is None or (narrow or own) < own else None
        if index in kept_layers or len(heads) == num_heads:
            specs.append(LayerSpec(ATTENTION, 0, num_heads, window=window))
        elif heads:
            specs.append(LayerSpec(recipe.mixer, num_heads - len(heads), len(heads), heads, window))
        else:
            specs.append(LayerSpec(recipe.mixer, num_heads, 0))
    if all(spec.kind == ATTENTION for spec in specs):
        raise RecipeError("student.keep: found every layer, expected at least one with a mixer")
    return tuple(specs)


def caches_of(specs: tuple[LayerSpec, ...], teacher: TeacherSpec) -> tuple[tuple[int, int | None], ...]:
    """`StudentSpec.caches` of these layers."""
    repeats, caches = teacher.num_attention_heads // teacher.num_key_value_heads, []
    for index, spec in enumerate(specs):
        if spec.attention_heads:
            keys = len(key_heads(spec.heads, repeats)) if spec.heads else teacher.num_key_value_heads
            caches.append((2 * keys * teacher.head_dim, spec.window or teacher.window_of(index)))
    return tuple(caches)


def is_open(keep: KeepRecipe) -> bool:
    """Whether scores are to choose layers or heads."""
    return keep.layers == "auto" or isinstance(keep.heads, str)


def choose(
    keep: KeepRecipe, layers: int, heads: int, scores: Mapping[str, Any] | None
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The layers and the single heads that a recipe keeps.

    Args:
        keep: of the recipe.
        layers: of the teacher.
        heads: of a layer.
        scores: the content of scores.json; None chooses as many, evenly spread.

    Raises:
        RecipeError: there are fewer scores than are to be chosen.
    """
    chosen_layers, chosen_heads = () if keep.layers == "auto" else keep.layers, keep.heads
    if keep.layers == "auto":
        count = keep.number or share_of(keep.share or "", layers)
        if count >= layers:
            raise RecipeError(f"student.keep.number: found {count} of {layers} layers, expected fewer")
        best = evenly(count, layers) if scores is None else scores["layers"]["best"][:count]
        _require_enough("layers", len(best), count)
        chosen_layers = tuple(sorted(best))
    if isinstance(chosen_heads, str):
        count = share_of(chosen_heads, layers * heads)
        spread = [divmod(number, heads) for number in evenly(count, layers * heads)]
        pairs = spread if scores is None else scores["heads"]["best"][:count]
        _require_enough("heads", len(pairs), count)
        chosen_heads = tuple(sorted((layer, head) for layer, head in pairs if layer not in chosen_layers))
    return chosen_layers, chosen_heads


def share_of(share: str, total: int) -> int:
    """How many a share such as ``2%`` is of so many, at least 1."""
    return max(1, round(float(share.removesuffix("%")) / 100 * total))


def evenly(count: int, total: int) -> list[int]:
    """As many numbers below the total, evenly spread."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _require_enough(key: str, found: int, count: int) -> None:
    if found < count:
        raise RecipeError(
            f"student.keep.{key}: found scores that choose {found}, expected {count}",
            hint=f"mohawkify score with --{key} chooses more",
        )
