"""The same operators by others, as far as they are installed; given the same tensors as ours.

Shapes: b batch, l length, h heads, p head width, n state width, m chunks, c and s places in a chunk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK_LENGTH = 64


def ssd_minimal(x_blhp: Tensor, b_blhn: Tensor, c_blhn: Tensor, log_decay_blh: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's minimal form of the scan: einsums over all chunks at once, every sum of decays added up for itself.

    The length is a multiple of `CHUNK_LENGTH`.

    Source: Mamba-2 (arXiv 2405.21060), listing 1.
    """
    return _four_steps(x_blhp, b_blhn, c_blhn, log_decay_blh, _segment_sums)


def ssd_subtracting(x_blhp: Tensor, b_blhn: Tensor, c_blhn: Tensor, log_decay_blh: Tensor) -> tuple[Tensor, Tensor]:
    """The same with sums of decays as differences of running sums: faster, and less exact in float32."""
    return _four_steps(x_blhp, b_blhn, c_blhn, log_decay_blh, _differences)


def _four_steps(
    x_blhp: Tensor, b_blhn: Tensor, c_blhn: Tensor, log_decay_blh: Tensor, sums: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    x, b, c, log_decay = (t.unflatten(1, (-1, CHUNK_LENGTH)) for t in (x_blhp, b_blhn, c_blhn, log_decay_blh))
    log_decay_bhmc = log_decay.permute(0, 3, 1, 2)
    running_bhmc = log_decay_bhmc.cumsum(-1)
    within = torch.einsum("bmchn,bmshn,bhmcs,bmshp->bmchp", c, b, sums(log_decay_bhmc).exp(), x)
    to_end_bhmc = (running_bhmc[..., -1:] - running_bhmc).exp()
    added = torch.einsum("bmchn,bhmc,bmchp->bmhpn", b, to_end_bhmc, x)
    added = torch.cat([torch.zeros_like(added[:, :1]), added], dim=1)
    across = sums(F.pad(running_bhmc[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzm,bmhpn->bzhpn", across, added)
    before = torch.einsum("bmchn,bmhpn,bhmc->bmchp", c, states[:, :-1], running_bhmc.exp())
    return (within + before).flatten(1, 2), states[:, -1]


def _segment_sums(terms: Tensor) -> Tensor:
    """The sum over s+1..c for every pair, -inf for s > c: each column is summed from its own beginning."""
    length = terms.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=terms.device).tril()
    columns = terms.unsqueeze(-1).expand(*terms.shape, length).masked_fill(~lower.tril(-1), 0.0)
    return columns.cumsum(-2).masked_fill(~lower, -torch.inf)


def _differences(terms: Tensor) -> Tensor:
    running = terms.cumsum(-1)
    lower = torch.ones(terms.shape[-1], terms.shape[-1], dtype=torch.bool, device=terms.device).tril()
    return (running.unsqueeze(-1) - running.unsqueeze(-2)).masked_fill(~lower, -torch.inf)


def scan_peers(device: torch.device) -> dict[str, Scan]:
    """The scans of others that are installed and run on the device."""
    found: dict[str, Scan] = {"ssd_minimal": ssd_minimal, "ssd_subtracting": ssd_subtracting}
    chunk_scan = find_function("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")
    if chunk_scan is not None:
        found["transformers"] = lambda x, b, c, decay: _by_steps(chunk_scan, x, b, c, decay)
    if device.type == "cuda":
        combined = find_function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        if combined is not None:
            found["mamba-ssm"] = lambda x, b, c, decay: _by_steps(combined, x, b, c, decay)
        gated = find_function("fla.ops.simple_gla", "chunk_simple_gla")
        if gated is not None:
            found["flash-linear-attention"] = lambda x, b, c, decay: _by_gates(gated, x, b, c, decay)
    return found


def distill_peers(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Fused distillation losses of others: called with hidden states and head of the student, then the teacher's."""
    fused = find_function("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    if fused is None:
        return {}
    # With beta 0 it is KL(teacher || student), and without hard labels nothing but it.
    loss = fused(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=device.type == "cuda")

    def run(student_nd: Tensor, student_vd: Tensor, teacher_nd: Tensor, teacher_vd: Tensor) -> Tensor:
        labels_n = torch.zeros(len(student_nd), dtype=torch.long, device=student_nd.device)
        result = loss(student_nd, student_vd, teacher_nd, teacher_vd, labels_n)
        return result[0] if isinstance(result, tuple) else result

    return {"liger-kernel": run}


def _by_steps(scan: Any, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Through a Mamba-2 scan, which multiplies its input by the step size: it is divided by it before."""
    step = -log_decay
    decay_h = -torch.ones(step.shape[-1], dtype=step.dtype, device=step.device)
    return scan(
        x / step.unsqueeze(-1), step, decay_h, b, c, chunk_size=CHUNK_LENGTH, return_final_states=True
    )  # fmt: skip


def _by_gates(scan: Any, x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    y, state_bhnp = scan(q=c, k=b, v=x, g=log_decay, scale=1.0, output_final_state=True)
    return y, state_bhnp.transpose(-1, -2)


def find_function(module: str, name: str) -> Any:
    """A function of a package that may be missing, or may not load without its device."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, RuntimeError, OSError):
        return None
