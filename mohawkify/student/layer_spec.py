"""How the decoder layers of a student mix their tokens. Travels with exported students; no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ATTENTION = "attention"


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    Args:
        kind: kind of its mixer, or ``attention`` where it has none.
        mixer_heads: heads of the mixer; 0 where the layer keeps its attention.
        attention_heads: heads of the teacher's attention that are kept; 0 where a mixer replaces all of them.
        heads: the numbers of the kept heads where a mixer replaces the others.
        window: how many tokens kept attention reaches back to, the current one included; None for all that the
            teacher's does.

    Raises:
        ValueError: a layer without heads, or whose numbers do not fit each other.
    """

    kind: str
    mixer_heads: int
    attention_heads: int
    heads: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        is_mixer, is_attention = self.mixer_heads > 0, self.attention_heads > 0
        listed = self.attention_heads if is_mixer else 0
        if not (is_mixer or is_attention) or is_mixer == (self.kind == ATTENTION) or len(self.heads) != listed:
            raise ValueError(
                f"found a layer of kind {self.kind} with {self.mixer_heads} mixer heads, {self.attention_heads}"
                f" attention heads and {len(self.heads)} numbers of these, expected heads of a mixer, of attention, or"
                " of both and the numbers of the kept ones"
            )
        total = self.mixer_heads + self.attention_heads
        if sorted({*self.heads}) != [*self.heads] or not all(0 <= head < total for head in self.heads):
            raise ValueError(f"found kept heads {list(self.heads)}, expected numbers below {total} in ascending order")
        if self.window is not None and self.window < 1:
            raise ValueError(f"found a window of {self.window} tokens, expected at least 1")

    def to_json(self) -> dict[str, Any]:
        """The layer as a JSON object."""
        return {**asdict(self), "heads": list(self.heads)}

    @property
    def replaced_heads(self) -> tuple[int, ...]:
        """The numbers of the teacher's heads that the mixer replaces."""
        total = self.mixer_heads + len(self.heads)
        return tuple(head for head in range(total) if head not in self.heads)


def read_layer_specs(mixer: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The layers in the ``mixer`` entry of a student's config.json."""
    return tuple(LayerSpec(**layer) for layer in mixer["layer_specs"])


def mixer_layers(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Indices of the layers with a mixer."""
    return tuple(index for index, layer in enumerate(layers) if layer.mixer_heads)
