"""How closely a student follows its teacher on held-out text.

Shapes: b batch, l length, t predicted tokens, v vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.data.validation import EvaluationBatch
from mohawkify.errors import DataError, NumericsError
from mohawkify.families.autodetect import find_classes
from mohawkify.ops.chunked_kl import head_logits
from mohawkify.student.save import TYPE_PREFIX
from mohawkify.teacher.lm_head import run_to_lm_head

MAX_COPY_BYTES = 256 * 1024 * 1024  # of float32 copies of logits that exist at a time
_COPIES = 7  # live at the peak of `_add_chunk`: both logits, both log-softmaxes, the probabilities, two temporaries
_LARGEST_EXPONENT = 700.0  # exp of a mean loss beyond this is not a float64


@dataclass(frozen=True)
class Fidelity:
    """A student against its teacher, over the same predicted tokens.

    Args:
        tokens: how many next-token predictions were compared.
        perplexity: the student's, exp of its mean loss in nats.
        teacher_perplexity: the teacher's.
        kl: mean KL(teacher || student) in nats per token.
        top1: share of positions where both find the same token most likely, 0 to 1.
        seconds: wall time of the measurement.
    """

    tokens: int
    perplexity: float
    teacher_perplexity: float
    kl: float
    top1: float
    seconds: float


def _call(function: Callable[..., None], *args: object) -> None:
    function(*args)


@dataclass(frozen=True)
class Processes:
    """How processes that hold a student together measure it, each a part of the batches.

    Args:
        add_up: adds up sums over them, by name.
        call: calls a function that runs the student, whose parameters an engine may hold in parts.
    """

    add_up: Callable[[dict[str, float]], dict[str, float]] = dict
    call: Callable[..., None] = _call


@dataclass
class _Sums:
    """Running sums over predicted tokens, in Python's float64."""

    tokens: float = 0.0
    student_loss: float = 0.0
    teacher_loss: float = 0.0
    kl: float = 0.0
    same_top: float = 0.0


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put models into evaluation mode, without gradients, and give every submodule its previous mode back."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def measure_fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[EvaluationBatch],
    *,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    processes: Processes = Processes(),
) -> Fidelity:
    """Compare a student with its teacher in one pass over held-out text.

    A position counts where its next token is real. Losses are computed in float32 and added in float64.

    Args:
        student: a causal language model on ``device``.
        teacher: one with the same vocabulary, on ``device``.
        batches: right-padded rows; causal models need no attention mask for them.
        device: where the models are.
        progress: receives the number of predicted tokens so far, after every batch.
        processes: how several of them measure together.

    Raises:
        DataError: the batches hold no predicted token.
        NumericsError: a logit of either model is not finite.
    """
    begin = time.perf_counter()
    sums = _Sums()
    teacher_reader, student_reader = _Reader(teacher), _Reader(student)
    with evaluating(student, teacher):
        for batch in batches:
            input_ids_bl = batch.input_ids.to(device)
            parts = sums, input_ids_bl, batch.valid.to(device), teacher_reader, student_reader
            processes.call(_add_batch, *parts)
            if progress is not None:
                progress(int(sums.tokens))
    sums = _Sums(**processes.add_up({name: float(value) for name, value in asdict(sums).items()}))
    _require_tokens(sums)
    return Fidelity(
        tokens=int(sums.tokens),
        perplexity=_perplexity("student", sums.student_loss, sums.tokens),
        teacher_perplexity=_perplexity("teacher", sums.teacher_loss, sums.tokens),
        kl=sums.kl / sums.tokens,
        top1=sums.same_top / sums.tokens,
        seconds=time.perf_counter() - begin,
    )


def measure_perplexity(teacher: PreTrainedModel, batches: Iterable[EvaluationBatch]) -> float:
    """The perplexity of one model, over the tokens that `measure_fidelity` counts; raises what it raises."""
    sums, reader = _Sums(), _Reader(teacher)
    with evaluating(teacher):
        for batch in batches:
            input_ids_bl = batch.input_ids.to(teacher.device)
            _add_batch(sums, input_ids_bl, batch.valid.to(teacher.device), reader, None)
    _require_tokens(sums)
    return _perplexity("teacher", sums.teacher_loss, sums.tokens)


class _Reader:
    """Runs a model; where its family is known, logits are computed a few tokens at a time.

    Args:
        model: a teacher or a student.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapter = find_classes(model.config.model_type.removeprefix(TYPE_PREFIX))

    def read(self, input_ids_bl: Tensor) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        """Run the model; returns what maps rows and columns of tokens to logits (t, v) in float32."""
        if self.adapter.logits.unknown is not None:
            logits_blv = self.model(input_ids=input_ids_bl, use_cache=False).logits
            return lambda positions: logits_blv[positions].float()
        head = run_to_lm_head(self.model, self.adapter, input_ids=input_ids_bl, use_cache=False)
        return lambda positions: head_logits(head._replace(hidden_bld=head.hidden_bld[positions])).float()


def _add_batch(sums: _Sums, input_ids_bl: Tensor, valid_bl: Tensor, teacher: _Reader, student: _Reader | None) -> None:
    """Add a batch's predictions in chunks, so that logits and their copies stay small however large the batch is."""
    rows, columns = valid_bl[:, 1:].nonzero(as_tuple=True)
    next_ids_t = input_ids_bl[rows, columns + 1]
    teacher_logits = teacher.read(input_ids_bl)
    student_logits = None if student is None else student.read(input_ids_bl)
    tokens_per_chunk = max(1, MAX_COPY_BYTES // (_COPIES * teacher.model.config.vocab_size * 4))
    for first in range(0, len(next_ids_t), tokens_per_chunk):
        positions = rows[first : first + tokens_per_chunk], columns[first : first + tokens_per_chunk]
        student_tv = None if student_logits is None else student_logits(positions)
        _add_chunk(sums, next_ids_t[first : first + tokens_per_chunk], teacher_logits(positions), student_tv)


def _add_chunk(sums: _Sums, next_ids_t: Tensor, teacher_tv: Tensor, student_tv: Tensor | None) -> None:
    teacher_log_tv = torch.log_softmax(teacher_tv, dim=-1)
    sums.tokens += len(next_ids_t)
    sums.teacher_loss += _total("teacher", _loss(teacher_log_tv, next_ids_t))
    if student_tv is None:
        return
    student_log_tv = torch.log_softmax(student_tv, dim=-1)
    sums.student_loss += _total("student", _loss(student_log_tv, next_ids_t))
    kl_t = (teacher_log_tv.exp() * (teacher_log_tv - student_log_tv)).sum(dim=-1)
    sums.kl += _total("teacher or the student", kl_t)
    sums.same_top += int((teacher_tv.argmax(dim=-1) == student_tv.argmax(dim=-1)).sum())


def _loss(log_probabilities_tv: Tensor, next_ids_t: Tensor) -> Tensor:
    return -log_probabilities_tv.gather(-1, next_ids_t.unsqueeze(-1)).squeeze(-1)


def _total(whose: str, values_t: Tensor) -> float:
    """The sum in float64, which some devices cannot hold: so on the CPU."""
    total = values_t.cpu().double().sum().item()
    if not math.isfinite(total):
        raise NumericsError(
            f"the logits of the {whose} are not finite on held-out text, expected numbers",
            hint="look for NaN in the weights; a run in bf16 or fp16 may have overflowed",
        )
    return total


def _require_tokens(sums: _Sums) -> None:
    if sums.tokens == 0:
        raise DataError("the held-out text has no token to predict, expected rows of two tokens or more")


def _perplexity(whose: str, loss: float, tokens: float) -> float:
    mean = loss / tokens
    if mean > _LARGEST_EXPONENT:
        raise NumericsError(f"the {whose}'s mean loss is {mean:.3g} nats per token, expected one with a perplexity")
    return math.exp(mean)
