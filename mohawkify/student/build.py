"""Design a student from a teacher's facts, and build it with its start values."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, fields, replace
from math import prod
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mohawkify.errors import RecipeError, did_you_mean
from mohawkify.families.adapter import Adapter, AttentionWeights
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.mixers.attention_heads import cut_heads
from mohawkify.mixers.kinds import matrix_parameters, mixer_class, mixer_kinds, mixers_of
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.graft import student_classes
from mohawkify.student.keep import caches_of, design_layers
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.teacher_spec import TeacherSpec

NOISE = re.compile(r"dropout|drop$")  # keys of what training drops at random
# Keys of a configuration that name the teacher's class or the file it came from, not the architecture, or that are the
# student's own.
NOT_INHERITED = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "mixer")

# Keys under `student` that are options of mixers, for those whose configuration has a field of that name.
MIXER_OPTIONS = ("state_size", "conv_kernel", "decay_bias", "write", "conv_activation", "gated_norm")


def classes_for(adapter: Adapter) -> tuple[Any, Any]:
    """The student's configuration and model class for a family."""
    return student_classes(getattr(transformers, adapter.config_class), getattr(transformers, adapter.model_class))


def student_config(teacher_config: PretrainedConfig, adapter: Adapter, mixer: dict[str, Any]) -> PretrainedConfig:
    """The teacher's configuration under the student's type, with the mixer's facts."""
    values = {key: value for key, value in teacher_config.to_dict().items() if key not in NOT_INHERITED}
    values["use_cache"] = True  # a teacher that was saved in training has it off: every token would cost a whole pass
    config_class, _ = classes_for(adapter)
    return config_class(**_without_noise(values), mixer=mixer)


def checkpoint_activations(student: PreTrainedModel, layers: str) -> None:
    """Let every decoder layer keep only its input, and compute the rest again when its gradients are due.

    transformers does so in training mode only; the layers are put into it, the modules inside them are not.

    Args:
        student: the student.
        layers: attribute path to its decoder layers.
    """
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in find_layers(student, layers):
        layer.training = True


def _without_noise(values: dict[str, Any]) -> dict[str, Any]:
    """Set dropout to 0: the student learns targets that were computed without it."""
    quiet: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            quiet[key] = _without_noise(value)
        elif isinstance(value, float) and NOISE.search(key):
            quiet[key] = 0.0
        else:
            quiet[key] = value
    return quiet


def design_student(
    name: str, teacher: TeacherSpec, teacher_config: PretrainedConfig, adapter: Adapter, recipe: StudentRecipe
) -> StudentSpec:
    """Decide what the student is; its parameters are counted on the meta device.

    Raises:
        RecipeError: a layer or head to keep does not exist or cannot be kept, none is left to graft, or the mixer, its
            start or one of its options does not exist.
    """
    mixer = _mixer_config(teacher, adapter, recipe)
    layer_specs = design_layers(teacher, adapter, recipe)
    config_class, model_class = classes_for(adapter)
    spec = StudentSpec(
        name=name,
        model_type=config_class.model_type,
        teacher_type=adapter.model_type,
        layers=adapter.layers,
        attention=adapter.attention,
        layer_specs=layer_specs,
        mixer=mixer,
        packs_by_mask=adapter.packs_by_mask,
        num_parameters=0,
        mixer_parameters=0,
        matrix_parameters=0,
        state_elements=0,
        caches=caches_of(layer_specs, teacher),
    )
    with torch.device("meta"):
        try:
            modules = model_class(student_config(teacher_config, adapter, spec.mixer_entry()))
        except ValueError as error:  # of heads that the family's attention cannot do without
            raise RecipeError(f"student.keep.heads: {error}", hint="student.keep.layers keeps whole layers") from error
    mixers = mixers_of(modules).values()
    return replace(
        spec,
        num_parameters=sum(p.numel() for p in modules.parameters()),
        mixer_parameters=sum(p.numel() for mixer in mixers for p in mixer.parameters()),
        matrix_parameters=sum(p.numel() for p in matrix_parameters(modules).values()),
        state_elements=sum(prod(state.shape) for mixer in mixers for state in mixer.state_spec().values()),
    )


def _mixer_config(teacher: TeacherSpec, adapter: Adapter, recipe: StudentRecipe) -> dict[str, Any]:
    """The sizes and options of the recipe's mixer, without the heads, which are the layer's."""
    try:
        kind = mixer_class(recipe.mixer)
    except ValueError as error:
        guess = did_you_mean(recipe.mixer, mixer_kinds())
        raise RecipeError(f"student.mixer: {error}{guess}") from error
    if recipe.start not in kind.starts:
        raise RecipeError(
            f"student.init: found {recipe.start}, expected one of {', '.join(kind.starts)} for {kind.title}"
        )
    values: dict[str, Any] = {
        "num_heads": teacher.num_attention_heads,
        "head_dim": teacher.head_dim,
        "out_bias": "out" in teacher.attention_biases,
        "reads_mask": adapter.reads_mask,
    }
    options = {field.name for field in fields(kind.config_class)}
    for key in MIXER_OPTIONS:
        value = getattr(recipe, key)
        if key in options and value is not None:
            values[key] = value
        elif key not in options and value != StudentRecipe.model_fields[key].default:
            raise RecipeError(f"student.{key}: found {value}, but {kind.title} has no such option")
    built = kind.config_class(**values)
    reason = kind.calibration.refuse(built) if recipe.start == "calibrated" and kind.calibration else None
    if reason:
        raise RecipeError(f"student.init: found calibrated, which {reason}", hint="student.init: attention")
    config = asdict(built)
    del config["num_heads"]
    return config


def mixer_flops(spec: StudentSpec, length: int) -> float:
    """`Mixer.flops` of all the student's layers."""
    kind, layers = mixer_class(spec.kind), [spec.layer_specs[index] for index in spec.mixer_layers]
    return sum(kind.flops(kind.config_class(num_heads=layer.mixer_heads, **spec.mixer), length) for layer in layers)


def build_student(
    teacher: PreTrainedModel, adapter: Adapter, spec: StudentSpec, init: str, seed: int
) -> PreTrainedModel:
    """Build the student in float32 on the teacher's device, with the teacher's tensors and the chosen start.

    Args:
        teacher: the loaded teacher.
        adapter: its family.
        spec: the student's facts.
        init: a start of its mixers, as `design_student` has checked.
        seed: of the random start values.

    Returns:
        The student, every parameter trainable, in evaluation mode: it learns targets that were computed without
        dropout and router noise.
    """
    _, model_class = classes_for(adapter)
    torch.manual_seed(seed)
    student = model_class(student_config(teacher.config, adapter, spec.mixer_entry())).float()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.generation_config.use_cache = True
    _copy_kept_weights(teacher, student, spec)
    attentions, stack = find_layers(teacher, spec.layers), find_layers(student, spec.layers)
    for index, mixer in zip(spec.mixer_layers, mixers_of(student).values(), strict=True):
        layer, attention = spec.layer_specs[index], getattr(attentions[index], spec.attention)
        weights = read_attention(adapter, attention).of_heads(layer.replaced_heads)
        mixer.starts[init](mixer, float_on(next(mixer.parameters()).device, weights), len(stack))
        if layer.heads:
            kept = copy.deepcopy(attention)
            cut_heads(kept, layer.heads, spec.head_dim)
            getattr(stack[index], spec.attention).attention.load_state_dict(kept.state_dict())
    return student.to(teacher.device).eval()


@torch.no_grad()
def _copy_kept_weights(teacher: nn.Module, student: nn.Module, spec: StudentSpec) -> None:
    """Copy every tensor of the teacher, buffers too, but those of the replaced attention modules.

    The names of those are left alone even where a mixer's are the same: some families call their output projection
    ``out_proj`` or ``c_proj`` too.
    """
    replaced = tuple(f"{spec.layers}.{index}.{spec.attention}." for index in spec.mixer_layers)
    target = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(replaced):
            target[name].copy_(tensor)


def float_on(device: torch.device, weights: AttentionWeights) -> AttentionWeights:
    """The weights in float32 on the mixer's device: a student is built on the CPU, its teacher may be on a GPU.

    The CPU also has the decompositions of the starts, which not every accelerator has.
    """
    moved: dict[str, Any] = {
        name: tensor.detach().to(device, torch.float32)
        for name, tensor in vars(weights).items()
        if isinstance(tensor, Tensor)
    }
    return replace(weights, **moved)
