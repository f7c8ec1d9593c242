"""Design a student from a teacher's facts, and build it with its start values."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mohawkify.errors import RecipeError
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import find_layers
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.ops import dispatch
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.graft import student_classes
from mohawkify.student.layer_spec import ATTENTION, LayerSpec
from mohawkify.student.student_spec import StudentSpec
from mohawkify.student.transfer import copy_kept_weights, start_as_published, start_from_attention
from mohawkify.teacher.teacher_spec import TeacherSpec

NOISE = re.compile(r"dropout|drop$")  # keys of what training drops at random
# Keys of a configuration that name the teacher's class or the file it came from, not the architecture, or that are the
# student's own.
NOT_INHERITED = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "mixer")

# The code that travels with a student computes in plain torch; where mohawkify is installed, kernels are used.
DiscreteMamba2.scan = staticmethod(dispatch.scan)
DiscreteMamba2.step = staticmethod(dispatch.step)


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
        RecipeError: a layer to keep does not exist, or none is left to graft.
    """
    wrong = [index for index in recipe.keep_attention if index >= teacher.num_hidden_layers]
    if wrong:
        raise RecipeError(
            f"student.keep_attention: found layer {wrong[0]}, expected layers 0 to {teacher.num_hidden_layers - 1}"
        )
    heads = teacher.num_attention_heads
    kept, grafted = LayerSpec(ATTENTION, 0, heads), LayerSpec("discrete_mamba2", heads, 0)
    layer_specs = tuple(
        kept if index in recipe.keep_attention else grafted for index in range(teacher.num_hidden_layers)
    )
    if grafted not in layer_specs:
        raise RecipeError("student.keep_attention: found every layer, expected at least one to be grafted")
    width, state = teacher.head_dim, recipe.state_size
    sizes: dict[str, Any] = {
        "layers": adapter.layers,
        "attention": adapter.attention,
        "layer_specs": layer_specs,
        "num_heads": heads,
        "head_dim": width,
        "state_size": state,
        "conv_kernel": recipe.conv_kernel,
        "decay_bias": recipe.decay_bias,
        "out_bias": "out" in teacher.attention_biases,
        "reads_mask": adapter.reads_mask,
    }
    config_class, model_class = classes_for(adapter)
    with torch.device("meta"):
        facts = {**sizes, "layer_specs": [asdict(layer) for layer in layer_specs]}
        modules = model_class(student_config(teacher_config, adapter, facts))
    return StudentSpec(
        name=name,
        model_type=config_class.model_type,
        teacher_type=adapter.model_type,
        **sizes,
        packs_by_mask=adapter.packs_by_mask,
        num_parameters=sum(p.numel() for p in modules.parameters()),
        mixer_parameters=sum(
            p.numel() for m in modules.modules() if isinstance(m, DiscreteMamba2) for p in m.parameters()
        ),
        state_elements=layer_specs.count(grafted)
        * heads
        * (width * state + (recipe.conv_kernel - 1) * (width + 2 * state)),
    )


def build_student(
    teacher: PreTrainedModel, adapter: Adapter, spec: StudentSpec, init: str, seed: int
) -> PreTrainedModel:
    """Build the student in float32 on the teacher's device, with the teacher's tensors and the chosen start.

    Args:
        teacher: the loaded teacher.
        adapter: its family.
        spec: the student's facts.
        init: ``attention`` or ``identity``.
        seed: of the random start values.

    Returns:
        The student, every parameter trainable, in evaluation mode: it learns targets that were computed without
        dropout and router noise.
    """
    _, model_class = classes_for(adapter)
    torch.manual_seed(seed)
    student = model_class(student_config(teacher.config, adapter, spec.mixer_config())).float()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.generation_config.use_cache = True
    copy_kept_weights(teacher, student, adapter, spec.mixer_layers)
    if init == "attention":
        start_from_attention(teacher, student, adapter, spec.mixer_layers)
    else:
        start_as_published(student, spec.layers, spec.attention, spec.mixer_layers)
    return student.to(teacher.device).eval()


def use_kernels(student: nn.Module, kernels: str) -> None:
    """Let a student's mixers compute by the implementation of a recipe's ``compute.kernels``; see `ops.backend`."""
    for mixer in mixers_of(student):
        mixer.scan = partial(dispatch.scan, kernels=kernels)
        mixer.step = partial(dispatch.step, kernels=kernels)


def mixers_of(student: nn.Module) -> list[DiscreteMamba2]:
    """The student's mixers in layer order."""
    return [module for module in student.modules() if isinstance(module, DiscreteMamba2)]
