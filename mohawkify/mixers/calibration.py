"""The seam for starts in closed form: sums over text and one solution after each pass, instead of gradients.

Shapes: b batch, h query heads, l target position, s source position, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohawkify.families.adapter import AttentionWeights

# Of the sums of one pass over the text. More layers than these allow are fitted one group after the other.
MAX_SUMS_BYTES = 2 << 30


@dataclass(frozen=True)
class PassCost:
    """What a pass takes in one layer, for plans: an estimate.

    Args:
        share: of the text that it reads.
        sums_bytes: of what it adds up.
        flops: per token, for the sums; the teacher's forward pass comes on top.
        working_bytes: per sequence, while a batch is added.
    """

    share: float
    sums_bytes: int
    flops: float
    working_bytes: int


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention that a mixer replaces, in the teacher's own forward pass.

    Args:
        hidden_bld: its input.
        probabilities_bhls: the attention matrices of the heads that the mixer replaces, in at least float32.
        output_bld: its output.
        document_starts_bl: true where a new document begins.
        call_mixer: calls the mixer on the same input and with the same further arguments.
        beside_bhls: the attention matrices of the heads that are kept beside the mixer; None where there are none.
    """

    hidden_bld: Tensor
    probabilities_bhls: Tensor
    output_bld: Tensor
    document_starts_bl: Tensor
    call_mixer: Callable[[], Any]
    beside_bhls: Tensor | None = None


@dataclass(frozen=True)
class HeadsBeside:
    """The heads of attention beside a mixer.

    Args:
        weights: their projections, on the mixer's device in float32.
        out_proj: the student's output projection of these heads, which the fit changes.
    """

    weights: AttentionWeights
    out_proj: nn.Linear


class Calibration(ABC):
    """Fits one mixer to the attention that it replaces.

    Args:
        mixer: the mixer, whose start it sets.
        weights: the projections of the heads that it replaces, on the mixer's device in float32.
        beside: the heads of attention that are kept beside the mixer; None where there are none.

    Attributes:
        passes: the passes over text in order, each with the share of the text that it reads.
        sums: what the current pass adds up. It may be added up over processes, before `solve`.
    """

    passes: ClassVar[Mapping[str, float]]

    def __init__(self, mixer: Any, weights: AttentionWeights, beside: HeadsBeside | None = None) -> None:
        self.mixer, self.weights, self.beside = mixer, weights, beside
        self.sums: dict[str, Tensor] = {}

    @classmethod
    def refuse(cls, config: Any) -> str | None:
        """The reason why mixers with these options cannot be calibrated, as the end of a sentence; None if they can."""
        return None

    @classmethod
    def costs(cls, attention: tuple[int, int, int], hidden_size: int, length: int) -> list[PassCost]:
        """What every pass takes, as far as plans know it.

        Args:
            attention: query heads, key heads, and their width.
            hidden_size: d.
            length: tokens per sequence.
        """
        return [PassCost(share, 0, 0.0, 0) for share in cls.passes.values()]

    @abstractmethod
    def begin(self, name: str, length: int) -> None:
        """Begin a pass: set `sums` to zeros of their shapes, on the mixer's device.

        Args:
            name: of the pass.
            length: tokens per sequence.
        """

    @abstractmethod
    def add(self, call: AttentionCall) -> None:
        """Add a batch to the sums of the pass."""

    @abstractmethod
    def solve(self) -> float | None:
        """Set the mixer's parameters from the sums of the pass, and free them.

        Returns:
            After the last pass the distance of the mixer's output from that of attention, over the latter's norm.
        """


def ridge(gram: Tensor, target: Tensor, strength: float | Tensor) -> Tensor:
    """Solve ``(gram + strength) x = target`` in float64, for symmetric positive semidefinite ``gram``.

    Args:
        gram: (..., f, f).
        target: (..., f, k).
        strength: (..., f), or one number for all features: added to the diagonal.

    Returns:
        (..., f, k) in float64, on the CPU, which has float64 and decompositions on every machine.
    """
    gram, target = gram.double().cpu(), target.double().cpu()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-9 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    added = torch.as_tensor(strength, dtype=torch.float64).cpu() + floor
    factor = torch.linalg.cholesky(gram + torch.diag_embed(added.expand_as(diagonal)))
    return torch.cholesky_solve(target, factor)
