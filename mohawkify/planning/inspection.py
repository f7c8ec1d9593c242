"""The fate of each part of a teacher: replaced by a mixer or copied, and trained in which stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mohawkify.student.student_spec import StudentSpec

if TYPE_CHECKING:
    from mohawkify.teacher.resolve import ResolvedTeacher

# The stages of a recipe that leaves `train` at its defaults.
MIXER_LEARNS = ("orient", "align", "distill")
BLOCK_LEARNS = ("align", "distill")
ENDS_LEARN = ("distill",)


def inspect_source(source: str) -> dict[str, Any]:
    """Describe a teacher and the student of default sizes that would be made of it; no weights are read.

    Args:
        source: a Hub id, a folder or a config.json.

    Raises:
        TeacherError: no such teacher, a broken configuration, or an unknown family.
    """
    from mohawkify.recipe.schema import StudentRecipe
    from mohawkify.student.build import design_student
    from mohawkify.teacher.resolve import resolve_teacher

    teacher = resolve_teacher(source)
    name = f"{teacher.name}-mohawk"
    student = design_student(name, teacher.spec, teacher.config, teacher.adapter, StudentRecipe())
    return describe_teacher(teacher, student)


def describe_teacher(teacher: ResolvedTeacher, student: StudentSpec) -> dict[str, Any]:
    """List the parts of a teacher and what becomes of each.

    Returns:
        A JSON object: the facts of both; ``parts`` with name, attention, replaced, mixer and copied parameters and
        the stages in which each learns. Tensors that two parts share are counted in the first.
    """
    from mohawkify.families.decoder_layers import find_layers
    from mohawkify.teacher.meta_model import embedding_tables

    spec, adapter = teacher.spec, teacher.adapter
    modules: Any = teacher.modules
    mixer = student.mixer_parameters // len(student.mixer_layers)
    counted: set[int] = set()

    def count(parameters: Any) -> int:
        fresh = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in counted}
        counted.update(fresh)
        return sum(fresh.values())

    parts: list[dict[str, Any]] = [_part("embedding", count(embedding_tables(modules)))]
    for index, layer in enumerate(find_layers(modules, adapter.layers)):
        grafted = index in student.mixer_layers
        attention = count(getattr(layer, adapter.attention).parameters())
        layer_part = _part(f"layer {index}", count(layer.parameters()), attention=spec.layer_types[index])
        if grafted:
            layer_part |= {"replaced": attention, "mixer": mixer, "mixer_learns": list(MIXER_LEARNS)}
            layer_part["copied_learns"] = list(BLOCK_LEARNS)
        else:
            layer_part["copied"] += attention
        parts.append(layer_part)
    head = modules.get_output_embeddings()
    head_parameters = count(head.parameters())
    norms = [each for each in modules.modules() if "norm" in type(each).__name__.lower()]
    parts.append(_part("norm", count(parameter for norm in norms for parameter in norm.parameters())))
    others = count(modules.parameters())
    if others:
        parts.append(_part("projections at the ends", others))
    parts.append(_part("head, tied to the embedding" if spec.tie_word_embeddings else "head", head_parameters))
    return {
        "teacher": spec.to_json(),
        "family": adapter.title,
        "notes": list(adapter.notes),
        "student": student.to_json(),
        "parts": parts,
    }


def _part(name: str, copied: int, attention: str | None = None) -> dict[str, Any]:
    """A part that no mixer replaces."""
    return {
        "part": name,
        "attention": attention,
        "replaced": 0,
        "mixer": 0,
        "copied": copied,
        "mixer_learns": [],
        "copied_learns": list(ENDS_LEARN) if copied else [],
    }
