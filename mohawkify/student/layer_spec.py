"""How the decoder layers of a student mix their tokens. Travels with exported students; no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTENTION = "attention"


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    Args:
        kind: kind of its mixer, or ``attention`` where it keeps the teacher's.
        mixer_heads: heads of the mixer; 0 where the layer keeps its attention.
        attention_heads: heads of the teacher's attention that are kept; 0 where a mixer replaces it.

    Raises:
        ValueError: a layer of both, which is not supported yet, or of neither.
    """

    kind: str
    mixer_heads: int
    attention_heads: int

    def __post_init__(self) -> None:
        is_mixer = self.mixer_heads > 0
        if is_mixer == (self.attention_heads > 0) or is_mixer == (self.kind == ATTENTION):
            raise ValueError(
                f"found a layer of kind {self.kind} with {self.mixer_heads} mixer heads and {self.attention_heads}"
                " attention heads, expected heads of a mixer or heads of attention: a layer cannot have both yet"
            )


def read_layer_specs(mixer: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The layers in the ``mixer`` entry of a student's config.json."""
    return tuple(LayerSpec(**layer) for layer in mixer["layer_specs"])


def mixer_layers(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Indices of the layers with a mixer."""
    return tuple(index for index, layer in enumerate(layers) if layer.mixer_heads)
