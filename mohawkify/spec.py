"""What the teacher is and what the student will be: frozen values, written to the run as JSON. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TeacherSpec:
    """The facts of a teacher that conversion needs, read from its configuration and its modules on the meta device.

    Args:
        source: the folder, file or Hub id as the user gave it.
        model_type: transformers' key of the family.
        num_layers: decoder layers.
        hidden_size: model width.
        num_heads: query heads per layer.
        num_key_heads: key and value heads per layer.
        head_width: width of a query head.
        vocabulary_size: rows of the embedding.
        max_positions: the longest sequence the teacher was made for, in tokens.
        tied: whether head and embedding are one tensor.
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
    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_heads: int
    head_width: int
    vocabulary_size: int
    max_positions: int
    tied: bool
    num_parameters: int
    active_parameters: int
    embedding_parameters: int
    head_parameters: int
    attention_parameters: int
    attention_biases: tuple[str, ...]
    layer_types: tuple[str, ...]
    sliding_window: int | None

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class StudentSpec:
    """The facts of a student: which layers are grafted and the sizes of their mixers.

    Args:
        name: the student's name, also its run folder's.
        model_type: its key in ``config.json``.
        teacher_type: the teacher's key.
        layers: attribute path from the model to its decoder layers.
        attention: attribute of a decoder layer where the mixer stands.
        grafted_layers: layers whose attention becomes a mixer; the others keep theirs.
        num_heads: heads per mixer.
        head_width: width of x, z and y per head.
        state_width: width of B and C per head.
        conv_width: taps of the convolutions.
        decay_bias: whether a_log has a learned bias.
        out_bias: whether the output projection has a bias.
        reads_mask: whether mixers read document borders and padding from the mask of attention.
        packs_by_mask: whether the model is handed a mask with the document borders.
        num_parameters: all parameters of the student.
        mixer_parameters: parameters of all mixers.
        state_numbers: numbers in the constant state of one sequence, convolution tails included.
    """

    name: str
    model_type: str
    teacher_type: str
    layers: str
    attention: str
    grafted_layers: tuple[int, ...]
    num_heads: int
    head_width: int
    state_width: int
    conv_width: int
    decay_bias: bool
    out_bias: bool
    reads_mask: bool
    packs_by_mask: bool
    num_parameters: int
    mixer_parameters: int
    state_numbers: int

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return asdict(self)

    def mixer_config(self) -> dict[str, Any]:
        """The ``mixer`` entry of the student's ``config.json``."""
        return {
            "layers": self.layers,
            "attention": self.attention,
            "grafted_layers": list(self.grafted_layers),
            "num_heads": self.num_heads,
            "head_width": self.head_width,
            "state_width": self.state_width,
            "conv_width": self.conv_width,
            "decay_bias": self.decay_bias,
            "out_bias": self.out_bias,
            "reads_mask": self.reads_mask,
        }
