"""The short causal convolution of the mixer: depthwise, linear, aware of document borders.

Shapes: b batch, l length, k taps, f features (the channels of x, B or C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    are masked on the way, and the gradient needs no grouped convolution, which is slow on CPUs.

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
    length, num_lags = u_blf.shape[1], weight_fk.shape[1] - 1
    if tail_bkf is None:
        padded = F.pad(u_blf, (0, 0, num_lags, 0))
    else:
        padded = torch.cat([tail_bkf.to(u_blf.dtype), u_blf], dim=1)
    y_blf = bias_f + weight_fk[:, num_lags] * u_blf
    reach_bl = None if document_starts_bl is None else ~document_starts_bl
    for lag in range(1, num_lags + 1):
        begin = num_lags - lag
        lagged_blf = padded[:, begin : begin + length]
        if reach_bl is not None:
            lagged_blf = lagged_blf * reach_bl.unsqueeze(-1)
            assert document_starts_bl is not None
            # Reaching one token further back also needs that token's predecessor to be of the same document.
            reach_bl = ~document_starts_bl & F.pad(reach_bl, (1, 0), value=True)[:, :length]
        y_blf = y_blf + weight_fk[:, begin] * lagged_blf
    return y_blf, _last_inputs(padded, num_lags, document_starts_bl, num_real_b)


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
