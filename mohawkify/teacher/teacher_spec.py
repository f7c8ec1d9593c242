"""The facts of a teacher: a frozen value, written to the run as JSON. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mohawkify.errors import RecipeError


@dataclass(frozen=True)
class TeacherSpec:
    """The facts of a teacher that conversion needs, read from its configuration and its modules on the meta device.

    Args:
        source: the folder, file or Hub id as the user gave it.
        model_type: transformers' key of the family.
        num_hidden_layers: decoder layers.
        hidden_size: model width.
        num_attention_heads: query heads per layer.
        num_key_value_heads: key and value heads per layer.
        head_dim: width of a query head.
        vocab_size: rows of the embedding.
        max_position_embeddings: the longest sequence the teacher was made for, in tokens.
        longest_sequence: the longest sequence that it can compute, where its positions are learned; else None.
        tie_word_embeddings: whether head and embedding are one tensor.
        num_parameters: all parameters, shared ones once.
        active_parameters: those that one token meets; less than all where a router chooses among experts.
        embedding_parameters: of the embedding, learned positions included.
        head_parameters: of the head, also where it is the embedding's tensor.
        attention_parameters: parameters of all attention modules.
        attention_biases: the attention projections that have a bias: ``query``, ``key``, ``value``, ``out``.
        layer_types: the kind of attention in each layer, such as ``full_attention`` or ``sliding_attention``.
        sliding_window: window of the sliding layers in tokens, if any.
    """

    source: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    longest_sequence: int | None
    tie_word_embeddings: bool
    num_parameters: int
    active_parameters: int
    embedding_parameters: int
    head_parameters: int
    attention_parameters: int
    attention_biases: tuple[str, ...]
    layer_types: tuple[str, ...]
    sliding_window: int | None

    def window_of(self, layer: int) -> int | None:
        """The window of a layer's attention in tokens; None where it attends to everything."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def require_length(self, key: str, length: int) -> None:
        """Refuse a recipe's sequences that are longer than it can compute; raises RecipeError.

        Args:
            key: where the recipe says so.
            length: tokens per sequence.
        """
        if self.longest_sequence is not None and length > self.longest_sequence:
            raise RecipeError(
                f"{key}: found {length:,}, expected at most {self.longest_sequence:,}, the learned positions of"
                f" {self.source}"
            )

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return asdict(self)
