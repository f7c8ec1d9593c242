"""How closely a written export follows its run: logits on text that the student itself writes.

Text of its own needs no data, is what the model will see in use, and is the same for every export of a run.

Shapes: b sequences, l length, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mohawkify.errors import ExportError

NUM_SEQUENCES = 4
LENGTH = 160  # longer than a chunk of either scan; less where the model has fewer positions
LOGIT_TOLERANCE = 1e-4  # of float32, relative to the largest logit (at least 1)
# Nats per token, by bits; beyond it an export is broken, not just coarse: a hardly trained student reaches 1.3 with 4.
LARGEST_KL: dict[int | None, float] = {None: 0.1, 8: 0.5, 4: 2.0}
# Before anything is rounded: another GELU costs 1e-6, another rotation in a single kept layer far more than this.
LARGEST_KL_UNROUNDED = 1e-3
OTHER_MODEL = "mlx-lm's model of a family may compute something else than the teacher: export to hf instead"


@dataclass(frozen=True)
class Agreement:
    """An export against its run.

    Args:
        max_logit_difference: the largest absolute difference of two logits.
        scale: the run's largest absolute logit.
        kl: KL(run || export) in nats per token.
        top1: share of tokens where both prefer the same next token.
        tokens: how many tokens were compared.
    """

    max_logit_difference: float
    scale: float
    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def sample_ids(student: Any, seed: int = 0) -> Tensor:
    """Let the student write, sampling at temperature 1 from its start token; returns token ids (b, l)."""
    generator = torch.Generator().manual_seed(seed)
    first = student.config.bos_token_id
    length = min(LENGTH, getattr(student.config, "max_position_embeddings", None) or LENGTH)
    ids_bl = torch.full((NUM_SEQUENCES, 1), 0 if first is None else first)
    memory, newest = None, ids_bl
    while ids_bl.shape[1] < length:
        output = student(newest, past_key_values=memory, use_cache=True, logits_to_keep=1)
        memory = output.past_key_values
        newest = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids_bl = torch.cat([ids_bl, newest], dim=1)
    return ids_bl


@torch.no_grad()
def compare(reference: Callable[[Tensor], Tensor], found: Callable[[Tensor], Tensor], ids_bl: Tensor) -> Agreement:
    """Compare the logits of two models, a sequence at a time.

    Args:
        reference: maps token ids (1, l) to the run's logits (1, l, v).
        found: the same of the export.
        ids_bl: token ids.

    Raises:
        ExportError: the export's logits are not finite.
    """
    difference, scale, kl, same = 0.0, 0.0, 0.0, 0
    for ids_l in ids_bl:
        expected_lv, actual_lv = reference(ids_l[None])[0].float(), found(ids_l[None])[0].float()
        if not torch.isfinite(actual_lv).all():
            raise ExportError("the export computes logits that are not finite", hint="try --dtype float32")
        difference = max(difference, (expected_lv - actual_lv).abs().max().item())
        scale = max(scale, expected_lv.abs().max().item())
        expected_log_lv, actual_log_lv = expected_lv.log_softmax(-1), actual_lv.log_softmax(-1)
        kl += (expected_log_lv.exp() * (expected_log_lv - actual_log_lv)).sum().item()
        same += int((expected_lv.argmax(-1) == actual_lv.argmax(-1)).sum())
    tokens = ids_bl.numel()
    return Agreement(difference, scale, max(kl / tokens, 0.0), same / tokens, tokens)


def require_same_model(agreement: Agreement) -> None:
    """Refuse another library's model that is not the run's, before rounding hides it.

    Args:
        agreement: what `compare` found for the model in float32.

    Raises:
        ExportError: it computes something else.
    """
    if agreement.kl > LARGEST_KL_UNROUNDED:
        raise ExportError(
            f"the export is {agreement.kl:.3g} nats per token away from its run before it is rounded, "
            f"allowed {LARGEST_KL_UNROUNDED:g}",
            hint=OTHER_MODEL,
        )


def require_agreement(agreement: Agreement, dtype: str, bits: int | None) -> None:
    """Refuse an export that does not compute what its run computes.

    Args:
        agreement: what `compare` found.
        dtype: of the weights that are not quantised.
        bits: of the quantised ones, None where there are none.

    Raises:
        ExportError: the difference is beyond rounding.
    """
    if dtype == "float32" and bits is None:
        allowed = LOGIT_TOLERANCE * max(1.0, agreement.scale)
        if agreement.max_logit_difference > allowed:
            raise ExportError(
                f"the export's logits differ by {agreement.max_logit_difference:.3g} from the run's, "
                f"allowed {allowed:.3g}",
                hint=OTHER_MODEL,
            )
    largest = LARGEST_KL[bits]
    if agreement.kl > largest:
        raise ExportError(
            f"the export is {agreement.kl:.3g} nats per token away from its run, allowed {largest:g}",
            hint="export with --dtype float32, or with more bits",
        )
