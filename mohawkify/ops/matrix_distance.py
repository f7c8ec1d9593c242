"""Stage 1 without the matrices: distance and gradients in one pass over bands of rows, in memory linear in the length.

A band of the student's matrix left of its diagonal tile is a plain product: the decay between a target l of the band
and a source s before it is exp(sum from the band's start to l) times exp(sum from s to the band's start), one factor
for each row of C and of B. Only the diagonal tile needs decays pair by pair. With R the difference of both matrices,

    grad C_l ~ sum_s R_ls e_ls B_s,   grad B_s ~ sum_l R_ls e_ls C_l,   grad D ~ sum_l R_ll,
    grad log_decay_k ~ sum over l >= k of (sum_s W_ls - sum_l' W_l'l)  with W = R * (M without D),

all over the norm of R: the gradient is linear in R, so it is summed first and divided at the end (docs/math.md).

Shapes: b batch, h query heads, g key heads, l target, s source, r rows of a band, p head width, n state width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawkify.ops.constants import band_rows
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix
from mohawkify.ops.scan import LOWEST_LOG_DECAY


def orient_loss(
    mixing: MixingMatrix,
    attention: AttentionMatrix,
    document_starts_bl: Tensor | None,
    weights_bhs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean over batch and heads of the Frobenius distance between mixing and attention matrices.

    Arguments and results as in `orient_loss_direct`, whose metrics and gradients they are, to rounding; the gradients
    reach what the mixing matrix is made of, the attention's side is taken as given.
    """
    with torch.autocast(mixing.b_blhn.device.type, enabled=False):
        if weights_bhs is not None:  # of the columns of C B^T: those of B
            mixing = mixing._replace(b_blhn=mixing.b_blhn * weights_bhs.transpose(1, 2).unsqueeze(-1))
        loss, relative = _OrientLoss.apply(*mixing, attention, document_starts_bl, weights_bhs)
    return loss, relative


class _OrientLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        d_h: Tensor,
        attention: AttentionMatrix,
        document_starts_bl: Tensor | None,
        weights_bhs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        mixing = MixingMatrix(b_blhn, c_blhn, log_decay_blh, d_h)
        sums = _Sums(mixing, attention, document_starts_bl, weights_bhs)
        norm_bh = sums.squared_bh.sqrt()
        share_bh = torch.where(norm_bh > 0, 1.0 / norm_bh, 0.0) / norm_bh.numel()
        sums.db_bhln.mul_(share_bh[..., None, None])
        sums.dc_bhln.mul_(share_bh[..., None, None])
        # Every difference reaches all log-decays between source and target: a running sum from the end.
        log_decay_bhl = sums.difference_bhl.flip(-1).cumsum(-1).flip(-1) * share_bh.unsqueeze(-1)
        ctx.save_for_backward(
            sums.db_bhln.transpose(1, 2).to(b_blhn.dtype),
            sums.dc_bhln.transpose(1, 2).to(c_blhn.dtype),
            log_decay_bhl.transpose(1, 2).to(log_decay_blh.dtype),
            (sums.diagonal_bh * share_bh).sum(0).to(d_h.dtype),
        )
        relative = (norm_bh / sums.attention_squared_bh.sqrt()).mean()
        ctx.mark_non_differentiable(relative)
        return norm_bh.mean(), relative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradients[0] for saved in ctx.saved_tensors), None, None, None


class _Sums:
    """Sums over the bands, before the division by the norm: of R^2 and P^2, and all that the gradients are made of."""

    def __init__(
        self,
        mixing: MixingMatrix,
        attention: AttentionMatrix,
        document_starts_bl: Tensor | None,
        weights_bhs: Tensor | None,
    ) -> None:
        dtype, device = torch.promote_types(mixing.b_blhn.dtype, torch.float32), mixing.b_blhn.device
        self.b_bhln, self.c_bhln = (t.to(dtype).transpose(1, 2) for t in (mixing.b_blhn, mixing.c_blhn))
        batch, heads, length, _ = self.b_bhln.shape
        exact = dtype if device.type == "mps" else torch.float64
        log_decay_bhl = mixing.log_decay_blh.transpose(1, 2).to(exact)
        self.cumulative_bhl = log_decay_bhl.clamp(min=LOWEST_LOG_DECAY).cumsum(-1)
        self.weights_bhs = torch.ones_like(self.b_bhln[..., 0]) if weights_bhs is None else weights_bhs.to(dtype)
        self.d_h = mixing.d_h.to(dtype)
        self.document_bl = torch.zeros(batch, length, dtype=torch.long, device=device)
        if document_starts_bl is not None:
            self.document_bl = document_starts_bl.cumsum(-1)
        self.db_bhln = torch.zeros_like(self.b_bhln, memory_format=torch.contiguous_format)
        self.dc_bhln = torch.zeros_like(self.c_bhln, memory_format=torch.contiguous_format)
        self.difference_bhl = torch.zeros(batch, heads, length, dtype=exact, device=device)
        self.diagonal_bh, self.squared_bh, self.attention_squared_bh = (
            torch.zeros(batch, heads, dtype=dtype, device=device) for _ in range(3)
        )
        num_rows = band_rows(batch, heads, length)
        for begin in range(0, length, num_rows):
            end = min(begin + num_rows, length)
            p_bhrs = attention.band(begin, end, dtype)
            if weights_bhs is not None:
                p_bhrs.mul_(self.weights_bhs[..., None, :end])
            self.attention_squared_bh.add_(p_bhrs.square().sum((-2, -1)))
            self._add_tile(slice(begin, end), p_bhrs[..., begin:])
            if begin:
                self._add_rectangle(slice(begin, end), p_bhrs[..., :begin])

    def _add_tile(self, band: slice, p_bhrr: Tensor) -> None:
        """The tile on the diagonal: decays pair by pair."""
        b, c, document_br = self.b_bhln[:, :, band], self.c_bhln[:, :, band], self.document_bl[:, band]
        same_brr = (document_br.unsqueeze(-1) == document_br.unsqueeze(-2)).tril().unsqueeze(1)
        cumulative_bhr = self.cumulative_bhl[:, :, band]
        difference = cumulative_bhr.unsqueeze(-1) - cumulative_bhr.unsqueeze(-2)
        decay_bhrr = difference.to(b.dtype).masked_fill_(~same_brr, -torch.inf).exp_()
        matrix_bhrr = (c @ b.transpose(-1, -2)).mul_(decay_bhrr)
        rest_bhrr = matrix_bhrr - p_bhrr
        weights_bhr = self.weights_bhs[:, :, band]
        rest_bhrr.diagonal(dim1=-2, dim2=-1).add_(self.d_h[:, None] * weights_bhr)
        self.squared_bh.add_(rest_bhrr.square().sum((-2, -1)))
        self.diagonal_bh.add_((rest_bhrr.diagonal(dim1=-2, dim2=-1) * weights_bhr).sum(-1))
        weighted_bhrr = matrix_bhrr.mul_(rest_bhrr)
        self.difference_bhl[:, :, band] += (weighted_bhrr.sum(-1) - weighted_bhrr.sum(-2)).to(self.difference_bhl.dtype)
        rest_bhrr.mul_(decay_bhrr)
        self.dc_bhln[:, :, band] += rest_bhrr @ b
        self.db_bhln[:, :, band] += rest_bhrr.transpose(-1, -2) @ c

    def _add_rectangle(self, band: slice, p_bhrs: Tensor) -> None:
        """The part left of the tile: the decay is a factor of each row of C times one of each row of B."""
        begin = band.start
        before_bh1 = self.cumulative_bhl[:, :, begin - 1 : begin]
        open_b1 = self.document_bl[:, begin - 1 : begin]  # the document that reaches into the band, if any
        to_row_bhr = (self.cumulative_bhl[:, :, band] - before_bh1).to(self.b_bhln.dtype).exp_()
        to_row_bhr = (to_row_bhr * (self.document_bl[:, band] == open_b1).unsqueeze(1)).unsqueeze(-1)
        from_source_bhs = (before_bh1 - self.cumulative_bhl[:, :, :begin]).to(self.b_bhln.dtype).exp_()
        from_source_bhs = (from_source_bhs * (self.document_bl[:, :begin] == open_b1).unsqueeze(1)).unsqueeze(-1)
        c_bhrn, b_bhsn = self.c_bhln[:, :, band] * to_row_bhr, self.b_bhln[:, :, :begin] * from_source_bhs

        rest_bhrs = (c_bhrn @ b_bhsn.transpose(-1, -2)).sub_(p_bhrs)
        self.squared_bh.add_(torch.linalg.vector_norm(rest_bhrs, dim=(-2, -1)).square_())
        c_gradient, b_gradient = rest_bhrs @ b_bhsn, rest_bhrs.transpose(-1, -2) @ c_bhrn
        # The sums of R * M over rows and columns are products of what is there already.
        exact = self.difference_bhl.dtype
        self.difference_bhl[:, :, band] += (c_gradient * c_bhrn).sum(-1).to(exact)
        self.difference_bhl[:, :, :begin] -= (b_gradient * b_bhsn).sum(-1).to(exact)
        self.dc_bhln[:, :, band] += c_gradient * to_row_bhr
        self.db_bhln[:, :, :begin] += b_gradient * from_source_bhs
