"""Three views of one operator, the Discrete Mamba-2 sequence map (Llamba, arXiv 2502.14458, section 3; docs/math.md).

    state[t] = exp(log_decay[t]) * state[t-1] + x[t] (outer) B[t]
    y[t]     = state[t] C[t]

`scan_recurrent` walks the recurrence, `scan_chunked` is the fast plain form, `mixing_matrix` writes the map as one
lower triangular matrix per head. They agree to rounding. The skip term D is the caller's, except in the matrix,
where it is the diagonal. The new input enters undecayed and is never divided by a softplus.

Shapes: b batch, l target position, s source position, h heads, p head width, n state width, m chunks, c chunk length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawkify.ops.constants import scan_chunk_length, scan_group_tokens

# Below it a log-decay counts as this: exp is 0 in float64 too. Lower values would blur the running sums of all that
# follows, and minus infinity has no differences.
LOWEST_LOG_DECAY = -1000.0


class MixingMatrix(NamedTuple):
    """The parts of a mixer's matrix.

    Args:
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        d_h: the skip of each head.
    """

    b_blhn: Tensor
    c_blhn: Tensor
    log_decay_blh: Tensor
    d_h: Tensor


def scan_recurrent(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Walk the recurrence token by token: the reference, and the step of decoding.

    Args:
        x_blhp: inputs.
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        state_bhpn: the state to continue from; zeros when absent.
        document_starts_bl: true where a new document begins; the state before it is forgotten.

    Returns:
        y (b, l, h, p) in the dtype of x, and the final state (b, h, p, n) in at least float32.
    """
    dtype = torch.promote_types(x_blhp.dtype, torch.float32)
    x, b, c, log_decay = (t.to(dtype) for t in (x_blhp, b_blhn, c_blhn, log_decay_blh))
    decay_blh = log_decay.exp()
    if document_starts_bl is not None:
        decay_blh = decay_blh * (~document_starts_bl).unsqueeze(-1)
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
    document_starts_bl: Tensor | None = None,
    chunk_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same map by chunks: matrices inside a chunk, the recurrence between chunks.

    Arguments and results as in `scan_recurrent`, and the chunk length, which changes speed and memory only; by default
    the power of two near half of sqrt(n p). Everything is computed in at least float32, under autocast too. Of the
    intermediate results only the states between chunks are kept for the gradients, which are derived once.

    Source: Mamba-2 (arXiv 2405.21060), section 6, with the decay given directly. The gradients: docs/math.md, chunks.
    """
    state = _first_state(x_blhp.to(torch.promote_types(x_blhp.dtype, torch.float32)), b_blhn, state_bhpn)
    length = x_blhp.shape[1]
    if chunk_length is None:
        chunk_length = scan_chunk_length(x_blhp.shape[-1], b_blhn.shape[-1], length)
    chunk_length = max(min(chunk_length, length), 1)
    arguments = (x_blhp, b_blhn, c_blhn, log_decay_blh, state, document_starts_bl, chunk_length)
    with torch.autocast(x_blhp.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:5]):
            y_blhp, state = _Chunked.apply(*arguments)
            return y_blhp, state
        return _scan_groups(*arguments, kept=None)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_blhp: Tensor,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        state_bhpn: Tensor,
        document_starts_bl: Tensor | None,
        chunk_length: int,
    ) -> tuple[Tensor, Tensor]:
        carried: list[Tensor] = []
        results = _scan_groups(
            x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, document_starts_bl, chunk_length, carried
        )
        ctx.save_for_backward(x_blhp, b_blhn, c_blhn, log_decay_blh, document_starts_bl, *carried)
        ctx.chunk_length = chunk_length
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_blhp, b_blhn, c_blhn, log_decay_blh, document_starts_bl, *carried = ctx.saved_tensors
        with torch.autocast(x_blhp.device.type, enabled=False):
            found = _gradients_of_groups(
                x_blhp, b_blhn, c_blhn, log_decay_blh, document_starts_bl, ctx.chunk_length, carried, *gradients
            )
        return *found, None, None


def _scan_groups(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor,
    document_starts_bl: Tensor | None,
    chunk_length: int,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Scan group by group; the states before the chunks of each group (b, h, m, p, n) are appended to ``kept``."""
    y_blhp = torch.empty(x_blhp.shape, dtype=x_blhp.dtype, device=x_blhp.device)
    dtype = state_bhpn.dtype
    for group in _groups(x_blhp, chunk_length):
        x, b, c = (_chunks(t[:, group], chunk_length, dtype) for t in (x_blhp, b_blhn, c_blhn))
        decays = _decays(log_decay_blh, document_starts_bl, group, chunk_length, dtype)
        y = decays.between_bhmcc.mul_(c @ b.transpose(-1, -2)) @ x
        added_bhmpn = x.mul_(decays.to_end_bhmc.unsqueeze(-1)).transpose(-1, -2) @ b
        carried_bhmpn = torch.empty_like(added_bhmpn)
        for m in range(added_bhmpn.shape[2]):
            carried_bhmpn[:, :, m] = state_bhpn
            whole_chunk_bh11 = decays.from_carry_bhmc[:, :, m, -1, None, None]
            state_bhpn = torch.addcmul(added_bhmpn[:, :, m], whole_chunk_bh11, state_bhpn)
        _add_product(y, c.mul_(decays.from_carry_bhmc.unsqueeze(-1)), carried_bhmpn.transpose(-1, -2))
        _write_chunks(y_blhp, group, y)
        if kept is not None:
            kept.append(carried_bhmpn)
    return y_blhp, state_bhpn


def _gradients_of_groups(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    document_starts_bl: Tensor | None,
    chunk_length: int,
    kept: Sequence[Tensor],
    y_gradient_blhp: Tensor,
    state_gradient_bhpn: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of x, B, C, log-decay and first state, from the last group to the first (docs/math.md, chunks).

    Args:
        kept: the states before every chunk, a tensor (b, h, m, p, n) per group.
        y_gradient_blhp: gradient of the outputs.
        state_gradient_bhpn: gradient of the final state.
    """
    inputs = (x_blhp, b_blhn, c_blhn, log_decay_blh)
    dx_blhp, db_blhn, dc_blhn, dlog_decay_blh = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)
    d_state_bhpn, dtype = state_gradient_bhpn, state_gradient_bhpn.dtype
    exact = _exact(log_decay_blh)
    since = torch.ones(chunk_length, chunk_length, dtype=dtype, device=x_blhp.device).triu()
    for group, carried_bhmpn in reversed(list(zip(_groups(x_blhp, chunk_length), kept, strict=True))):
        tensors = (x_blhp, b_blhn, c_blhn, y_gradient_blhp)
        x, b, c, dy = (_chunks(t[:, group], chunk_length, dtype) for t in tensors)
        decays = _decays(log_decay_blh, document_starts_bl, group, chunk_length, dtype)
        from_carry_bhmc1, to_end_bhmc1 = decays.from_carry_bhmc.unsqueeze(-1), decays.to_end_bhmc.unsqueeze(-1)

        products_bhmcc = c @ b.transpose(-1, -2)
        d_products_bhmcc = (dy @ x.transpose(-1, -2)).mul_(decays.between_bhmcc)
        dx = decays.between_bhmcc.mul_(products_bhmcc).transpose(-1, -2) @ dy
        # All pairs with the decay of token k between them, source < k <= target, are summed as they are: the difference
        # of the sums over rows and columns is the same, but in float32 it loses a digit (measured).
        pairs_bhmcc = since @ products_bhmcc.mul_(d_products_bhmcc)
        dlog_decay = pairs_bhmcc.tril_(-1).sum(-1).to(exact)

        dy.mul_(from_carry_bhmc1)
        dc = dy @ carried_bhmpn
        from_before = (c * dc).sum(-1).to(exact)
        dlog_decay += from_before.flip(-1).cumsum(-1).flip(-1)
        _add_product(dc, d_products_bhmcc, b)

        added_bhmpn = dy.transpose(-1, -2) @ c
        d_after_bhmpn = torch.empty_like(added_bhmpn)
        for m in reversed(range(added_bhmpn.shape[2])):
            d_after_bhmpn[:, :, m] = d_state_bhpn
            whole_chunk_bh = decays.from_carry_bhmc[:, :, m, -1]
            through_bh = (d_state_bhpn * carried_bhmpn[:, :, m]).sum((-2, -1)) * whole_chunk_bh
            dlog_decay[:, :, m] += through_bh.to(exact).unsqueeze(-1)
            d_state_bhpn = torch.addcmul(added_bhmpn[:, :, m], whole_chunk_bh[..., None, None], d_state_bhpn)

        db = x.mul_(to_end_bhmc1) @ d_after_bhmpn
        to_after = (b * db).sum(-1).to(exact)
        dlog_decay += to_after.cumsum(-1) - to_after
        _add_product(db, d_products_bhmcc.transpose(-1, -2), c)
        _add_product(dx, b.mul_(to_end_bhmc1), d_after_bhmpn.transpose(-1, -2))

        for whole, part in ((dx_blhp, dx), (db_blhn, db), (dc_blhn, dc)):
            _write_chunks(whole, group, part)
        _write_chunks(dlog_decay_blh.unsqueeze(-1), group, dlog_decay.unsqueeze(-1))
    if document_starts_bl is not None:
        dlog_decay_blh.masked_fill_(document_starts_bl.unsqueeze(-1), 0.0)
    return dx_blhp, db_blhn, dc_blhn, dlog_decay_blh, d_state_bhpn


class _Decays(NamedTuple):
    """The decays of a group's chunks: 0 where a document starts between the two places.

    Args:
        from_carry_bhmc: from the state before the chunk to each token.
        to_end_bhmc: from each token to the state after the chunk.
        between_bhmcc: from source (last) to target token; 0 where the source is later.
    """

    from_carry_bhmc: Tensor
    to_end_bhmc: Tensor
    between_bhmcc: Tensor


def _decays(
    log_decay_blh: Tensor, document_starts_bl: Tensor | None, group: slice, chunk_length: int, dtype: torch.dtype
) -> _Decays:
    exact = _exact(log_decay_blh)
    log_decay_bhmc = _chunks(log_decay_blh[:, group].unsqueeze(-1), chunk_length, exact).squeeze(-1)
    cumulative_bhmc = log_decay_bhmc.clamp_(min=LOWEST_LOG_DECAY).cumsum(-1)
    mask = torch.ones(chunk_length, chunk_length, dtype=torch.bool, device=log_decay_blh.device).tril()
    from_carry_bhmc = cumulative_bhmc.to(dtype).exp()
    to_end_bhmc = (cumulative_bhmc[..., -1:] - cumulative_bhmc).to(dtype).exp()
    if document_starts_bl is not None:
        begins = _chunks(document_starts_bl[:, group, None, None], chunk_length, torch.int32)
        document_b1mc = begins.squeeze(-1).cumsum(-1)
        mask = mask & (document_b1mc.unsqueeze(-1) == document_b1mc.unsqueeze(-2))
        from_carry_bhmc *= document_b1mc == 0
        to_end_bhmc *= document_b1mc == document_b1mc[..., -1:]
    return _Decays(from_carry_bhmc, to_end_bhmc, _decay_between(cumulative_bhmc, mask, dtype))


def _groups(x_blhp: Tensor, chunk_length: int) -> list[slice]:
    """The length cut into groups of whole chunks; the last one may end within a chunk."""
    batch, length, heads, _ = x_blhp.shape
    num_tokens = scan_group_tokens(batch, heads, chunk_length)
    return [slice(begin, min(begin + num_tokens, length)) for begin in range(0, length, num_tokens)]


def _chunks(t_bl: Tensor, chunk_length: int, dtype: torch.dtype) -> Tensor:
    """Copy (b, l, h, w) to (b, h, m, c, w) with zeros up to whole chunks.

    Padding is neutral: it adds nothing to the state and, with a log-decay of 0, forgets nothing.
    """
    batch, length, heads, width = t_bl.shape
    padded = length + -length % chunk_length
    copy = torch.empty(batch, heads, padded, width, dtype=dtype, device=t_bl.device)
    copy[:, :, :length] = t_bl.transpose(1, 2)
    copy[:, :, length:] = 0
    return copy.unflatten(2, (-1, chunk_length))


def _write_chunks(whole_bl: Tensor, group: slice, chunks_bhmc: Tensor) -> None:
    """Write (b, h, m, c, w) to its place in (b, l, h, w), without the padding."""
    whole_bl[:, group] = chunks_bhmc.flatten(2, 3)[:, :, : group.stop - group.start].transpose(1, 2)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices in place; all have the dimensions (b, h, m) in front."""
    total.view(-1, *total.shape[-2:]).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))


def mixing_matrix(
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    d_h: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
) -> Tensor:
    """Write the map as one matrix per head: ``M[l, s] = (C_l . B_s) exp(sum of log_decay over s+1..l)`` for s <= l.

    Args:
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        d_h: the skip of each head, added on the diagonal.
        document_starts_bl: true where a new document begins; entries across borders are 0.

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
        if document_starts_bl is not None:
            document_bl = document_starts_bl.cumsum(-1)
            mask = (mask & (document_bl.unsqueeze(-1) == document_bl.unsqueeze(-2))).unsqueeze(1)
        matrix_bhls = (c @ b.transpose(-1, -2)) * _decay_between(cumulative_bhl, mask, dtype)
        if d_h is not None:
            matrix_bhls = matrix_bhls + torch.diag_embed(d_h.to(dtype)[:, None].expand(-1, length))
        return matrix_bhls


def _cumulative(log_decay: Tensor) -> Tensor:
    """Running sum in float64: its differences are small numbers between large ones (measured: 6e-5 in float32)."""
    return log_decay.to(_exact(log_decay)).clamp(min=LOWEST_LOG_DECAY).cumsum(-1)


def _exact(tensor: Tensor) -> torch.dtype:
    """The precision of running sums: float64 where the device has it."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.device.type == "mps" else torch.float64


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
