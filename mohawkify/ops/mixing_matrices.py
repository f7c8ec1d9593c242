"""The distance that stage 1 makes small: student mixing matrices against teacher attention.

Here both sides are described, and the distance is written as it is defined; `matrix_distance` computes the same without
ever holding a matrix.

Shapes: b batch, h query heads, g key heads, l target position, s source position, p head width, n state width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mohawkify.ops.scan import MixingMatrix, mixing_matrix


class AttentionMatrix(NamedTuple):
    """The parts of a teacher's attention matrix; grouped keys are not repeated.

    Args:
        q_bhlp: queries, after rotary embedding and query/key norms.
        k_bgsp: keys of g key heads; each serves h / g neighbouring query heads.
        scaling: what the products are multiplied by.
        mask_bhls: true where attention is allowed (broadcastable): causal, windowed, within documents.
        softcap: products are bounded to ``softcap * tanh(product / softcap)`` when given.
        bias_bhls: added to the scaled products (broadcastable): ALiBi.
        value_norms_bgs: lengths of the values, which say what each column can do to the output.
    """

    q_bhlp: Tensor
    k_bgsp: Tensor
    scaling: float
    mask_bhls: Tensor
    softcap: float | None = None
    bias_bhls: Tensor | None = None
    value_norms_bgs: Tensor | None = None

    def column_weights(self) -> Tensor:
        """The lengths of the values over their mean by head, in at least float32: (b, h, s)."""
        assert self.value_norms_bgs is not None
        norms_bgs = self.value_norms_bgs.to(torch.promote_types(self.value_norms_bgs.dtype, torch.float32))
        tiny = torch.finfo(norms_bgs.dtype).tiny
        weights_bgs = norms_bgs / norms_bgs.mean(-1, keepdim=True).clamp(min=tiny)
        return weights_bgs.repeat_interleave(self.q_bhlp.shape[1] // norms_bgs.shape[1], dim=1)

    def of_heads(self, heads: Sequence[int]) -> AttentionMatrix:
        """The parts for some query heads, each with keys of its own."""
        if len(heads) == self.q_bhlp.shape[1]:
            return self
        chosen, repeats = list(heads), self.q_bhlp.shape[1] // self.k_bgsp.shape[1]
        groups, norms_bgs = [head // repeats for head in chosen], self.value_norms_bgs

        def cut(part: Tensor) -> Tensor:
            return part[:, chosen] if part.dim() == 4 and part.shape[1] > 1 else part

        return self._replace(
            q_bhlp=self.q_bhlp[:, chosen],
            k_bgsp=self.k_bgsp[:, groups],
            mask_bhls=cut(self.mask_bhls),
            bias_bhls=None if self.bias_bhls is None else cut(self.bias_bhls),
            value_norms_bgs=None if norms_bgs is None else norms_bgs[:, groups],
        )

    def probabilities(self) -> Tensor:
        """The attention matrices (b, h, l, s) in at least float32."""
        return self.band(0, self.q_bhlp.shape[2], torch.promote_types(self.q_bhlp.dtype, torch.float32))

    def band(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The rows ``begin`` to ``end`` of the matrices, up to their last allowed source: (b, h, r, end)."""
        with torch.autocast(self.q_bhlp.device.type, enabled=False):
            batch, heads, _, width = self.q_bhlp.shape
            groups = self.k_bgsp.shape[1]
            # The query heads of a group are rows of one product, so that keys need not be repeated.
            q_bgrp = self.q_bhlp[:, :, begin:end].to(dtype).reshape(batch, groups, -1, width)
            products = q_bgrp @ self.k_bgsp[:, :, :end].to(dtype).transpose(-1, -2)
            scores = products.view(batch, heads, end - begin, end).mul_(self.scaling)
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap).mul_(self.softcap)
            if self.bias_bhls is not None:
                scores = scores + self.bias_bhls[..., _rows(self.bias_bhls, begin, end), :end].to(dtype)
            mask = self.mask_bhls[..., begin:end, :end]
            return scores.masked_fill_(~mask, -torch.inf).softmax(-1)


def _rows(bias_bhls: Tensor, begin: int, end: int) -> slice:
    """The rows of a bias that may be the same for all."""
    return slice(None) if bias_bhls.shape[-2] == 1 else slice(begin, end)


def orient_loss_direct(
    mixing: MixingMatrix,
    attention: AttentionMatrix,
    document_starts_bl: Tensor | None,
    weights_bhs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean over batch and heads of the Frobenius distance between the two matrices (not squared, not divided by l).

    The definition, matrix by matrix; `matrix_distance.orient_loss` is what stage 1 uses.

    Args:
        mixing: the student's side.
        attention: the teacher's side.
        document_starts_bl: true where a new document begins.
        weights_bhs: what the columns of both matrices are multiplied by; nothing when absent.

    Returns:
        The loss, and the relative distance ``|M - P| / |P|`` (detached), which does not depend on the length.

    Source: MOHAWK (arXiv 2408.10189), equation 8 (stage 1).
    """
    matrix_bhls, probabilities_bhls = mixing_matrix(*mixing, document_starts_bl), attention.probabilities()
    if weights_bhs is not None:
        matrix_bhls = matrix_bhls * weights_bhs.unsqueeze(-2)
        probabilities_bhls = probabilities_bhls * weights_bhs.unsqueeze(-2)
    # Summed in float64: over the 4 million elements of a matrix torch's float32 norm was off by 2e-4 (measured).
    distance_bh = _norm(matrix_bhls - probabilities_bhls)
    relative_bh = distance_bh.detach() / _norm(probabilities_bhls)
    return distance_bh.mean(), relative_bh.mean()


def _norm(matrix_bhls: Tensor) -> Tensor:
    exact = matrix_bhls.dtype if matrix_bhls.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(matrix_bhls, dim=(-2, -1), dtype=exact).to(matrix_bhls.dtype)
