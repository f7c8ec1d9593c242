"""Which implementation of an operator runs, and why: plain torch everywhere, Triton on GPUs, two libraries on request.

`scan`, `orient_loss` and `step` take what their plain forms take, look where the tensors are and call the
implementation that `backend` names. The choice is an argument, `compute.kernels` of a recipe; no call leaves anything
behind for the next.

Shapes: b batch, l length, h heads, p head width, n state width, k convolution taps, f features.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mohawkify.errors import MissingExtraError, UsageError
from mohawkify.ops import matrix_distance
from mohawkify.ops.decode import decode_step
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix
from mohawkify.ops.scan import scan_chunked

Operator = Literal["scan", "orient_loss", "step"]

# Which operators an implementation has, the package it needs and the extra that brings it.
IMPLEMENTATIONS: dict[str, tuple[tuple[Operator, ...], str, str]] = {
    "triton": (("scan", "orient_loss", "step"), "triton", "cuda"),
    "fla": (("scan",), "fla", "cuda"),
    "mamba-ssm": (("scan",), "mamba_ssm", "mamba"),
}
LOWEST_CAPABILITY = (8, 0)  # of the GPU: the first with bfloat16 tensor cores
WIDEST = 256  # state or head of the Triton kernels; wider ones do not fit into registers
LARGEST_STATE = 32768  # numbers of one head's state in the Triton step, which holds them in registers


class Backend(NamedTuple):
    """An implementation, and why it is the one."""

    name: str
    reason: str


def backend(
    operator: Operator, device: torch.device, dtype: torch.dtype, kernels: str = "auto", width: int = 0
) -> Backend:
    """Choose the implementation of an operator.

    Args:
        operator: ``scan``, ``orient_loss`` or ``step``.
        kernels: ``auto`` or the name of an implementation; one that does not have the operator
            counts as ``auto``.
        width: the widest state or head.

    Returns:
        The requested implementation if it can run, else Triton if it can run, else plain torch; the reason explains
        the others cannot.
    """
    if kernels == "torch":
        return Backend("torch", "asked for")
    if device.type != "cuda":
        return Backend("torch", f"kernels run on CUDA devices, this is {device.type}")
    reasons = []
    if kernels in IMPLEMENTATIONS and operator in IMPLEMENTATIONS[kernels][0]:
        problem = _problem(kernels, device, dtype, width)
        if problem is None:
            return Backend(kernels, "asked for")
        reasons.append(problem)
    if kernels != "triton":
        problem = _problem("triton", device, dtype, width)
        if problem is None:
            return Backend("triton", "; ".join([*reasons, "the fastest for this device"]))
        reasons.append(problem)
    return Backend("torch", "; ".join(reasons))


def implementations(device: torch.device) -> list[tuple[str, tuple[Operator, ...], str | None]]:
    """All implementations with the operators they have, and why each cannot run on a device, None where it can."""
    found: list[tuple[str, tuple[Operator, ...], str | None]] = [("torch", ("scan", "orient_loss", "step"), None)]
    for name, (operators, package, extra) in IMPLEMENTATIONS.items():
        if device.type == "cuda":
            problem = _problem(name, device, torch.float32, 0)
        elif find_spec(package) is None:
            problem = f'not installed (pip install "mohawkify[{extra}]"), and no CUDA device'
        else:
            problem = "no CUDA device"
        found.append((name, operators, problem))
    return found


def require(kernels: str, device: torch.device) -> None:
    """Refuse a choice that can never be met here, before any work is done.

    Raises:
        UsageError: kernels are requested by name and the device is not a CUDA device, or too old.
        MissingExtraError: their package is not installed.
    """
    if kernels not in IMPLEMENTATIONS:
        return
    _, package, extra = IMPLEMENTATIONS[kernels]
    if device.type != "cuda":
        raise UsageError(
            f"compute.kernels: found {kernels} on the device {device.type}, expected a CUDA device",
            hint="use --set compute.kernels=auto",
        )
    if find_spec(package) is None:
        raise MissingExtraError(package, extra, f"compute.kernels={kernels}")
    problem = _problem(kernels, device, torch.float32, 0)
    if problem is not None:
        raise UsageError(f"compute.kernels: found {kernels}, but {problem}", hint="use --set compute.kernels=auto")


def scan(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The scan of `scan.scan_chunked` by the implementation that `backend` names."""
    chosen = _chosen("scan", x_blhp.device, x_blhp.dtype, kernels, b_blhn.shape[-1])
    run = scan_chunked
    if chosen == "triton":
        from mohawkify.ops.triton_scan import scan_triton as run  # type: ignore[assignment]
    elif chosen != "torch":
        from mohawkify.ops import libraries

        run = libraries.scan_fla if chosen == "fla" else libraries.scan_mamba_ssm  # type: ignore[assignment]
    return run(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, document_starts_bl)


def orient_loss(
    mixing: MixingMatrix,
    attention: AttentionMatrix,
    document_starts_bl: Tensor | None,
    weights_bhs: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss of `matrix_distance.orient_loss` by the implementation that `backend` names; plain torch if weighted."""
    if weights_bhs is not None:
        return matrix_distance.orient_loss(mixing, attention, document_starts_bl, weights_bhs)
    width = max(mixing.b_blhn.shape[-1], attention.q_bhlp.shape[-1])
    if _chosen("orient_loss", mixing.b_blhn.device, mixing.b_blhn.dtype, kernels, width) == "triton":
        from mohawkify.ops.triton_matrix_distance import orient_loss_triton

        return orient_loss_triton(mixing, attention, document_starts_bl)
    return matrix_distance.orient_loss(mixing, attention, document_starts_bl)


def step(
    x_bf: Tensor,
    b_bf: Tensor,
    c_bf: Tensor,
    z_bf: Tensor,
    a_log_bh: Tensor,
    convs: tuple[Tensor, Tensor],
    z_bias_f: Tensor,
    d_h: Tensor,
    tail_bkf: Tensor,
    state_bhpn: Tensor,
    keep_b: Tensor | None = None,
    kernels: str = "auto",
    *,
    conv_silu: bool = False,
    write_by_decay: bool = False,
) -> Tensor:
    """The step of `decode.decode_step` by the implementation that `backend` names."""
    inputs = (x_bf, b_bf, c_bf, z_bf, a_log_bh, convs, z_bias_f, d_h, tail_bkf, state_bhpn, keep_b)
    if _chosen("step", x_bf.device, x_bf.dtype, kernels, 0) == "triton":
        elements = state_bhpn.shape[2] * state_bhpn.shape[3]
        if conv_silu or write_by_decay:
            reason = "the Triton step has neither SiLU nor writes by decay"
        elif elements > LARGEST_STATE:
            reason = f"a head's state of {elements:,} elements is over {LARGEST_STATE:,}"
        else:
            from mohawkify.ops import triton_decode

            return triton_decode.decode_step(*inputs)
        _say_once(f"step: torch on {x_bf.device}: {reason}")
    return decode_step(*inputs, conv_silu=conv_silu, write_by_decay=write_by_decay)


def _chosen(operator: Operator, device: torch.device, dtype: torch.dtype, kernels: str, width: int) -> str:
    if device.type != "cuda" or kernels == "torch":
        return "torch"
    found = _cuda_backend(operator, device, dtype, kernels, width)
    refused = kernels in IMPLEMENTATIONS and operator in IMPLEMENTATIONS[kernels][0] and found.name != kernels
    if found.name == "torch" or refused:
        _say_once(f"{operator}: {found.name} instead of {kernels} on {device}: {found.reason}")
    return found.name


@cache
def _cuda_backend(operator: Operator, device: torch.device, dtype: torch.dtype, kernels: str, width: int) -> Backend:
    """`backend`, remembered: packages and devices do not change while a process runs."""
    return backend(operator, device, dtype, kernels, width)


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _problem(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why an implementation cannot run on a CUDA device, or None."""
    _, package, extra = IMPLEMENTATIONS[name]
    if find_spec(package) is None:
        return f'{name} is not installed: pip install "mohawkify[{extra}]"'
    if torch.version.hip is not None:
        return f"{name} was never tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"{name} needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{name} computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if name == "triton" and width > WIDEST:
        return f"its kernels take widths up to {WIDEST}, not {width}"
    return None
