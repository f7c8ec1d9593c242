"""The losses of stages 2 and 3, by their definitions.

Shapes: b batch, l length, t counted tokens, d model width, v vocabulary, k listed tokens of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mohawkify.errors import UsageError


class TopK(NamedTuple):
    """A teacher's next-token distribution at temperature 1, as far as it was kept.

    Args:
        ids_blk: int64, k different tokens for every position.
        log_probs_blk: their log-probabilities, not renormalised.
        log_rest_bl: log of what all other tokens have together; minus infinity where that is nothing.
    """

    ids_blk: Tensor
    log_probs_blk: Tensor
    log_rest_bl: Tensor


def align_loss(student_bld: Tensor, teacher_bld: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the Euclidean distance between student and teacher vectors, in at least float32.

    Returns:
        The loss, and the relative distance ``|s - t| / |t|`` averaged over tokens (detached).

    Source: MOHAWK (arXiv 2408.10189), equation 9 (stage 2).
    """
    dtype = torch.promote_types(student_bld.dtype, torch.float32)
    student, teacher = student_bld.to(dtype), teacher_bld.to(dtype)
    distance_bl = torch.linalg.vector_norm(student - teacher, dim=-1)
    norm_bl = torch.linalg.vector_norm(teacher, dim=-1)
    return distance_bl.mean(), (distance_bl.detach() / norm_bl.clamp_min(1e-12)).mean()


def distill_loss(
    student_blv: Tensor, teacher_blv: Tensor, counts_bl: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean over counted tokens of the soft cross-entropy from teacher to student, and of the KL divergence in it.

    Both sides are divided by the temperature T and the result is multiplied by T squared, so that the size of the
    gradient does not depend on T.

    Args:
        student_blv: student logits.
        teacher_blv: teacher logits over the same vocabulary.
        counts_bl: which tokens count; where none does, the loss is 0.
        temperature: T.

    Returns:
        The soft cross-entropy, and KL(teacher || student) in nats per token (detached). Their gradients are equal.

    Source: MOHAWK (arXiv 2408.10189), equation 10 (stage 3); Hinton et al. (arXiv 1503.02531) for T. See
    docs/math.md (19).
    """
    dtype = torch.promote_types(student_blv.dtype, torch.float32)
    student_log = torch.log_softmax(student_blv[counts_bl].to(dtype) / temperature, dim=-1)
    teacher_log = torch.log_softmax(teacher_blv[counts_bl].to(dtype) / temperature, dim=-1)
    teacher = teacher_log.exp()
    scale = temperature**2 / max(len(teacher), 1)
    cross_entropy = -(teacher * student_log).sum() * scale
    entropy = -(teacher * teacher_log).sum() * scale
    return cross_entropy, (cross_entropy - entropy).detach()


def distill_loss_top_k(student_blv: Tensor, teacher: TopK, counts_bl: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of `distill_loss` between what both sides give to each of k tokens and to everything else together.

    Merging tokens never raises a KL divergence, so ``kl`` is a lower bound of the whole one; where all the vocabulary
    is listed, or nothing is left, both are the whole one's.

    Args:
        student_blv: student logits.
        teacher: k tokens with their probabilities, and the mass outside of them.
        counts_bl: which tokens count; where none does, the loss is 0.

    Returns:
        The soft cross-entropy, and KL(teacher || student) in nats per token (detached).
    """
    dtype = torch.promote_types(student_blv.dtype, torch.float32)
    student_log_tv = torch.log_softmax(student_blv[counts_bl].to(dtype), dim=-1)
    ids_tk = teacher.ids_blk[counts_bl]
    student_log = student_log_tv.gather(-1, ids_tk)
    teacher_log = teacher.log_probs_blk[counts_bl].to(dtype)
    if ids_tk.shape[-1] < student_blv.shape[-1]:  # else there is nothing else
        student_rest_t1 = student_log_tv.scatter(-1, ids_tk, -torch.inf).logsumexp(-1, keepdim=True)
        student_log = torch.cat([student_log, student_rest_t1], dim=-1)
        teacher_log = torch.cat([teacher_log, teacher.log_rest_bl[counts_bl].to(dtype).unsqueeze(-1)], dim=-1)
    probabilities = teacher_log.exp()
    share = 1.0 / max(len(ids_tk), 1)
    cross_entropy = -(probabilities * student_log).sum() * share
    entropy = torch.special.entr(probabilities).sum() * share
    return cross_entropy, (cross_entropy - entropy).detach()


def require_temperature_of_one(temperature: float) -> None:
    """Refuse a temperature for a teacher of which only the k likeliest tokens are given.

    Raises:
        UsageError: it is not 1.
    """
    if temperature != 1.0:
        raise UsageError(
            f"found temperature {temperature:g} for a teacher's {TopK.__name__}, expected 1: what is outside the listed"
            " tokens is known at temperature 1 alone"
        )
