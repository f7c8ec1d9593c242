"""The seam for mixers: what takes the place of a decoder layer's attention. Travels with exported students.

A new kind is one file with a subclass of `Mixer` under `register_mixer`; docs/mixers.md shows one. It imports torch,
transformers, this module and `mohawkify.ops`, and nothing else of mohawkify, because exports carry it.

Shapes: b batch, l length, s source position, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENTRY_POINT_GROUP = "mohawkify.mixers"


@dataclass(frozen=True)
class MixerConfig:
    """Sizes and options of a mixer: the ``mixer.config`` of a student's config.json, with the layer's heads.

    A field with the name of a recipe's key under ``student`` takes its value from there. The fields below come from the
    teacher.

    Args:
        num_heads: heads of the mixer.
        head_dim: width of one.
        out_bias: whether the teacher's output projection has a bias.
        reads_mask: whether document borders and padding are read from the mask of attention, in families whose
            decoder layers do not pass on the keywords for them.
    """

    num_heads: int
    head_dim: int
    out_bias: bool = False
    reads_mask: bool = False


class StateSpec(NamedTuple):
    """One tensor of a mixer's cache.

    Args:
        shape: without the batch.
        is_precise: whether it is at least float32; otherwise it has the precision of the hidden states.
    """

    shape: tuple[int, ...]
    is_precise: bool


class Mixer(nn.Module, ABC):
    """A replacement for a decoder layer's attention module.

    Args:
        hidden_size: model width d.
        config: sizes and options.
        layer_idx: position of the layer, the key into the cache.

    Attributes:
        kind: the name in recipes and in config.json.
        title: the name in model cards.
        config_class: what `config` is.
        starts: functions (mixer, the teacher's `AttentionWeights`, number of decoder layers) that set the start values,
            by ``student.init``; the second argument is on the mixer's device.
        calibration: what fits the mixer to attention on text, a `mohawkify.mixers.calibration.Calibration`, for the
            start ``calibrated``; None where there is none.
        matrix_parameters: the parameters and submodules that `matrix_parts` is made of, which stage 1 trains; none
            where there is no such matrix.
        precise_parameters: patterns of names that stay in float32 in a bfloat16 or quantised student; linear maps among
            them are `PreciseLinear`.
        code: further modules of mohawkify that the mixer imports, and that travel with exports.
        has_mlx: whether exporters/mlx_model.py has a counterpart.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[type[MixerConfig]] = MixerConfig
    starts: ClassVar[Mapping[str, Callable[[Any, Any, int], None]]] = {
        "identity": lambda mixer, weights, num_layers: mixer.reset_parameters()
    }
    calibration: ClassVar[Any] = None
    matrix_parameters: ClassVar[tuple[str, ...]] = ()
    precise_parameters: ClassVar[tuple[str, ...]] = ()
    code: ClassVar[tuple[str, ...]] = ()
    has_mlx: ClassVar[bool] = False

    def __init__(self, hidden_size: int, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size, self.config, self.layer_idx = hidden_size, config, layer_idx

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set start values that need no teacher."""

    @abstractmethod
    def mix(
        self,
        hidden_bld: Tensor,
        states: Mapping[str, Tensor] | None,
        document_starts_bl: Tensor | None,
        keep_bl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map a sequence.

        Args:
            hidden_bld: hidden states after the layer's norm.
            states: the tensors of `state_spec` after the tokens before these; None at the start.
            document_starts_bl: true where a new document begins, across which nothing is mixed.
            keep_bl: 0 at padding, which must not change the states, else 1, in the dtype of the hidden states. In
                every row padding comes after the real tokens, wherever it was.

        Returns:
            The output (b, l, d), and the states after the last token.
        """

    @abstractmethod
    def state_spec(self) -> dict[str, StateSpec]:
        """The tensors that are kept between tokens, by name; every one has the batch in front."""

    @classmethod
    def flops(cls, config: Any, length: int) -> float:
        """FLOPs of one layer per token of a sequence, forward, beyond 2 for every weight; for plans."""
        return 0.0

    def matrix_parts(self, hidden_bld: Tensor, document_starts_bl: Tensor | None = None) -> Any:
        """The `MixingMatrix` that stage 1 compares with attention, or None where the mixer has none."""
        return None

    def decode(self, hidden_bd: Tensor, keep_b: Tensor | None, memory: Any) -> Tensor:
        """Map one token without gradients and update its `RecurrentLayer`."""
        keep_bl = None if keep_b is None else keep_b.to(hidden_bd.dtype).unsqueeze(1)
        output_bld, states = self.mix(
            hidden_bd.unsqueeze(1), memory.states if memory.num_tokens else None, None, keep_bl
        )
        memory.write(states, 1)
        return output_bld[:, 0]

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden states as the attention module did, and update the cache.

        Args:
            hidden_states: (b, l, d).
            attention_mask: the mask that the model built for attention; read only with ``reads_mask``.
            position_ids: (b or 1, l); position 0 starts a document. Read only where the sequence starts afresh.
            past_key_values: a `StudentCache`, or None.
            layer_past: the same under the name that older families use.
            padding_mask: (b, at least l), 0 at padding; its last l columns count.

        Returns:
            The output (b, l, d), and None in place of attention weights.
        """
        hidden_bld = hidden_states
        cache = layer_past if past_key_values is None else past_key_values
        memory: Any = None if cache is None else cache.layers[self.layer_idx]
        continues = memory is not None and memory.num_tokens > 0
        batch, length, _ = hidden_bld.shape
        if padding_mask is None:  # some families' layers keep keywords from their attention
            padding_mask = getattr(cache, "padding_mask", None)
        keep_bl = None if padding_mask is None else padding_mask[:, -length:] != 0
        if memory is not None and length == 1 and not torch.is_grad_enabled():
            return self.decode(hidden_bld[:, 0], None if keep_bl is None else keep_bl[:, 0], memory).unsqueeze(1), None
        document_starts_bl = None if position_ids is None else (position_ids == 0).expand(batch, -1)
        if length > 1 and self.config.reads_mask and attention_mask is not None:
            document_starts_bl, keep_bl = read_mask(attention_mask, batch, length)
        if continues:
            document_starts_bl = None
        order_bl1 = None
        if keep_bl is not None:
            # Padding goes behind the real tokens of its row: nothing that is mixed then reaches over it.
            order_bl = (~keep_bl).int().argsort(dim=1, stable=True)
            if document_starts_bl is not None:
                document_starts_bl = (document_starts_bl & keep_bl).take_along_dim(order_bl, dim=1)
            keep_bl, order_bl1 = keep_bl.take_along_dim(order_bl, dim=1), order_bl.unsqueeze(-1)
            hidden_bld = hidden_bld.take_along_dim(order_bl1, dim=1)
        output_bld, states = self.mix(
            hidden_bld,
            memory.states if continues else None,
            document_starts_bl,
            None if keep_bl is None else keep_bl.to(hidden_bld.dtype),
        )
        if memory is not None:
            memory.write(states, length)
        return output_bld if order_bl1 is None else output_bld.take_along_dim(order_bl1.argsort(dim=1), dim=1), None


class PreciseLinear(nn.Module):
    """A linear map that keeps its precision: transformers' quantisers replace ``nn.Linear``, and no other module.

    Args:
        in_features: width d of its inputs.
        out_features: width f of its outputs.
        bias: whether it has a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., d) to (..., f) in the precision of the weight."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def read_mask(mask: Tensor, batch: int, length: int) -> tuple[Tensor | None, Tensor]:
    """Document borders and padding from the mask that a model built for its attention.

    A token that may not attend to itself is padding; one that may not attend to the real one before starts a document.
    The first token may never attend to the last one, which shows how this mask writes "may not": families differ.

    Args:
        mask: (b or 1, 1, l, s) with any two values, whose last l columns are these tokens; or (b, s), 0 at padding.
        batch: b.
        length: l, at least 2.

    Returns:
        Where documents start (b, l), or None where the mask does not show it, and where tokens are real (b, l).
    """
    if mask.dim() == 2:
        return None, mask[:, -length:] != 0
    allowed_bll = (mask[:, 0, :, -length:] != mask[:, 0, :1, -1:]).expand(batch, -1, -1)
    keep_bl = allowed_bll.diagonal(dim1=1, dim2=2)
    places_bl = torch.arange(1, length + 1, device=mask.device) * keep_bl
    before_bl = F.pad(places_bl.cummax(dim=1).values[:, :-1], (1, 0))  # place of the real token before, from 1
    follows_bl = allowed_bll.take_along_dim((before_bl - 1).clamp_min(0).unsqueeze(2), dim=2).squeeze(2)
    return ~follows_bl | (before_bl == 0), keep_bl


Kind = TypeVar("Kind", bound=type[Mixer])
_KINDS: dict[str, type[Mixer]] = {}


def register_mixer(mixer: Kind) -> Kind:
    """Register a kind of mixer under its name; to be used as a decorator.

    Raises:
        ValueError: another class has that name.
    """
    known = _KINDS.setdefault(mixer.kind, mixer)
    if (known.__module__, known.__qualname__) != (mixer.__module__, mixer.__qualname__):
        raise ValueError(f"found a second mixer of the kind {mixer.kind!r}, {mixer!r} beside {known!r}")
    _KINDS[mixer.kind] = mixer
    return mixer


def mixer_kinds() -> list[str]:
    """The kinds of mixers that are registered here or by installed packages."""
    return sorted({*_KINDS, *metadata.entry_points(group=ENTRY_POINT_GROUP).names})


def mixer_class(kind: str) -> type[Mixer]:
    """The class of a kind; an installed package's is imported by its entry point.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _KINDS:
        for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=kind):
            register_mixer(entry_point.load())
    if kind not in _KINDS:
        raise ValueError(f"found a mixer of the kind {kind!r}, expected one of {', '.join(mixer_kinds())}")
    return _KINDS[kind]


def matrix_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the mixers' matrices are made of, by name."""
    return {
        f"{name}.{own}": parameter
        for name, mixer in mixers_of(student).items()
        for own, parameter in mixer.named_parameters()
        if own.split(".")[0] in mixer.matrix_parameters
    }


def mixers_of(student: nn.Module) -> dict[str, Mixer]:
    """The student's mixers by the names of their modules, in layer order."""
    return {name: module for name, module in student.named_modules() if isinstance(module, Mixer)}
