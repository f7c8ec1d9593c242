"""Stage 3's loss from hidden states and both heads, some tokens at a time: no matrix of tokens by vocabulary.

The gradient of the logits is softmax(student) - softmax(teacher), a function of the logits alone: so the forward pass
of a chunk of tokens makes them, takes its loss, multiplies their gradient back through the head, and forgets them. What
stays is the gradients of hidden states, weight and bias (docs/math.md). The sums run over chunks in float32 at least.

Memory beside inputs and gradients: three matrices (one more under a soft-cap or with a top-k teacher) of
`chunk_tokens` rows and v columns in float32.

Shapes: b batch, l length, n counted tokens, t tokens of a chunk, d width of the hidden states, which may differ between
both sides, v vocabulary, k listed tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawkify.ops.constants import chunk_tokens
from mohawkify.ops.losses import TopK, require_temperature_of_one


class LMHeadInput(NamedTuple):
    """The inputs of the logits: with z = (hidden weight^T + bias) scale, they are z, or softcap tanh(z / softcap).

    Args:
        hidden_bld: hidden states after the last norm.
        weight_vd: the head's weight.
        bias_v: its bias, if it has one.
        scale: what its output is multiplied by.
        softcap: the largest magnitude of a logit, if there is one.
    """

    hidden_bld: Tensor
    weight_vd: Tensor
    bias_v: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head_logits(head: LMHeadInput) -> Tensor:
    """All logits of a head, differentiable, in float32 at least: the plain form of what the chunks compute."""
    logits = torch.nn.functional.linear(head.hidden_bld, head.weight_vd)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if head.bias_v is None else logits + head.bias_v
    logits = logits if head.scale == 1.0 else logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def chunked_distill_loss(
    student: LMHeadInput, teacher: LMHeadInput | TopK, counts_bl: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean over counted tokens of the soft cross-entropy from teacher to student, and of the KL divergence in it.

    The same metrics and gradients as `distill_loss` and `distill_loss_top_k` of the logits, to rounding. Gradients
    reach the student's hidden states, weight and bias, those of them that require one. Under autocast the products with
    the heads are taken in its precision, all else in float32 at least.

    Args:
        student: the student's hidden states and head.
        teacher: the teacher's, over the same vocabulary; or its likeliest tokens, with temperature 1 alone.
        counts_bl: which tokens count; where none does, the loss is 0.
        temperature: T.

    Returns:
        The soft cross-entropy, and KL(teacher || student) in nats per token (detached). Their gradients are equal.

    Raises:
        UsageError: a temperature other than 1 with a top-k teacher.

    Source: docs/math.md (19), (21) and (22).
    """
    if isinstance(teacher, TopK):
        require_temperature_of_one(temperature)
        counted: LMHeadInput | TopK = TopK(*(tensor[counts_bl] for tensor in teacher))
    else:
        counted = _in_precision(teacher._replace(hidden_bld=teacher.hidden_bld.detach()[counts_bl]))
    hidden_nd = student.hidden_bld[counts_bl]
    is_learning = torch.is_grad_enabled()
    loss, kl = _DistillLoss.apply(
        hidden_nd, student.weight_vd, student.bias_v, student.scale, student.softcap, counted, temperature, is_learning
    )
    return loss, kl


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        scale: float,
        softcap: float | None,
        teacher: LMHeadInput | TopK,
        temperature: float,
        is_learning: bool,
    ) -> tuple[Tensor, Tensor]:
        student = _in_precision(LMHeadInput(hidden_nd, weight_vd, bias_v, scale, softcap))
        wanted = tuple(is_learning and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden_nd.device.type, enabled=False):
            kl, entropy, gradients = _sum_over_chunks(student, teacher, temperature, wanted)
        num_tokens = max(len(hidden_nd), 1)
        # What the gradient of every logit is multiplied by, left to the backward pass: it multiplies anyway.
        ctx.factor = scale * temperature / num_tokens
        ctx.dtypes = hidden_nd.dtype, weight_vd.dtype, None if bias_v is None else bias_v.dtype
        ctx.save_for_backward(*gradients)
        dtype = _accumulated(student)
        kl, entropy = ((total * (temperature**2 / num_tokens)) for total in (kl, entropy))
        loss, kl = (kl + entropy).to(dtype), kl.to(dtype)
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[0] * ctx.factor
        gradients = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None, None


def _sum_over_chunks(
    student: LMHeadInput, teacher: LMHeadInput | TopK, temperature: float, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Sums of KL divergence and entropy, with the gradients of hidden states, weight and bias that are wanted."""
    hidden_nd, weight_vd = student.hidden_bld, student.weight_vd
    dtype, device = _accumulated(student), hidden_nd.device
    exact = dtype if device.type == "mps" else torch.float64
    kl, entropy = (torch.zeros((), dtype=exact, device=device) for _ in range(2))
    shapes = hidden_nd.shape, weight_vd.shape, weight_vd.shape[:1]
    hidden_gradient, weight_gradient, bias_gradient = (
        torch.zeros(shape, dtype=dtype, device=device) if is_wanted else None
        for shape, is_wanted in zip(shapes, wanted, strict=True)
    )
    size = chunk_tokens(len(weight_vd))
    for begin in range(0, len(hidden_nd), size):
        part = slice(begin, begin + size)
        kl_t, entropy_t, gradient_tv = _compare(student, teacher, part, temperature, any(wanted))
        kl += kl_t.sum(dtype=exact)
        entropy += entropy_t.sum(dtype=exact)
        if gradient_tv is None:
            continue
        if bias_gradient is not None:
            bias_gradient += gradient_tv.sum(0)
        gradient_tv = gradient_tv.to(weight_vd.dtype)
        if hidden_gradient is not None:
            hidden_gradient[part] = gradient_tv @ weight_vd
        if weight_gradient is not None:
            _add_product(weight_gradient, gradient_tv, hidden_nd[part])
        del gradient_tv  # or it would stay while the next chunk's are made
    return kl, entropy, (hidden_gradient, weight_gradient, bias_gradient)


def _compare(
    student: LMHeadInput, teacher: LMHeadInput | TopK, part: slice, temperature: float, is_wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL divergence and entropy of a chunk's tokens, and the gradient of the student's logits before (1 / T) scale."""
    logits_tv = _chunk_logits(student, part)
    slope_tv = None
    if student.softcap is not None and is_wanted:
        slope_tv = (logits_tv / student.softcap).square_().neg_().add_(1.0)
    if temperature != 1.0:
        logits_tv.div_(temperature)
    student_log_tv = torch.log_softmax(logits_tv, dim=-1)
    del logits_tv  # a matrix of memory
    if isinstance(teacher, TopK):
        listed = TopK(*(tensor[part] for tensor in teacher))
        kl_t, entropy_t, gradient_tv = _against_top_k(student_log_tv, listed, is_wanted)
    else:
        kl_t, entropy_t, gradient_tv = _against_head(student_log_tv, teacher, part, temperature, is_wanted)
    if gradient_tv is not None and slope_tv is not None:
        gradient_tv.mul_(slope_tv)
    return kl_t, entropy_t, gradient_tv


def _against_head(
    student_log_tv: Tensor, teacher: LMHeadInput, part: slice, temperature: float, is_wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_compare`; overwrites the student's log-probabilities."""
    logits_tv = _chunk_logits(teacher, part)
    logits_tv = logits_tv if temperature == 1.0 else logits_tv.div_(temperature)
    teacher_log_tv = torch.log_softmax(logits_tv, dim=-1).to(student_log_tv.dtype)
    del logits_tv
    probabilities_tv = teacher_log_tv.exp()
    entropy_t = -_row_products(probabilities_tv, teacher_log_tv)
    kl_t = _row_products(probabilities_tv, teacher_log_tv.sub_(student_log_tv))
    gradient_tv = student_log_tv.exp_().sub_(probabilities_tv) if is_wanted else None
    return kl_t, entropy_t, gradient_tv


def _against_top_k(student_log_tv: Tensor, listed: TopK, is_wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_compare`; overwrites the student's log-probabilities."""
    ids_tk = listed.ids_blk
    teacher_log_tk = listed.log_probs_blk.to(student_log_tv.dtype)
    probabilities_tk = teacher_log_tk.exp()
    entropy_t = torch.special.entr(probabilities_tk).sum(-1)
    cross_entropy_t = -(probabilities_tk * student_log_tv.gather(-1, ids_tk)).sum(-1)
    mass_t1 = probabilities_tk.sum(-1, keepdim=True)
    rest_tv = None
    if ids_tk.shape[-1] < student_log_tv.shape[-1]:  # else there is nothing else
        rest_t = listed.log_rest_bl.to(student_log_tv.dtype).exp()
        rest_tv = student_log_tv.scatter(-1, ids_tk, -torch.inf)
        # Summed up from its own tokens: one minus the others would lose it where it is small.
        student_rest_t1 = rest_tv.logsumexp(-1, keepdim=True)
        entropy_t = entropy_t + torch.special.entr(rest_t)
        cross_entropy_t = cross_entropy_t - rest_t * student_rest_t1.squeeze(-1)
        mass_t1 = mass_t1 + rest_t.unsqueeze(-1)
        if is_wanted:
            rest_tv.sub_(student_rest_t1).exp_().mul_(rest_t.unsqueeze(-1))
    if not is_wanted:
        return cross_entropy_t - entropy_t, entropy_t, None
    gradient_tv = student_log_tv.exp_().mul_(mass_t1)
    if rest_tv is not None:
        gradient_tv.sub_(rest_tv)
    gradient_tv.scatter_(-1, ids_tk, gradient_tv.gather(-1, ids_tk) - probabilities_tk)
    return cross_entropy_t - entropy_t, entropy_t, gradient_tv


def _chunk_logits(head: LMHeadInput, part: slice) -> Tensor:
    """A chunk's logits in float32 at least, as `head_logits` makes them all."""
    logits_tv = head.hidden_bld[part] @ head.weight_vd.t()
    logits_tv = logits_tv.to(_accumulated(head))
    if head.bias_v is not None:
        logits_tv.add_(head.bias_v)
    if head.scale != 1.0:
        logits_tv.mul_(head.scale)
    if head.softcap is not None:
        logits_tv.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_tv


def _in_precision(head: LMHeadInput) -> LMHeadInput:
    """Hidden states and weight in the precision of their product: autocast's where it is on, else the wider of both."""
    device = head.hidden_bld.device.type
    dtype = torch.promote_types(head.hidden_bld.dtype, head.weight_vd.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    weight_vd = head.weight_vd.detach().to(dtype)
    bias_v = None if head.bias_v is None else head.bias_v.detach()
    return head._replace(hidden_bld=head.hidden_bld.detach().to(dtype), weight_vd=weight_vd, bias_v=bias_v)


def _accumulated(head: LMHeadInput) -> torch.dtype:
    return torch.promote_types(head.weight_vd.dtype, torch.float32)


def _row_products(left_tv: Tensor, right_tv: Tensor) -> Tensor:
    """The scalar product of each two rows, without the matrix of their products."""
    return torch.bmm(left_tv.unsqueeze(1), right_tv.unsqueeze(2)).flatten()


def _add_product(sum_vd: Tensor, gradient_tv: Tensor, hidden_td: Tensor) -> None:
    """Add a chunk's part of the weight's gradient; a product in lower precision is added a few rows at a time."""
    if sum_vd.dtype == gradient_tv.dtype:
        sum_vd.addmm_(gradient_tv.t(), hidden_td)
        return
    rows = chunk_tokens(sum_vd.shape[1])
    for begin in range(0, len(sum_vd), rows):
        sum_vd[begin : begin + rows] += gradient_tv[:, begin : begin + rows].t() @ hidden_td
