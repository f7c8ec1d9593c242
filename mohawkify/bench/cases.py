"""The benchmarked operators: each one's forms, ours and others', on the same random tensors.

Shapes: b batch, l length, h heads, p head width, n state width, d model width, v vocabulary, k convolution taps,
f features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawkify.bench import peers
from mohawkify.ops.chunked_kl import LMHeadInput, chunked_distill_loss
from mohawkify.ops.conv import causal_conv
from mohawkify.ops.decode import decode_step
from mohawkify.ops.losses import distill_loss
from mohawkify.ops.matrix_distance import orient_loss
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix, orient_loss_direct
from mohawkify.ops.scan import scan_chunked, scan_recurrent

Sizes = dict[str, int]
Inputs = dict[str, Tensor]
Form = Callable[[Inputs], tuple[Tensor | None, ...]]  # None for a result that a form does not give
FOREIGN = "peer: "  # begins the name of a form that is not ours
# What a form may be off in the worst of its tensors, by the precision of its inputs.
ALLOWED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}
KERNELS = {  # of ours that need a GPU: case to module and function
    "scan": ("mohawkify.ops.triton_scan", "scan_triton"),
    "orient": ("mohawkify.ops.triton_matrix_distance", "orient_loss_triton"),
    "decode_step": ("mohawkify.ops.triton_decode", "decode_step"),
}


@dataclass(frozen=True)
class Case:
    """One operator.

    Args:
        build: random inputs of given sizes in float32, and the names of those with gradients.
        plain: the definition, which is run in float64 as the reference of the others.
        forms: those that are checked and timed; the names of others' begin with `FOREIGN`.
        base: the form that others' times are given as ratios of.
        checked_at: sizes of the check of errors, which may be smaller: rows and heads are independent.
        small: sizes that load whatever a form needs before its memory is measured.
    """

    name: str
    build: Callable[[Sizes, torch.Generator], tuple[Inputs, tuple[str, ...]]]
    plain: Form
    forms: dict[str, Form]
    base: str
    sizes: Sizes
    checked_at: Sizes
    quick: Sizes
    small: Sizes = field(default_factory=dict)


def make_inputs(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, tuple[str, ...]]:
    """The tensors of a case, the same for the same sizes, and the names of those with gradients."""
    inputs, learned = case.build(sizes, torch.Generator().manual_seed(0))
    return cast_inputs(inputs, dtype, device), learned


def cast_inputs(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Copies in another precision, without gradients."""
    return {
        name: tensor.detach().to(device, dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in inputs.items()
    }


def run_form(form: Form, inputs: Inputs, learned: tuple[str, ...]) -> dict[str, Tensor]:
    """The results of a form and, where inputs are learned, their gradients."""
    for name in learned:
        inputs[name].requires_grad_()
    if not learned:
        with torch.no_grad():
            return _named(form(inputs))
    results = _named(form(inputs))
    reached = [result for result in results.values() if result.requires_grad]
    leaves = [inputs[name] for name in learned]
    gradients = torch.autograd.grad(reached, leaves, grad_outputs=[_weights(result) for result in reached])
    found = {name: result.detach() for name, result in results.items()}
    return found | {f"gradient of {name}": grad for name, grad in zip(learned, gradients, strict=True)}


def _named(results: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {f"result {place}": result for place, result in enumerate(results) if result is not None}


def _weights(result: Tensor) -> Tensor:
    """Gradients to start from: 1 for a loss; for more, weights that differ from feature to feature."""
    if result.dim() == 0:
        return torch.ones_like(result)
    features = torch.arange(result.shape[-1], device=result.device, dtype=torch.float32)
    return torch.cos(0.7 * features).to(result.dtype).expand(result.shape).contiguous()


def find_cases(device: torch.device) -> dict[str, Case]:
    """All cases, with the peers that are installed."""
    cases = (scan_case(device), orient_case(device), distill_case(device), conv_case(), step_case(device))
    return {case.name: case for case in cases}


def scan_case(device: torch.device) -> Case:
    """The scan, forward and backward."""

    def build(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
        tokens = (sizes["batch"], sizes["length"], sizes["heads"])
        inputs = {
            "x": _normal(*tokens, sizes["head_dim"], generator=generator),
            "b": _normal(*tokens, sizes["state_size"], generator=generator) / sizes["state_size"] ** 0.5,
            "c": _normal(*tokens, sizes["state_size"], generator=generator),
            "log_decay": -F.softplus(_normal(*tokens, generator=generator)),
        }
        return inputs, tuple(inputs)

    def form_of(scan: Callable[..., tuple[Tensor, Tensor]]) -> Form:
        return lambda i: scan(i["x"], i["b"], i["c"], i["log_decay"])

    forms = {"chunked": form_of(scan_chunked)}
    forms |= {name: form_of(scan) for name, scan in _kernel(device, "scan").items()}
    forms |= {FOREIGN + name: form_of(scan) for name, scan in peers.scan_peers(device).items()}
    width = {"head_dim": 64, "state_size": 64}
    return Case(
        "scan", build, form_of(scan_recurrent), forms, FOREIGN + "ssd_minimal",
        sizes={"batch": 4, "length": 1024, "heads": 16, **width},
        checked_at={"batch": 1, "length": 1024, "heads": 2, **width},
        quick={"batch": 1, "length": 128, "heads": 2, "head_dim": 8, "state_size": 16},
        small={"batch": 1, "length": 64, "heads": 2, **width},
    )  # fmt: skip


def orient_case(device: torch.device) -> Case:
    """Stage 1's distance with gradients."""

    def build(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
        batch, length, heads = sizes["batch"], sizes["length"], sizes["heads"]
        rows = (batch, heads, length, sizes["head_dim"])
        tokens = (batch, length, heads)
        inputs = {
            "b": _normal(*tokens, sizes["state_size"], generator=generator) / sizes["state_size"] ** 0.5,
            "c": _normal(*tokens, sizes["state_size"], generator=generator),
            "log_decay": -F.softplus(_normal(*tokens, generator=generator) - 3.0),
            "d": _normal(heads, generator=generator),
            "q": _normal(*rows, generator=generator),
            "k": _normal(*rows, generator=generator),
            "mask": torch.ones(length, length, dtype=torch.bool).tril()[None, None],
        }
        return inputs, ("b", "c", "log_decay", "d")

    def form_of(loss: Callable[..., tuple[Tensor, Tensor]]) -> Form:
        def run(i: Inputs) -> tuple[Tensor, ...]:
            attention = AttentionMatrix(i["q"], i["k"], i["q"].shape[-1] ** -0.5, i["mask"])
            return loss(MixingMatrix(i["b"], i["c"], i["log_decay"], i["d"]), attention, None)

        return run

    forms = {"direct": form_of(orient_loss_direct), "bands": form_of(orient_loss)}
    forms |= {name: form_of(loss) for name, loss in _kernel(device, "orient").items()}
    width = {"head_dim": 64, "state_size": 64}
    return Case(
        "orient", build, form_of(orient_loss_direct), forms, "direct",
        sizes={"batch": 1, "length": 2048, "heads": 16, **width},
        checked_at={"batch": 1, "length": 2048, "heads": 1, **width},
        quick={"batch": 1, "length": 96, "heads": 2, "head_dim": 8, "state_size": 16},
        small={"batch": 1, "length": 64, "heads": 2, **width},
    )  # fmt: skip


def distill_case(device: torch.device) -> Case:
    """Stage 3's loss with gradients, from hidden states and both heads."""

    def build(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
        tokens, width, vocabulary = sizes["tokens"], sizes["width"], sizes["vocabulary"]
        inputs = {
            "student": _normal(1, tokens, width, generator=generator),
            "student_head": _normal(vocabulary, width, generator=generator) / width**0.5,
            "teacher": _normal(1, tokens, width, generator=generator),
            "teacher_head": _normal(vocabulary, width, generator=generator) / width**0.5,
        }
        return inputs, ("student", "student_head")

    def counts(i: Inputs) -> Tensor:
        return torch.ones(i["student"].shape[:2], dtype=torch.bool, device=i["student"].device)

    def direct(i: Inputs) -> tuple[Tensor, ...]:
        student_blv = F.linear(i["student"], i["student_head"])
        return distill_loss(student_blv, F.linear(i["teacher"], i["teacher_head"]), counts(i))

    def chunks(i: Inputs) -> tuple[Tensor, ...]:
        student, teacher = LMHeadInput(i["student"], i["student_head"]), LMHeadInput(i["teacher"], i["teacher_head"])
        return chunked_distill_loss(student, teacher, counts(i))

    def foreign(loss: Callable[..., Tensor]) -> Form:
        """A peer gives the KL divergence alone, which has the gradients of the cross-entropy."""

        def run(i: Inputs) -> tuple[Tensor | None, ...]:
            return None, loss(i["student"][0], i["student_head"], i["teacher"][0], i["teacher_head"])

        return run

    forms: dict[str, Form] = {"direct": direct, "chunks": chunks}
    forms |= {FOREIGN + name: foreign(loss) for name, loss in peers.distill_peers(device).items()}
    return Case(
        "distill", build, direct, forms, "direct",
        sizes={"tokens": 1024, "width": 256, "vocabulary": 128256},
        checked_at={"tokens": 48, "width": 256, "vocabulary": 32000},
        quick={"tokens": 24, "width": 8, "vocabulary": 97},
    )  # fmt: skip


def conv_case() -> Case:
    """The short convolution, forward and backward."""

    def build(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
        inputs = {
            "u": _normal(sizes["batch"], sizes["length"], sizes["features"], generator=generator),
            "weight": _normal(sizes["features"], sizes["taps"], generator=generator),
            "bias": _normal(sizes["features"], generator=generator),
        }
        return inputs, tuple(inputs)

    def taps(i: Inputs) -> tuple[Tensor, ...]:
        return causal_conv(i["u"], i["weight"], i["bias"])[:1]

    def library(i: Inputs) -> tuple[Tensor, ...]:
        num_lags = i["weight"].shape[1] - 1
        padded_bfl = F.pad(i["u"].transpose(1, 2), (num_lags, 0))
        return (F.conv1d(padded_bfl, i["weight"].unsqueeze(1), i["bias"], groups=len(i["bias"])).transpose(1, 2),)

    return Case(
        "conv", build, library, {"taps": taps, FOREIGN + "conv1d": library}, FOREIGN + "conv1d",
        sizes={"batch": 4, "length": 1024, "features": 1024, "taps": 4},
        checked_at={"batch": 1, "length": 1024, "features": 64, "taps": 4},
        quick={"batch": 1, "length": 32, "features": 16, "taps": 4},
    )  # fmt: skip


def step_case(device: torch.device) -> Case:
    """One token between a mixer's projections; the memory is moved on in place by every call."""

    def build(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
        batch, heads = sizes["batch"], sizes["heads"]
        wide, narrow = heads * sizes["head_dim"], heads * sizes["state_size"]
        num_features = wide + 2 * narrow
        return {
            "x": _normal(batch, wide, generator=generator),
            "b": _normal(batch, narrow, generator=generator) / sizes["state_size"] ** 0.5,
            "c": _normal(batch, narrow, generator=generator),
            "z": _normal(batch, wide, generator=generator),
            "a_log": _normal(batch, heads, generator=generator),
            "weight": _normal(num_features, sizes["taps"], generator=generator),
            "bias": _normal(num_features, generator=generator),
            "z_bias": _normal(wide, generator=generator),
            "d": _normal(heads, generator=generator),
            "tail": _normal(batch, sizes["taps"] - 1, num_features, generator=generator),
            "state": _normal(batch, heads, sizes["head_dim"], sizes["state_size"], generator=generator),
        }, ()

    def stepping(step: Callable[..., Tensor]) -> Form:
        def run(i: Inputs) -> tuple[Tensor, ...]:
            convs = (i["weight"], i["bias"])
            memory = (i["tail"], i["state"])
            out_bf = step(i["x"], i["b"], i["c"], i["z"], i["a_log"], convs, i["z_bias"], i["d"], *memory)
            return out_bf, *memory

        return run

    def by_parts(i: Inputs) -> tuple[Tensor, ...]:
        """Through the operators of whole sequences, as a sequence of one."""
        u_blf = torch.cat([i["x"], i["b"], i["c"]], dim=-1).unsqueeze(1)
        y_blf, tail_bkf = causal_conv(u_blf, i["weight"], i["bias"], i["tail"])
        heads = len(i["d"])
        parts = y_blf.split([i["x"].shape[-1], i["b"].shape[-1], i["c"].shape[-1]], dim=-1)
        x, b, c = (part.unflatten(-1, (heads, -1)) for part in parts)
        y, state_bhpn = scan_recurrent(x, b, c, -F.softplus(i["a_log"]).unsqueeze(1), i["state"])
        out_bf = (y + i["d"].unsqueeze(-1) * x).flatten(2)[:, 0] * F.silu(i["z"] + i["z_bias"])
        return out_bf, tail_bkf, state_bhpn

    forms: dict[str, Form] = {"parts": by_parts, "in place": stepping(decode_step)}
    forms |= {name: stepping(step) for name, step in _kernel(device, "decode_step").items()}
    width = {"head_dim": 64, "state_size": 64, "taps": 4}
    return Case(
        "decode_step", build, by_parts, forms, "parts",
        sizes={"batch": 16, "heads": 12, **width},
        checked_at={"batch": 2, "heads": 2, **width},
        quick={"batch": 2, "heads": 2, "head_dim": 8, "state_size": 16, "taps": 4},
    )  # fmt: skip


def _kernel(device: torch.device, case: str) -> dict[str, Any]:
    """Our kernel for a case, if there is a GPU."""
    found = peers.find_function(*KERNELS[case]) if device.type == "cuda" else None
    return {} if found is None else {"triton": found}


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def task_of(case: Case, form: str, sizes: Sizes) -> dict[str, Any]:
    """The task of `mohawkify.bench.child` that measures a form's memory."""
    return {"kind": "op", "case": case.name, "form": form, "sizes": sizes}
