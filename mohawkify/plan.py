"""What a conversion will take, from the teacher's configuration alone: steps, FLOPs, memory, disk, time. Estimates."""

from __future__ import annotations

from typing import Any

from mohawkify.recipe import Recipe, StageRecipe
from mohawkify.spec import StudentSpec, TeacherSpec

STAGES = ("orient", "align", "distill")
FP32_BYTES = 4
ADAM_BYTES = 8  # two float32 moments
# Numbers kept per token, layer and model width between forward and backward: measured to be 30-40 on small Llamas.
ACTIVATIONS_PER_WIDTH = 34
BAND_NUMBERS, FEWEST_ROWS = 1 << 22, 16  # of ops/orient_tiles.py
LOGIT_COPIES = 5  # both logits in float32, two log-softmaxes, a gradient
# One assumption on speed per device, used when the user gives none: what such machines sustain in training.
ASSUMED_FLOPS_PER_SECOND = {"cuda": 4.0e14, "mps": 4.0e12, "cpu": 3.0e10}


def make_plan(
    teacher: TeacherSpec, student: StudentSpec, recipe: Recipe, *, flops_per_second: float | None, device: str
) -> dict[str, Any]:
    """Work out the plan.

    Args:
        teacher: the teacher's facts.
        student: the student's facts.
        recipe: budgets and batches.
        flops_per_second: the sustained speed of the whole machine; None assumes one for the device.
        device: ``cpu``, ``cuda`` or ``mps``.

    Returns:
        A JSON object: teacher and student sizes, a row per stage, memory, disk, FLOPs and time. Bytes, FLOPs, seconds.
    """
    speed = flops_per_second or ASSUMED_FLOPS_PER_SECOND[device]
    rows = {name: _stage(name, getattr(recipe.stages, name), teacher, student, recipe, speed) for name in STAGES}
    checkpoint = student.num_parameters * FP32_BYTES + rows["distill"]["trainable_parameters"] * ADAM_BYTES
    tokens = sum(row["tokens"] for row in rows.values())
    longest = max(recipe.evaluation.sequence_length, *(row["sequence_length"] for row in rows.values()))
    return {
        "teacher": teacher.to_json(),
        "student": student.to_json(),
        "recipe": recipe.name,
        "device": device,
        "stages": rows,
        "tokens": tokens,
        "steps": sum(row["steps"] for row in rows.values()),
        "flops": sum(row["flops"] for row in rows.values()),
        "assumed_flops_per_second": speed,
        "seconds": sum(row["seconds"] for row in rows.values()),
        "peak_memory_bytes": max(row["memory_bytes"] for row in rows.values()),
        "disk_bytes": {
            "checkpoints": (recipe.checkpoint.keep + 1) * checkpoint,
            "final": student.num_parameters * FP32_BYTES,
            "tokens": tokens * FP32_BYTES,
        },
        "warnings": [*_warnings(teacher, longest), *early_endings(recipe)],
    }


def early_endings(recipe: Recipe) -> list[str]:
    """A line for every stage that may end before its budget is used up."""
    stages = {name: getattr(recipe.stages, name) for name in STAGES}
    return [
        f"stage {name} may saturate: its steps, tokens and time are what it takes at most"
        for name, stage in stages.items()
        if stage.saturation is not None and stage.tokens
    ]


def _warnings(teacher: TeacherSpec, longest: int) -> list[str]:
    if longest <= teacher.max_positions:
        return []
    return [f"sequences of {longest} tokens are longer than the teacher was made for ({teacher.max_positions})"]


def _stage(
    name: str, stage: StageRecipe, teacher: TeacherSpec, student: StudentSpec, recipe: Recipe, speed: float
) -> dict[str, Any]:
    segments = stage.segments()
    tokens = sum(s.num_steps * s.sequence_length * stage.batch_sequences for s in segments)
    trainable = _trainable(name, stage, teacher, student)
    length = max((s.sequence_length for s in segments), default=stage.sequence_length)
    flops = tokens * _flops_per_token(name, length, teacher, student, trainable, recipe)
    return {
        "tokens": tokens,
        "steps": stage.num_steps,
        "sequence_length": length,
        "batch_sequences": stage.batch_sequences,
        "learning_rate": stage.learning_rate,
        "trainable_parameters": trainable,
        "flops": flops,
        "seconds": flops / speed,
        "memory_bytes": _memory(name, length, stage, teacher, student, trainable, recipe) if segments else 0,
    }


def _trainable(name: str, stage: StageRecipe, teacher: TeacherSpec, student: StudentSpec) -> int:
    embedding, head = teacher.embedding_parameters, 0 if teacher.tied else teacher.head_parameters
    if name == "orient":
        heads, state = student.num_heads, student.state_width
        per_layer = 2 * heads * state * (teacher.hidden_size + student.conv_width + 1)
        per_layer += heads * (teacher.hidden_size + student.decay_bias + 1)
        return per_layer * len(student.grafted_layers)
    parts = getattr(stage, "train")  # noqa: B009 - only align and distill have it
    if name == "align" and getattr(stage, "target", None) == "mixer":
        parts = ("mixer",)
    blocks = student.num_parameters - embedding - head - student.mixer_parameters
    if name == "align":
        blocks = blocks * len(student.grafted_layers) // teacher.num_layers
    sizes = {"mixer": student.mixer_parameters, "mlp": blocks, "norm": 0, "embedding": embedding, "head": head}
    return sum(sizes[part] for part in parts)


def _flops_per_token(
    name: str, length: int, teacher: TeacherSpec, student: StudentSpec, trainable: int, recipe: Recipe
) -> float:
    """Two FLOPs per active weight and token forward, four backward; attention and mixing matrices by their length."""
    ends = teacher.embedding_parameters + (0 if teacher.tied else teacher.head_parameters)
    idle = teacher.num_parameters - teacher.active_parameters
    matrix = 2.0 * length * student.num_heads * (2 * teacher.head_width) * 0.5
    trunk = 2.0 * (teacher.active_parameters - ends) + matrix * teacher.num_layers
    if name == "orient":
        pair = 2.0 * length * student.num_heads * (student.state_width + teacher.head_width)
        return trunk + 6.0 * trainable + 3.0 * pair * len(student.grafted_layers)
    scan = 2.0 * student.num_heads * student.head_width * student.state_width * 3 * len(student.grafted_layers)
    passes = 4.0 if recipe.compute.activation_checkpointing else 3.0
    body = 2.0 * (student.num_parameters - idle - ends) + scan
    if name == "align":
        return trunk + passes * body
    return trunk + passes * body + 2.0 * teacher.head_parameters * 4.0


def _memory(
    name: str,
    length: int,
    stage: StageRecipe,
    teacher: TeacherSpec,
    student: StudentSpec,
    trainable: int,
    recipe: Recipe,
) -> int:
    number = 2 if recipe.compute.precision == "bf16" else FP32_BYTES
    chosen = recipe.compute.micro_batch_sequences
    micro = chosen if isinstance(chosen, int) else stage.batch_sequences
    weights = teacher.num_parameters * number + student.num_parameters * FP32_BYTES
    learning = trainable * (FP32_BYTES + ADAM_BYTES)
    layer = micro * length * teacher.hidden_size * ACTIVATIONS_PER_WIDTH * number
    if name == "orient":
        # A band of rows of each matrix with its temporaries, in float32, and the mask that attention sees.
        band = max(BAND_NUMBERS, FEWEST_ROWS * micro * student.num_heads * length)
        return weights + learning + 8 * band * FP32_BYTES + micro * length * length
    if name == "align":
        return weights + learning + layer
    kept = micro * length * teacher.hidden_size * number * teacher.num_layers
    activations = kept + layer if recipe.compute.activation_checkpointing else layer * teacher.num_layers
    logits = LOGIT_COPIES * micro * length * teacher.vocabulary_size * FP32_BYTES
    return weights + learning + activations + logits
