"""Which parameters a stage trains: chosen by part, so that everything else is out of the optimiser's reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mohawkify.student.grafting import find_layers
from mohawkify.student.mixer import DiscreteMamba2

# What a mixing matrix is made of; x, z and the output projection have no part in it.
MIXING = ("b_proj", "c_proj", "decay_proj", "b_conv", "c_conv", "d")


def part_of_parameters(student: PreTrainedModel, layers: str) -> dict[str, str]:
    """Say for every parameter of the student which part it belongs to.

    Args:
        student: the student; a tied head counts as embedding.
        layers: attribute path to its decoder layers.

    Returns:
        Parameter name to ``mixer``, ``attention`` (kept layers), ``norm``, ``mlp``, ``embedding`` or ``head``.
    """
    parts: dict[str, str] = {}
    owner = dict(student.named_modules())
    mixers = [name for name, module in owner.items() if isinstance(module, DiscreteMamba2)]
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    for name, parameter in student.named_parameters():
        module = owner[name.rpartition(".")[0]]
        if any(name.startswith(f"{mixer}.") for mixer in mixers):
            parts[name] = "mixer"
        elif parameter is embedding.weight:
            parts[name] = "embedding"
        elif head is not None and module is head:
            parts[name] = "head"
        elif "norm" in type(module).__name__.lower():
            parts[name] = "norm"
        elif name.startswith(f"{layers}.") and "attn" in name.removeprefix(f"{layers}.").split(".")[1]:
            parts[name] = "attention"
        else:
            parts[name] = "mlp"
    return parts


def trainable_parameters(student: PreTrainedModel, layers: str, parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the given parts by name; with ``mlp``, the attention that a hybrid keeps trains too."""
    wanted = set(parts)
    if "mlp" in wanted:
        wanted.add("attention")
    part_of = part_of_parameters(student, layers)
    return {name: parameter for name, parameter in student.named_parameters() if part_of[name] in wanted}


def layer_parameters(
    student: PreTrainedModel, layers: str, grafted_layers: tuple[int, ...], parts: Iterable[str]
) -> dict[str, nn.Parameter]:
    """As `trainable_parameters`, but only inside the grafted layers: what a layer-wise stage can reach."""
    prefixes = tuple(f"{layers}.{index}." for index in grafted_layers)
    return {n: p for n, p in trainable_parameters(student, layers, parts).items() if n.startswith(prefixes)}


def mixing_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a mixing matrix is made of."""
    found = {}
    for name, module in student.named_modules():
        if isinstance(module, DiscreteMamba2):
            for own, parameter in module.named_parameters():
                if own.split(".")[0] in MIXING:
                    found[f"{name}.{own}"] = parameter
    return found


def mixers_by_layer(model: nn.Module, layers: str, attention: str, grafted_layers: tuple[int, ...]) -> dict[int, Any]:
    """The modules at the attention's place in the grafted layers."""
    stack = find_layers(model, layers)
    return {index: getattr(stack[index], attention) for index in grafted_layers}
