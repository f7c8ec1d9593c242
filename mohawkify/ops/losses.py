"""The losses of stages 2 and 3. Shapes: b batch, l length, d model width, v vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


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

    Source: MOHAWK (arXiv 2408.10189), equation 10 (stage 3); Hinton et al. (arXiv 1503.02531) for T.
    """
    dtype = torch.promote_types(student_blv.dtype, torch.float32)
    student_log = torch.log_softmax(student_blv[counts_bl].to(dtype) / temperature, dim=-1)
    teacher_log = torch.log_softmax(teacher_blv[counts_bl].to(dtype) / temperature, dim=-1)
    teacher = teacher_log.exp()
    scale = temperature**2 / max(len(teacher), 1)
    cross_entropy = -(teacher * student_log).sum() * scale
    entropy = -(teacher * teacher_log).sum() * scale
    return cross_entropy, (cross_entropy - entropy).detach()
