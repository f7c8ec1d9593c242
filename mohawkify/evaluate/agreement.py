"""How near a student is to its teacher on held-out text: perplexity, KL divergence and top-1 agreement.

Shapes: b batch, l length, v vocabulary, t predicted tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.errors import DataError, NumericsError

CHUNK_BYTES = 64 * 2**20  # of float32 log-probabilities held at a time, for each model


class TokenRows(Protocol):
    """Right-padded rows of tokens."""

    input_ids: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Agreement:
    """Figures over the same next-token predictions of both models.

    Args:
        tokens: number of predictions.
        perplexity: the student's.
        teacher_perplexity: the teacher's.
        kl: KL(teacher || student), nats per token.
        top1: share of predictions in which both rank the same token first.
        seconds: duration of the measurement.
    """

    tokens: int
    perplexity: float
    teacher_perplexity: float
    kl: float
    top1: float
    seconds: float


@torch.no_grad()
def measure_agreement(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[TokenRows], *, device: torch.device
) -> Agreement:
    """Run both models over the same rows.

    Raises:
        DataError: there is nothing to predict.
        NumericsError: a model gives values that are not finite.
    """
    begin = time.perf_counter()
    was_training = student.training
    student.eval()
    totals = torch.zeros(5, dtype=torch.float64)
    try:
        for batch in batches:
            ids_bl, valid_bl = batch.input_ids.to(device), batch.valid.to(device)
            predicted_bl = valid_bl[:, 1:]
            teacher_tv = teacher(input_ids=ids_bl, use_cache=False).logits[:, :-1][predicted_bl]
            student_tv = student(input_ids=ids_bl, use_cache=False).logits[:, :-1][predicted_bl]
            next_t = ids_bl[:, 1:][predicted_bl]
            rows = max(1, CHUNK_BYTES // (4 * teacher_tv.shape[-1]))
            for first in range(0, len(next_t), rows):
                chunk = slice(first, first + rows)
                totals += _chunk_totals(student_tv[chunk], teacher_tv[chunk], next_t[chunk])
    finally:
        student.train(was_training)
    tokens, student_nll, teacher_nll, kl, same = totals.tolist()
    if tokens == 0:
        raise DataError("the held-out text has no token to predict")
    if not math.isfinite(student_nll + teacher_nll + kl):
        raise NumericsError("student or teacher gives values that are not finite on the held-out text")
    return Agreement(
        int(tokens),
        math.exp(student_nll / tokens),
        math.exp(teacher_nll / tokens),
        kl / tokens,
        same / tokens,
        time.perf_counter() - begin,
    )


def _chunk_totals(student_tv: Tensor, teacher_tv: Tensor, next_t: Tensor) -> Tensor:
    """Sums over predictions: their number, both negative log-likelihoods, KL, agreements."""
    student_log, teacher_log = student_tv.float().log_softmax(-1), teacher_tv.float().log_softmax(-1)
    index = next_t.unsqueeze(-1)
    return torch.tensor(
        [
            len(next_t),
            -student_log.gather(-1, index).double().sum().item(),
            -teacher_log.gather(-1, index).double().sum().item(),
            (teacher_log.exp() * (teacher_log - student_log)).sum(-1).double().sum().item(),
            (student_log.argmax(-1) == teacher_log.argmax(-1)).sum().item(),
        ],
        dtype=torch.float64,
    )
