"""The short causal convolution of the mixer: depthwise, linear, aware of document borders.

Shapes: b batch, l length, k taps, f features (the channels of x, B or C).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv(
    u_blf: Tensor,
    weight_fk: Tensor,
    bias_f: Tensor,
    tail_bkf: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
    num_real_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution without an activation: ``y[t] = bias + sum_j weight[j] * u[t - (k - 1) + j]``.

    The taps are summed one by one rather than through ``conv1d``: there are four, the taps of another document
    are cut off on the way, and the gradient needs no grouped convolution, which is slow on CPUs.

    Args:
        u_blf: the inputs.
        weight_fk: the taps; the last one multiplies the current token.
        bias_f: the bias.
        tail_bkf: the k - 1 inputs before ``u_blf``, from a previous call; zeros when absent.
        document_starts_bl: true where a new document begins; taps do not reach back over it.
        num_real_b: how many inputs of each row are no padding, which follows them; all of them when absent.

    Returns:
        The outputs (b, l, f), and the last k - 1 real inputs (b, k - 1, f) of the last document to continue from.
    """
    num_lags = weight_fk.shape[1] - 1
    u_blf = u_blf.to(torch.promote_types(u_blf.dtype, weight_fk.dtype))
    if tail_bkf is None:
        padded = F.pad(u_blf, (0, 0, num_lags, 0))
    else:
        padded = torch.cat([tail_bkf.to(u_blf.dtype), u_blf], dim=1)
    y_blf = _CausalConv.apply(padded, weight_fk, bias_f, _cut_off(document_starts_bl, num_lags))
    return y_blf, _last_inputs(padded, num_lags, document_starts_bl, num_real_b)


def _cut_off(document_starts_bl: Tensor | None, num_lags: int) -> list[Tensor] | None:
    """By lag, from 1 on: the tokens (b, l, 1) whose input so many tokens ago is of another document."""
    if document_starts_bl is None:
        return None
    masks = [document_starts_bl]
    while len(masks) < num_lags:
        masks.append(masks[-1] | F.pad(masks[-1], (1, 0))[:, :-1])
    return [mask_bl.unsqueeze(-1) for mask_bl in masks]


class _CausalConv(torch.autograd.Function):
    """The taps one by one, in place; what one lag cuts off, all longer ones cut off too, so it is only set to 0."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight_fk: Tensor, bias_f: Tensor, cut: list[Tensor] | None) -> Tensor:
        ctx.save_for_backward(padded, weight_fk)
        ctx.cut, ctx.bias_dtype = cut, bias_f.dtype
        num_lags = weight_fk.shape[1] - 1
        length = padded.shape[1] - num_lags
        weight_kf = weight_fk.T.contiguous()  # strided taps would leave vector instructions idle
        y_blf = torch.zeros_like(padded[:, num_lags:])
        for begin in range(num_lags):
            y_blf.addcmul_(padded[:, begin : begin + length], weight_kf[begin])
            if cut is not None:
                y_blf.masked_fill_(cut[num_lags - begin - 1], 0.0)
        return y_blf.addcmul_(padded[:, num_lags:], weight_kf[num_lags]).add_(bias_f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_blf: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight_fk = ctx.saved_tensors
        num_lags = weight_fk.shape[1] - 1
        length = padded.shape[1] - num_lags
        weight_kf = weight_fk.T.contiguous()
        padded_gradient, weight_gradient = torch.zeros_like(padded), torch.empty_like(weight_kf)
        bias_gradient = gradient_blf.sum((0, 1)).to(ctx.bias_dtype)
        if ctx.cut is not None:
            gradient_blf = gradient_blf.clone()
        for lag in range(num_lags + 1):
            begin = num_lags - lag
            if ctx.cut is not None and lag > 0:
                gradient_blf.masked_fill_(ctx.cut[lag - 1], 0.0)
            padded_gradient[:, begin : begin + length].addcmul_(gradient_blf, weight_kf[begin])
            weight_gradient[begin] = (gradient_blf * padded[:, begin : begin + length]).sum((0, 1))
        return padded_gradient, weight_gradient.T, bias_gradient, None


def _last_inputs(padded: Tensor, num_lags: int, document_starts_bl: Tensor | None, num_real_b: Tensor | None) -> Tensor:
    """The last inputs of each row in front of its padding; 0 where they are of a document before the last."""
    length = padded.shape[1] - num_lags
    starts_bl = None if document_starts_bl is None else F.pad(document_starts_bl, (num_lags, 0))
    if num_real_b is None:
        tail_bkf, starts_bk = padded[:, length:], None if starts_bl is None else starts_bl[:, length:]
    else:
        places_bk = num_real_b.unsqueeze(1) + torch.arange(num_lags, device=padded.device)
        tail_bkf = padded.take_along_dim(places_bk.unsqueeze(-1), dim=1)
        starts_bk = None if starts_bl is None else starts_bl.take_along_dim(places_bk, dim=1)
    if starts_bk is None or num_lags < 2:
        return tail_bkf
    starts_after_bk = F.pad(starts_bk[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
    return tail_bkf * (starts_after_bk == 0).unsqueeze(-1)
