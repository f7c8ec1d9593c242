"""The scan by other people's kernels: flash-linear-attention and mamba-ssm, selectable and to compare with.

Neither supports the documents of packed batches. A document's first token gets a log-decay of `FORGET` here:
its exponential is below float32's smallest normal number, so nothing of the state before is left.

Shapes: b batch, l length, h heads, p head width, n state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORGET = -100.0
CHUNK = 128  # of mamba-ssm; flash-linear-attention has its own
SMALLEST_STEP = 1e-12  # mamba-ssm's input is divided by the negative log-decay, which rounds to 0


def scan_fla(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scan.scan_chunked` by flash-linear-attention's `chunk_simple_gla`, which is the same operator.

    Its state is (n, p), and its default scale is 1 / sqrt(n).
    """
    from fla.ops.simple_gla import chunk_simple_gla

    state_bhnp = None if state_bhpn is None else state_bhpn.transpose(-1, -2).contiguous()
    y_blhp, last_bhnp = chunk_simple_gla(
        q=c_blhn,
        k=b_blhn,
        v=x_blhp,
        g=_with_borders(log_decay_blh, document_starts_bl),
        scale=1.0,
        initial_state=state_bhnp,
        output_final_state=True,
    )
    # Contiguous: decoding continues from the state and updates it in place.
    return y_blhp, last_bhnp.transpose(-1, -2).contiguous()


def scan_mamba_ssm(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scan.scan_chunked` by mamba-ssm's `mamba_chunk_scan_combined`, whose step size is made to cancel.

    The kernel multiplies x by the step size -log_decay; here x is divided by it first. Where the decay is near 1 that
    is a large number, and in bfloat16 the product loses digits: right for comparing, not the first choice for training.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    step_blh = (-_with_borders(log_decay_blh, document_starts_bl)).clamp_min(SMALLEST_STEP)
    return mamba_chunk_scan_combined(
        (x_blhp / step_blh.unsqueeze(-1)).to(x_blhp.dtype),
        step_blh,
        -torch.ones(x_blhp.shape[2], dtype=torch.float32, device=x_blhp.device),
        b_blhn,
        c_blhn,
        chunk_size=CHUNK,
        initial_states=state_bhpn,
        return_final_states=True,
    )


def _with_borders(log_decay_blh: Tensor, document_starts_bl: Tensor | None) -> Tensor:
    return (
        log_decay_blh
        if document_starts_bl is None
        else log_decay_blh.masked_fill(document_starts_bl.unsqueeze(-1), FORGET)
    )
