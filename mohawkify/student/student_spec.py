"""The facts of a student: a frozen value, written to the run as JSON. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mohawkify.student.layer_spec import LayerSpec, mixer_layers


@dataclass(frozen=True)
class StudentSpec:
    """The facts of a student.

    Args:
        name: the student's name, also its run folder's.
        model_type: its key in ``config.json``.
        teacher_type: the teacher's key.
        layers: attribute path from the model to its decoder layers.
        attention: attribute of a decoder layer where its mixer stands.
        layer_specs: how each decoder layer mixes its tokens.
        mixer: sizes and options of the mixers, without the heads, which are the layer's.
        packs_by_mask: whether the model is handed a mask with the document borders.
        num_parameters: all parameters of the student.
        mixer_parameters: parameters of all mixers.
        matrix_parameters: those that the matrices of stage 1 are made of; 0 where the mixers have no such matrix.
        state_elements: elements of the constant state of one sequence, convolution inputs included.
        caches: of every layer with kept attention the elements of keys and values per token, and how many tokens its
            cache holds at most; None for all.
    """

    name: str
    model_type: str
    teacher_type: str
    layers: str
    attention: str
    layer_specs: tuple[LayerSpec, ...]
    mixer: dict[str, Any]
    packs_by_mask: bool
    num_parameters: int
    mixer_parameters: int
    matrix_parameters: int
    state_elements: int
    caches: tuple[tuple[int, int | None], ...] = ()

    @property
    def mixer_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a mixer."""
        return mixer_layers(self.layer_specs)

    @property
    def widest_layer(self) -> int:
        """The index of the layer whose mixer has most heads, which stands for all in estimates."""
        return max(self.mixer_layers, key=lambda index: self.layer_specs[index].mixer_heads)

    @property
    def kind(self) -> str:
        """The kind of the mixers."""
        return self.layer_specs[self.mixer_layers[0]].kind

    @property
    def num_heads(self) -> int:
        """Heads of the widest mixer."""
        return self.layer_specs[self.widest_layer].mixer_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.mixer["head_dim"])

    @property
    def state_size(self) -> int:
        """Width of the state per head; 0 for mixers that have no such size."""
        return int(self.mixer.get("state_size", 0))

    def cache_elements(self, length: int) -> int:
        """Elements of the keys and values of kept attention after so many tokens of one sequence."""
        return cache_elements(self.caches, length)

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return asdict(self)

    def mixer_entry(self) -> dict[str, Any]:
        """The ``mixer`` entry of the student's ``config.json``."""
        return {
            "layers": self.layers,
            "attention": self.attention,
            "layer_specs": [layer.to_json() for layer in self.layer_specs],
            "config": dict(self.mixer),
        }


def cache_elements(caches: Iterable[tuple[int, int | None]], length: int) -> int:
    """See `StudentSpec.cache_elements`."""
    return sum(size * min(length, window or length) for size, window in caches)


def memory_text(student: Mapping[str, Any]) -> str:
    """The memory of one sequence in words, from the JSON of a `StudentSpec`."""
    text = f"a state of {student['state_elements']:,} numbers per sequence, whatever its length"
    caches = student.get("caches", ())
    if not caches:
        return text
    first, at_8k = (cache_elements(caches, length) for length in (1, 8192))
    return f"{text}, and keys and values of {first:,} numbers per token ({at_8k:,} at 8,192 tokens)"
