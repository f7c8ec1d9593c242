"""Graft, don't fork: a transformers model with mixers in place of attention in chosen layers.

This file, the mixer, the cache and its operators travel with every exported student, so that it loads without
mohawkify. They import nothing but each other, torch and transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mohawkify.families.decoder_layers import attention_implementation, find_layers
from mohawkify.mixers.attention_heads import MixerBesideAttention, cut_heads, narrow
from mohawkify.mixers.mixer import Mixer, mixer_class
from mohawkify.student.cache import StudentCache, require_states
from mohawkify.student.layer_spec import mixer_layers, read_layer_specs


def graft_mixers(model: nn.Module, config: Any) -> None:
    """Put a mixer in place of the attention module of every grafted layer, or beside the heads that it keeps.

    Args:
        model: a causal language model of transformers.
        config: its configuration; ``config.mixer`` has the paths of the layers and their attention, the layers'
            specifications and the mixers' sizes and options.
    """
    mixer = config.mixer
    layers = find_layers(model, mixer["layers"])
    specs = read_layer_specs(mixer)
    for index, spec in enumerate(specs):
        old = getattr(layers[index], mixer["attention"])
        if spec.window is not None:
            narrow(old, spec.window)
        if not spec.mixer_heads:
            continue
        kind, reference = mixer_class(spec.kind), next(old.parameters())
        with reference.device:
            sizes = kind.config_class(num_heads=spec.mixer_heads, **mixer["config"])
            new: nn.Module = kind(config.hidden_size, sizes, index).to(reference.dtype)
        if spec.heads:
            cut_heads(old, spec.heads, sizes.head_dim)
            new = MixerBesideAttention(new, old)
        setattr(layers[index], mixer["attention"], new)


def precise_parameters(mixer: Mapping[str, Any]) -> set[str]:
    """Patterns of the parameters that stay in float32 in a student with this ``mixer`` entry in its config.json."""
    specs = read_layer_specs(mixer)
    kinds = {specs[index].kind for index in mixer_layers(specs)}
    return {pattern for kind in kinds for pattern in mixer_class(kind).precise_parameters}


if TYPE_CHECKING:
    from transformers import PreTrainedModel as TeacherModel
else:
    TeacherModel = object  # the second base brings it


class GraftedModel(TeacherModel):
    """The additions of a student to its teacher's class: the first base; the teacher's causal class is the second.

    Its forward is `grafted_forward` of the second.
    """

    _is_stateful = True  # a recurrent state cannot be rolled back: assisted decoding refuses cleanly

    def __init__(self, config: Any) -> None:
        if config._attn_implementation in (None, "sdpa"):  # what transformers takes by itself
            config._attn_implementation = attention_implementation(type(self), config)
        super().__init__(config)
        graft_mixers(self, config)
        precise = {*(self._keep_in_fp32_modules_strict or ()), *precise_parameters(config.mixer)}
        self._keep_in_fp32_modules_strict = precise
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mixer):
            if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StudentCache(self.config)


def grafted_forward(model_class: Any) -> Callable[..., Any]:
    """A student's forward: its teacher's, with a cache that holds states, and with the padding mask handed on.

    It shows the signature of the teacher's: generate and Trainer hand over only what they find named there, such as
    ``logits_to_keep`` and ``labels``.

    Args:
        model_class: the teacher's causal language model class.
    """
    teacher_forward = model_class.forward
    names = tuple(inspect.signature(teacher_forward).parameters)[1:]

    @functools.wraps(teacher_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = self.config.use_cache and not self.training
        if kwargs.get("past_key_values") is not None:
            require_states(kwargs["past_key_values"], self.config)
        elif kwargs["use_cache"]:
            kwargs["past_key_values"] = StudentCache(self.config)
        mask = kwargs.get("attention_mask")
        padding_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        kwargs["padding_mask"] = padding_mask
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"].padding_mask = padding_mask
        return teacher_forward(self, **kwargs)

    return forward


def student_classes(config_class: Any, model_class: Any) -> tuple[Any, Any]:
    """The student's configuration and model class for a teacher family.

    Args:
        config_class: the teacher's configuration class.
        model_class: the teacher's causal language model class.

    Returns:
        ``Mohawk...Config`` with the type ``mohawk_<teacher type>``, and ``Mohawk...ForCausalLM``.
    """
    student_config = type(
        f"Mohawk{config_class.__name__}", (config_class,), {"model_type": f"mohawk_{config_class.model_type}"}
    )
    student_model = type(
        f"Mohawk{model_class.__name__}",
        (GraftedModel, model_class),
        {"config_class": student_config, "forward": grafted_forward(model_class)},
    )
    return student_config, student_model
