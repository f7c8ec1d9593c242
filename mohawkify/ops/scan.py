"""Three views of one operator, the Discrete Mamba-2 sequence map (Llamba, arXiv 2502.14458, section 3; docs/math.md).

    state[t] = exp(log_decay[t]) * state[t-1] + x[t] (outer) B[t]
    y[t]     = state[t] C[t]

`scan_recurrent` walks the recurrence, `scan_chunked` is the fast plain form, `mixing_matrix` writes the map as one
lower triangular matrix per head. They agree to rounding. The skip term D is the caller's, except in the matrix,
where it is the diagonal. The new input enters undecayed and is never divided by a softplus.

Shapes: b batch, l target position, s source position, h heads, p head width, n state width, m chunks, c chunk length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_recurrent(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    starts_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Walk the recurrence token by token: the reference, and the step of decoding.

    Args:
        x_blhp: inputs.
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        state_bhpn: the state to continue from; zeros when absent.
        starts_bl: true where a new document begins; the state before it is forgotten.

    Returns:
        y (b, l, h, p) in the dtype of x, and the final state (b, h, p, n) in at least float32.
    """
    dtype = torch.promote_types(x_blhp.dtype, torch.float32)
    x, b, c, log_decay = (t.to(dtype) for t in (x_blhp, b_blhn, c_blhn, log_decay_blh))
    decay_blh = log_decay.exp()
    if starts_bl is not None:
        decay_blh = decay_blh * (~starts_bl).unsqueeze(-1)
    state = _first_state(x, b, state_bhpn)
    outputs = []
    for t in range(x.shape[1]):
        state = decay_blh[:, t, :, None, None] * state + x[:, t, :, :, None] * b[:, t, :, None, :]
        outputs.append((state * c[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1).to(x_blhp.dtype), state


def scan_chunked(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    starts_bl: Tensor | None = None,
    chunk_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same map by chunks: matrices inside a chunk, the recurrence between chunks.

    Arguments and results as in `scan_recurrent`, and the chunk length, which changes speed and memory only; by default
    the power of two near sqrt(n p), where matrices and states cost about the same. Everything is computed in at least
    float32, under autocast too.

    Source: Mamba-2 (arXiv 2405.21060), section 6, with the decay given directly.
    """
    with torch.autocast(x_blhp.device.type, enabled=False):
        return _scan_chunked(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, starts_bl, chunk_length)


def _scan_chunked(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None,
    starts_bl: Tensor | None,
    chunk_length: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_blhp.dtype, torch.float32)
    length = x_blhp.shape[1]
    if chunk_length is None:
        balanced = round(math.log2(x_blhp.shape[-1] * b_blhn.shape[-1]) / 2)
        chunk_length = min(max(2**balanced, 32), 128)
    chunk_length = min(chunk_length, length)
    # Padding with zeros is neutral: it adds nothing to the state and, with a log-decay of 0, forgets nothing.
    x, b, c, log_decay = (_chunks(t.to(dtype), chunk_length) for t in (x_blhp, b_blhn, c_blhn, log_decay_blh))
    cumulative_bmhc = _cumulative(log_decay)
    mask = torch.ones(chunk_length, chunk_length, dtype=torch.bool, device=x.device).tril()
    from_carry_bmhc = cumulative_bmhc.to(dtype).exp()
    to_end_bmhc = (cumulative_bmhc[..., -1:] - cumulative_bmhc).to(dtype).exp()
    if starts_bl is not None:
        document_bmc = _chunks(starts_bl.unsqueeze(-1).to(torch.int32), chunk_length).squeeze(2).cumsum(-1)
        same_bmcc = document_bmc.unsqueeze(-1) == document_bmc.unsqueeze(-2)
        mask = (mask & same_bmcc).unsqueeze(2)
        from_carry_bmhc = from_carry_bmhc * (document_bmc == 0).unsqueeze(2)
        to_end_bmhc = to_end_bmhc * (document_bmc == document_bmc[..., -1:]).unsqueeze(2)

    decay_bmhcc = _decay_between(cumulative_bmhc, mask, dtype)
    y = ((c @ b.transpose(-1, -2)) * decay_bmhcc) @ x
    added_bmhpn = (x * to_end_bmhc.unsqueeze(-1)).transpose(-1, -2) @ b

    state = _first_state(x_blhp.to(dtype), b_blhn, state_bhpn)
    carried = []
    for m in range(x.shape[1]):
        carried.append(state)
        state = from_carry_bmhc[:, m, :, -1, None, None] * state + added_bmhpn[:, m]
    carried_bmhpn = torch.stack(carried, dim=1)
    y = y + (c * from_carry_bmhc.unsqueeze(-1)) @ carried_bmhpn.transpose(-1, -2)
    y_blhp = y.transpose(2, 3).flatten(1, 2)[:, :length]
    return y_blhp.to(x_blhp.dtype), state


def mixing_matrix(
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    d_h: Tensor | None = None,
    starts_bl: Tensor | None = None,
) -> Tensor:
    """Write the map as one matrix per head: ``M[l, s] = (C_l . B_s) exp(sum of log_decay over s+1..l)`` for s <= l.

    Args:
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        d_h: the skip of each head, added on the diagonal.
        starts_bl: true where a new document begins; entries across borders are 0.

    Returns:
        The matrices (b, h, l, l) in at least float32; entries above the diagonal are 0.

    Source: Llamba (arXiv 2502.14458), equation of the matrix mixer; MOHAWK (arXiv 2408.10189), section 4.1.
    """
    with torch.autocast(b_blhn.device.type, enabled=False):
        dtype = torch.promote_types(b_blhn.dtype, torch.float32)
        b, c = (t.to(dtype).transpose(1, 2) for t in (b_blhn, c_blhn))
        length = b.shape[2]
        cumulative_bhl = _cumulative(log_decay_blh.to(dtype).transpose(1, 2))
        mask = torch.ones(length, length, dtype=torch.bool, device=b.device).tril()
        if starts_bl is not None:
            document_bl = starts_bl.cumsum(-1)
            mask = (mask & (document_bl.unsqueeze(-1) == document_bl.unsqueeze(-2))).unsqueeze(1)
        matrix_bhls = (c @ b.transpose(-1, -2)) * _decay_between(cumulative_bhl, mask, dtype)
        if d_h is not None:
            matrix_bhls = matrix_bhls + torch.diag_embed(d_h.to(dtype)[:, None].expand(-1, length))
        return matrix_bhls


def _cumulative(log_decay: Tensor) -> Tensor:
    """Running sum in float64: its differences are small numbers between large ones (measured: 6e-5 in float32)."""
    exact = log_decay.dtype if log_decay.device.type == "mps" else torch.float64
    return log_decay.to(exact).cumsum(-1)


def _decay_between(cumulative: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(sum of log-decay over s+1..l) for every pair (l, s) that the mask allows, 0 elsewhere.

    Masking before exp keeps the unused triangle from overflowing, in the gradient too.
    """
    difference = (cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)).to(dtype)
    return difference.masked_fill(~mask, -torch.inf).exp()


def _first_state(x_blhp: Tensor, b_blhn: Tensor, state_bhpn: Tensor | None) -> Tensor:
    if state_bhpn is not None:
        return state_bhpn.to(x_blhp.dtype)
    batch, _, heads, width = x_blhp.shape
    return x_blhp.new_zeros(batch, heads, width, b_blhn.shape[-1])


def _chunks(t_bl: Tensor, chunk_length: int) -> Tensor:
    """(b, l, h, ...) -> (b, m, h, c, ...), the length padded with zeros to whole chunks."""
    missing = -t_bl.shape[1] % chunk_length
    if missing:
        t_bl = F.pad(t_bl, (0, 0) * (t_bl.dim() - 2) + (0, missing))
    return t_bl.unflatten(1, (-1, chunk_length)).transpose(2, 3)
