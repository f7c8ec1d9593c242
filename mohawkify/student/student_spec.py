"""The facts of a student: a frozen value, written to the run as JSON. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mohawkify.student.layer_spec import LayerSpec, mixer_layers


@dataclass(frozen=True)
class StudentSpec:
    """The facts of a student: which layers are grafted and the sizes of their mixers.

    Args:
        name: the student's name, also its run folder's.
        model_type: its key in ``config.json``.
        teacher_type: the teacher's key.
        layers: attribute path from the model to its decoder layers.
        attention: attribute of a decoder layer where the mixer stands.
        layer_specs: how each decoder layer mixes its tokens.
        num_heads: heads per mixer.
        head_dim: width of x, z and y per head.
        state_size: width of B and C per head.
        conv_kernel: taps of the convolutions.
        decay_bias: whether a_log has a learned bias.
        out_bias: whether the output projection has a bias.
        reads_mask: whether mixers read document borders and padding from the mask of attention.
        packs_by_mask: whether the model is handed a mask with the document borders.
        num_parameters: all parameters of the student.
        mixer_parameters: parameters of all mixers.
        state_elements: numbers in the constant state of one sequence, convolution tails included.
    """

    name: str
    model_type: str
    teacher_type: str
    layers: str
    attention: str
    layer_specs: tuple[LayerSpec, ...]
    num_heads: int
    head_dim: int
    state_size: int
    conv_kernel: int
    decay_bias: bool
    out_bias: bool
    reads_mask: bool
    packs_by_mask: bool
    num_parameters: int
    mixer_parameters: int
    state_elements: int

    @property
    def mixer_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a mixer."""
        return mixer_layers(self.layer_specs)

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return asdict(self)

    def mixer_config(self) -> dict[str, Any]:
        """The ``mixer`` entry of the student's ``config.json``."""
        return {
            "layers": self.layers,
            "attention": self.attention,
            "layer_specs": [asdict(layer) for layer in self.layer_specs],
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "state_size": self.state_size,
            "conv_kernel": self.conv_kernel,
            "decay_bias": self.decay_bias,
            "out_bias": self.out_bias,
            "reads_mask": self.reads_mask,
        }
