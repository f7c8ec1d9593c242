"""Tiny random teachers made on the fly, with the oddities of their families switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mohawkify.data.packing import Batch
from mohawkify.families.adapter import Adapter
from mohawkify.families.decoder_layers import attention_implementation
from mohawkify.families.registry import load_adapter
from mohawkify.mixers.kinds import mixers_of
from mohawkify.objectives.objective import TeacherStudent
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.teacher.resolve import resolve_teacher

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
# Families that tests of the parts run through; tests/families/test_adapters.py runs through all of them.
FAMILIES = ("llama", "qwen2", "qwen3")


def tiny_config(family: str, **changes: Any) -> Any:
    """A small configuration of a family with its oddities switched on."""
    adapter = load_adapter(family)
    return getattr(transformers, adapter.config_class)(**{**COMMON, **adapter.tiny_config, **changes})


def tiny_teacher(family: str, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """A frozen random teacher; every tensor is random, biases and norms too. The same weights for every call."""
    model_class = getattr(transformers, load_adapter(family).model_class)
    config = tiny_config(family, **changes)
    implementation = attention or attention_implementation(model_class, config)
    return randomise(model_class._from_config(config, attn_implementation=implementation))


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a model with random tensors, the weights of norms around 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.0 + 0.2 * noise if is_norm and name == "weight" else 0.3 * noise)
    return model.eval().requires_grad_(False)


def save_teacher(teacher: PreTrainedModel, folder: Path) -> Path:
    """Write a teacher as a folder, without a tokenizer."""
    teacher.save_pretrained(folder)
    return folder


def tiny_pair(
    family: str, folder: Path, init: str = "attention", student: dict[str, Any] | None = None, **changes: Any
) -> TeacherStudent:
    """A random teacher and its student."""
    teacher = tiny_teacher(family, **changes)
    save_teacher(teacher, folder)
    inspection = resolve_teacher(str(folder))
    adapter: Adapter = inspection.adapter
    recipe = StudentRecipe(**{"state_size": 16, "init": init, **(student or {})})
    spec = design_student("tiny", inspection.spec, inspection.config, adapter, recipe)
    return TeacherStudent(teacher, build_student(teacher, adapter, spec, init, seed=0), spec, adapter)


def stir(student: PreTrainedModel) -> PreTrainedModel:
    """Move the mixers' parameters off their start, where convolutions are the identity and hide their faults."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mixer in mixers_of(student).values():
            for parameter in mixer.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


def packed(length: int = 24, batch: int = 2, borders: tuple[int, ...] = (0, 9, 10), vocabulary: int = 97) -> Batch:
    """Random tokens with document borders at the given positions in every row."""
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))
    positions = torch.zeros(length, dtype=torch.long)
    for t in range(length):
        positions[t] = 0 if t in borders else positions[t - 1] + 1
    return Batch(ids, positions.expand(batch, -1).clone(), torch.ones_like(ids, dtype=torch.bool))
