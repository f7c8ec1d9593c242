"""One token through a mixer between its projections: convolution, state, skip and gate, the memory moved on in place.

Shapes: b batch, h heads, p head width, n state width, k convolution taps, f convolved features (x, B and C side
by side), x heads of all rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_step(
    x_bf: Tensor,
    b_bf: Tensor,
    c_bf: Tensor,
    z_bf: Tensor,
    a_log_bh: Tensor,
    convs: tuple[Tensor, Tensor],
    z_bias_f: Tensor,
    d_h: Tensor,
    tail_bkf: Tensor,
    state_bhpn: Tensor,
    keep_b: Tensor | None = None,
    *,
    conv_silu: bool = False,
    write_by_decay: bool = False,
) -> Tensor:
    """Move the memory on by one token and give the mixer's output before its last projection.

    The same map as `causal_conv`, `scan_recurrent` and gate give for a sequence of one; nothing of the size of the
    state is allocated.

    Args:
        x_bf: projected x of this token (b, h * p).
        b_bf: projected B (b, h * n).
        c_bf: projected C (b, h * n).
        z_bf: projected gate (b, h * p), without its bias.
        a_log_bh: logit of forgetting, with its bias.
        convs: taps (f, k) and biases (f) of the convolutions of x, B and C side by side, f = h * p + 2 * h * n.
        z_bias_f: bias of the gate.
        d_h: the skip of each head.
        tail_bkf: the last k - 1 projected inputs of the convolutions, the latest last; overwritten.
        state_bhpn: the state in at least float32; overwritten.
        keep_b: 0 where the token is padding, which changes neither the tail nor the state; None where none is.
        conv_silu: whether SiLU follows the convolutions.
        write_by_decay: whether B is multiplied by -log decay, softplus(a_log).

    Returns:
        The gated outputs (b, h * p), in the precision that the inputs and the skip promote to.
    """
    weight_fk, bias_f = convs
    num_lags = tail_bkf.shape[1]
    _, heads, head_dim, state_size = state_bhpn.shape
    inputs_bf = torch.cat([x_bf, b_bf, c_bf], dim=-1)
    keep_b1 = None if keep_b is None else (keep_b != 0).unsqueeze(-1)
    features_bf = bias_f + weight_fk[:, num_lags] * inputs_bf
    for lag in range(num_lags):
        features_bf = features_bf + weight_fk[:, lag] * tail_bkf[:, lag]
    for lag in range(num_lags):
        next_bf = tail_bkf[:, lag + 1] if lag + 1 < num_lags else inputs_bf
        tail_bkf[:, lag].copy_(next_bf if keep_b1 is None else torch.where(keep_b1, next_bf, tail_bkf[:, lag]))

    if conv_silu:
        features_bf = F.silu(features_bf)
    x_bf, b_bf, c_bf = features_bf.split([x_bf.shape[-1], b_bf.shape[-1], c_bf.shape[-1]], dim=-1)
    x_bhp, b_bhn, c_bhn = (
        feature.unflatten(-1, (heads, width))
        for feature, width in ((x_bf, head_dim), (b_bf, state_size), (c_bf, state_size))
    )
    dtype = state_bhpn.dtype
    if write_by_decay:
        b_bhn = (b_bhn * F.softplus(a_log_bh.to(dtype)).unsqueeze(-1)).to(b_bhn.dtype)
    decay_bh = torch.sigmoid(-a_log_bh.to(dtype))
    if keep_b1 is not None:
        x_bhp, decay_bh = x_bhp * keep_b1.unsqueeze(-1), decay_bh.masked_fill(~keep_b1, 1.0)
    state_bhpn.mul_(decay_bh[..., None, None]).addcmul_(x_bhp.to(dtype).unsqueeze(-1), b_bhn.to(dtype).unsqueeze(-2))
    with torch.autocast(state_bhpn.device.type, enabled=False):
        # As row times transposed state: on CPUs torch takes state times column one row at a time, 8 times slower.
        rows_x1n, states_xpn = c_bhn.to(dtype).reshape(-1, 1, state_size), state_bhpn.flatten(0, 1)
        y_bhp = torch.bmm(rows_x1n, states_xpn.transpose(1, 2)).view_as(x_bhp).to(x_bhp.dtype)
    y_bhp = y_bhp + d_h.to(y_bhp.dtype).unsqueeze(-1) * x_bhp
    return y_bhp.flatten(1) * F.silu(z_bf + z_bias_f)
