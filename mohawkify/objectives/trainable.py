"""Which parameters a stage trains: chosen by part, so that everything else is out of the optimiser's reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mohawkify.families.decoder_layers import find_layers
from mohawkify.mixers.kinds import mixers_of
from mohawkify.student.student_spec import StudentSpec


def part_of_parameters(student: PreTrainedModel, spec: StudentSpec) -> dict[str, str]:
    """Map every parameter of the student to its part.

    Args:
        student: the student; a tied head counts as embedding, and so do learned positions.
        spec: its facts.

    Returns:
        Parameter name to ``mixer``, ``attention`` (what is kept of it), ``norm``, ``mlp``, ``embedding`` or ``head``.
    """
    owner = dict(student.named_modules())
    head = student.get_output_embeddings()
    places = [f"{spec.layers}.{index}.{spec.attention}." for index in range(len(find_layers(student, spec.layers)))]
    beside = tuple(f"{place}attention." for place, layer in zip(places, spec.layer_specs, strict=True) if layer.heads)
    grafted = tuple(places[index] for index in spec.mixer_layers)
    parts: dict[str, str] = {}
    for name, _ in student.named_parameters():
        module = owner[name.rpartition(".")[0]]
        if name.startswith(grafted) and not name.startswith(beside):
            parts[name] = "mixer"
        elif isinstance(module, nn.Embedding):
            parts[name] = "embedding"
        elif module is head:
            parts[name] = "head"
        elif "norm" in type(module).__name__.lower():
            parts[name] = "norm"
        else:
            parts[name] = "attention" if name.startswith(tuple(places)) else "mlp"
    return parts


def trainable_parameters(student: PreTrainedModel, spec: StudentSpec, parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the given parts by name; with ``mlp``, the attention that a hybrid keeps trains too."""
    wanted = set(parts)
    if "mlp" in wanted:
        wanted.add("attention")
    part_of = part_of_parameters(student, spec)
    return {name: parameter for name, parameter in student.named_parameters() if part_of[name] in wanted}


def layer_parameters(student: PreTrainedModel, spec: StudentSpec, parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """As `trainable_parameters`, but only inside the grafted layers: what a layer-wise stage can reach."""
    prefixes = tuple(f"{spec.layers}.{index}." for index in spec.mixer_layers)
    return {n: p for n, p in trainable_parameters(student, spec, parts).items() if n.startswith(prefixes)}


def mixers_by_layer(student: nn.Module, spec: StudentSpec) -> dict[int, Any]:
    """The student's mixers."""
    return dict(zip(spec.mixer_layers, mixers_of(student).values(), strict=True))


def mixing_modules(model: nn.Module, spec: StudentSpec) -> dict[int, Any]:
    """The modules at the attention's place in the grafted layers: mixers, also beside attention, or a teacher's own."""
    layers = find_layers(model, spec.layers)
    return {index: getattr(layers[index], spec.attention) for index in spec.mixer_layers}
