"""How closely a written export follows its run: their logits on the same text.

Shapes: l length, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mohawkify.errors import ExportError

LOGIT_TOLERANCE = 1e-4  # of float32, relative to the largest logit (at least 1)
# Nats by which the run may prefer its own first choice to the export's while the two count as a tie. bfloat16 measured:
# up to 0.13 for trained students, which plain top-1 of 99.9 % therefore does not allow for; of random ones of all
# families mixtures lose up to nine tokens of 640 by a nat, whose experts change, and sharp attention up to two.
TIE = 1.0
LEAST_NEAR_TOP1 = 0.97
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
        near_top1: share of tokens where the run puts the export's first choice less than `TIE` nats behind its own.
        run_perplexity: the run's perplexity on the text.
        perplexity: the export's.
        tokens: how many tokens were compared.
    """

    max_logit_difference: float
    scale: float
    kl: float
    top1: float
    near_top1: float
    run_perplexity: float
    perplexity: float
    tokens: int


@torch.no_grad()
def compare(
    reference: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], texts: Sequence[Tensor]
) -> Agreement:
    """Compare the logits of two models, a text at a time.

    Args:
        reference: maps token ids (1, l) to the run's logits (1, l, v).
        exported: the same of the export.
        texts: token ids (l,) of each, of at least two tokens.

    Raises:
        ExportError: the run's logits or the export's are not finite.
    """
    difference, scale, kl, same, near, run_loss, loss = 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0
    for ids_l in tqdm(texts, "comparing the export with the run", delay=1.0, leave=False, disable=None):
        expected_lv, actual_lv = reference(ids_l[None])[0].float(), exported(ids_l[None])[0].float()
        require_finite_run(expected_lv)
        if not torch.isfinite(actual_lv).all():
            raise ExportError("the export computes logits that are not finite", hint="try --dtype float32")
        difference = max(difference, (expected_lv - actual_lv).abs().max().item())
        scale = max(scale, expected_lv.abs().max().item())
        expected_log_lv, actual_log_lv = expected_lv.log_softmax(-1), actual_lv.log_softmax(-1)
        kl += (expected_log_lv.exp() * (expected_log_lv - actual_log_lv)).sum().item()
        choice_l = actual_lv.argmax(-1)
        behind_l = expected_lv.max(-1).values - expected_lv.gather(-1, choice_l[:, None])[:, 0]
        same += int((expected_lv.argmax(-1) == choice_l).sum())
        near += int((behind_l < TIE).sum())
        run_loss += _loss(expected_log_lv, ids_l)
        loss += _loss(actual_log_lv, ids_l)
    tokens, predicted = sum(len(ids_l) for ids_l in texts), sum(len(ids_l) - 1 for ids_l in texts)
    return Agreement(
        max_logit_difference=difference,
        scale=scale,
        kl=max(kl / tokens, 0.0),
        top1=same / tokens,
        near_top1=near / tokens,
        run_perplexity=_perplexity(run_loss / predicted),
        perplexity=_perplexity(loss / predicted),
        tokens=tokens,
    )


def _loss(log_probs_lv: Tensor, ids_l: Tensor) -> float:
    """Nats that the tokens behind the first one cost, all together."""
    return -log_probs_lv[:-1].gather(-1, ids_l[1:, None]).sum().item()


def _perplexity(nats: float) -> float:
    return torch.tensor(nats, dtype=torch.float64).exp().item()  # infinite where Python's would overflow


def require_finite_run(logits: Tensor) -> None:
    """Refuse a run that computes logits that are not finite; raises ExportError."""
    if not torch.isfinite(logits).all():
        raise ExportError(
            "the run computes logits that are not finite",
            hint="`mohawkify doctor RUN` checks its weights against its records",
        )


def require_same_model(agreement: Agreement) -> None:
    """Refuse another library's model that is not the run's, before rounding hides it.

    Args:
        agreement: what `compare` found for the model in float32.

    Raises:
        ExportError: it computes something else.
    """
    if not agreement.kl <= LARGEST_KL_UNROUNDED:  # which is no number either
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
        if not agreement.max_logit_difference <= allowed:
            raise ExportError(
                f"the export's logits differ by {agreement.max_logit_difference:.3g} from the run's, "
                f"allowed {allowed:.3g}",
                hint=OTHER_MODEL,
            )
    largest = LARGEST_KL[bits]
    if not agreement.kl <= largest:
        raise ExportError(
            f"the export is {agreement.kl:.3g} nats per token away from its run, allowed {largest:g}",
            hint="export with --dtype float32, or with more bits",
        )
    if bits is None and not agreement.near_top1 >= LEAST_NEAR_TOP1:
        raise ExportError(
            f"the export's first choice is no near choice of its run for {1 - agreement.near_top1:.2%} of the tokens, "
            f"allowed {1 - LEAST_NEAR_TOP1:.1%}",
            hint="export with --dtype float32",
        )
