"""The distance that stage 1 makes small: student mixing matrices against teacher attention.

Shapes: b batch, h query heads, g key heads, l target position, s source position, p head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_probabilities(
    q_bhlp: Tensor,
    k_bgsp: Tensor,
    scaling: float,
    mask_bhls: Tensor,
    softcap: float | None = None,
    bias_bhls: Tensor | None = None,
) -> Tensor:
    """The teacher's attention matrix of every query head, rebuilt from its queries and keys.

    Args:
        q_bhlp: queries, after rotary embedding and query/key norms.
        k_bgsp: keys of g key heads; each serves h / g neighbouring query heads.
        scaling: what the products are multiplied by.
        mask_bhls: true where attention is allowed (broadcastable): causal, windowed, within documents.
        softcap: products are bounded to ``softcap * tanh(product / softcap)`` when given.
        bias_bhls: added to the scaled products (broadcastable): ALiBi.

    Returns:
        Probabilities (b, h, l, s) in at least float32.
    """
    with torch.autocast(q_bhlp.device.type, enabled=False):
        dtype = torch.promote_types(q_bhlp.dtype, torch.float32)
        k_bhsp = k_bgsp.repeat_interleave(q_bhlp.shape[1] // k_bgsp.shape[1], dim=1)
        scores = (q_bhlp.to(dtype) @ k_bhsp.to(dtype).transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias_bhls is not None:
            scores = scores + bias_bhls
        return scores.masked_fill(~mask_bhls, -torch.inf).softmax(-1)


def orient_loss(matrix_bhls: Tensor, probabilities_bhls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over batch and heads of the Frobenius distance between the two matrices (not squared, not divided by l).

    Args:
        matrix_bhls: the student's mixing matrices.
        probabilities_bhls: the teacher's attention matrices.

    Returns:
        The loss, and the relative distance ``|M - P| / |P|`` (detached), which does not depend on the length.

    Source: MOHAWK (arXiv 2408.10189), equation 8 (stage 1).
    """
    distance_bh = torch.linalg.vector_norm(matrix_bhls - probabilities_bhls, dim=(-2, -1))
    relative_bh = distance_bh.detach() / torch.linalg.vector_norm(probabilities_bhls, dim=(-2, -1))
    return distance_bh.mean(), relative_bh.mean()
