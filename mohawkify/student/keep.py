"""The layers of a hybrid: what a recipe keeps of the teacher's attention."""

from __future__ import annotations

from mohawkify.errors import RecipeError
from mohawkify.families.adapter import Adapter
from mohawkify.mixers.attention_heads import key_heads
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.layer_spec import ATTENTION, LayerSpec
from mohawkify.teacher.teacher_spec import TeacherSpec


def design_layers(teacher: TeacherSpec, adapter: Adapter, recipe: StudentRecipe) -> tuple[LayerSpec, ...]:
    """The specification of every decoder layer.

    Raises:
        RecipeError: a layer or head to keep does not exist, none is left to graft, or the family knows no windows.
    """
    keep, num_layers, num_heads = recipe.keep, teacher.num_hidden_layers, teacher.num_attention_heads
    for key, layers in (("layers", keep.layers), ("heads", [layer for layer, _ in keep.heads])):
        wrong = [index for index in layers if index >= num_layers]
        if wrong:
            raise RecipeError(f"student.keep.{key}: found layer {wrong[0]}, expected layers 0 to {num_layers - 1}")
    for layer, head in keep.heads:
        if head >= num_heads:
            raise RecipeError(f"student.keep.heads: found head {head}, expected heads 0 to {num_heads - 1}")
        if layer in keep.layers:
            raise RecipeError(f"student.keep.heads: found a head of layer {layer}, which student.keep.layers keeps")
    if keep.window is not None and adapter.capture is not None:
        raise RecipeError(f"student.keep.window: found {keep.window}, but {adapter.title} attends in a way of its own")
    specs = []
    for index in range(num_layers):
        heads = tuple(sorted(head for layer, head in keep.heads if layer == index))
        own = teacher.window_of(index)
        window = keep.window if own is None or (keep.window or own) < own else None
        if index in keep.layers or len(heads) == num_heads:
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
