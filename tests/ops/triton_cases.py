"""The Triton kernels against float64: run by tests/ops/test_triton.py in processes of their own.

In Triton's interpreter, without a GPU, float32 and float16 are judged (it computes bfloat16 wrongly, on the bits); on a
GPU bfloat16 too. All inputs lie in memory that is not a number before and after them, so that a kernel that reads past
an end cannot give the right result.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mohawkify.ops import triton_decode, triton_matrix_distance, triton_scan
from mohawkify.ops.conv import causal_conv
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix, orient_loss_direct
from mohawkify.ops.scan import scan_recurrent
from mohawkify.ops.triton_decode import decode_step
from mohawkify.ops.triton_matrix_distance import orient_loss_triton
from mohawkify.ops.triton_scan import scan_triton
from tests.ops.test_matrix_distance import CASES, tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# How far a result may be from float64, as a share of its largest number: a few units of the dtype's last place.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(TOLERANCE)
PADDING = 4096


def poisoned(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the device with NaN on both sides in memory."""
    memory = torch.full((tensor.numel() + 2 * PADDING,), torch.nan, dtype=dtype, device=DEVICE)
    copy = memory[PADDING : PADDING + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp_min(1e-3)
    error = ((actual.double().cpu() - expected.double().cpu()).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: {error:.1e} away from float64, expected at most {tolerance:.1e}"


def scan_inputs(length: int, dtype: torch.dtype, p_width: int, n_width: int, batch: int = 1, heads: int = 2):
    """x, B, C, log-decay and state; both sides get the numbers as the dtype rounds them."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = poisoned(normal(batch, length, heads, p_width), dtype)
    b = poisoned(normal(batch, length, heads, n_width) / n_width**0.5, dtype)
    c = poisoned(normal(batch, length, heads, n_width), dtype)
    # The first head forgets within a few tokens, the last remembers through several chunks.
    strength_h = torch.logspace(0, -2, heads, dtype=torch.float64)
    log_decay = poisoned(-F.softplus(3.0 * normal(batch, length, heads) - 1.0) * strength_h, torch.float32)
    state = poisoned(normal(batch, heads, p_width, n_width), torch.float32)
    return [t.requires_grad_() for t in (x, b, c, log_decay, state)]


def both_scans(given: list[Tensor], document_starts_bl: Tensor | None, stateful: bool):
    """Outputs, final state and gradients of the kernels, then of the recurrence in float64 on the CPU."""
    results = []
    for scan, exact in ((scan_triton, False), (scan_recurrent, True)):
        inputs = [t.detach().double().cpu().requires_grad_() for t in given] if exact else given
        borders = None if document_starts_bl is None else document_starts_bl if exact else document_starts_bl.to(DEVICE)
        y, last = scan(*inputs[:4], inputs[4] if stateful else None, borders)
        generator = torch.Generator().manual_seed(1)
        dy, dlast = (torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in (y, last))
        wanted = inputs if stateful else inputs[:4]
        gradients = torch.autograd.grad((y, last), wanted, (dy.to(y), dlast.to(last)))
        results.append((y.detach(), last.detach(), *gradients))
    return results


@pytest.mark.parametrize(
    ("length", "p_width", "n_width", "borders", "stateful", "dtype"),
    [
        (1, 16, 16, False, False, torch.float32),
        (1, 16, 16, True, True, torch.float32),
        (64, 16, 8, False, True, torch.float32),
        (100, 24, 20, True, True, torch.float32),
        *[(*sizes, dtype) for sizes in ((63, 8, 16, True, False), (130, 80, 20, True, True)) for dtype in DTYPES],
    ],
)
def test_scan_against_float64(length, p_width, n_width, borders, stateful, dtype):
    batch = 2 if length == 63 else 1
    given = scan_inputs(length, dtype, p_width, n_width, batch)
    document_starts_bl = (
        torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.06 if borders else None
    )
    actual, expected = both_scans(given, document_starts_bl, stateful)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    names = ("y", "state", "dx", "dB", "dC", "dlog_decay", "dstate")
    for name, one, other in zip(names, actual, expected, strict=False):
        assert_near(name, one, other, TOLERANCE[dtype])


def test_scan_gives_the_same_bits_twice_and_takes_gradients_one_by_one():
    given = scan_inputs(70, torch.float32, 16, 16)
    found = []
    for _ in range(2):
        y, last = scan_triton(*given)
        found.append([*torch.autograd.grad(y.sum(), given, retain_graph=True), *torch.autograd.grad(last.sum(), given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    exact = [t.detach().double().cpu().requires_grad_() for t in given]
    y, last = scan_recurrent(*exact)
    zeros = [torch.zeros_like(t) for t in exact]
    for index, loss in enumerate((y.sum(), last.sum())):
        expected = torch.autograd.grad(loss, exact, retain_graph=True, allow_unused=True)
        for actual, wanted, zero in zip(found[0][5 * index : 5 * index + 5], expected, zeros, strict=True):
            assert_near("alone", actual, zero if wanted is None else wanted, TOLERANCE[torch.float32])


def test_scan_with_extreme_decays_against_float64():
    given = scan_inputs(100, torch.float32, 16, 16)
    logits = 120 * (2 * torch.rand(given[3].shape, generator=torch.Generator().manual_seed(1)) - 1)
    given[3] = poisoned(-F.softplus(logits), torch.float32).requires_grad_()
    actual, expected = both_scans(given, None, False)
    for name, one, other in zip(("y", "state", "dx", "dB", "dC", "dlog_decay"), actual, expected, strict=True):
        assert_near(name, one, other, TOLERANCE[torch.float32])


def test_under_autocast_products_are_rounded_and_results_are_not():
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    given = scan_inputs(70, torch.float32, 16, 16)
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=enabled):
            y, state = scan_triton(*given)
        found.append([y, state, *torch.autograd.grad(y.sum() + state.sum(), given)])
    for name, plain, cast in zip(("y", "state", "dx", "dB", "dC", "dlog_decay", "dstate"), *found, strict=True):
        assert cast.dtype == torch.float32
        assert not torch.equal(plain, cast)
        assert not torch.equal(cast, cast.to(dtype).float())
        assert_near(f"autocast {name}", cast, plain, TOLERANCE[dtype])


def test_stage_1_under_autocast_gives_gradients_in_the_inputs_dtype():
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    mixing, attention, document_starts_bl = orient_inputs("all", 70, torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=enabled):
            loss, _ = orient_loss_triton(mixing, attention, document_starts_bl)
        found.append([loss, *torch.autograd.grad(loss, mixing)])
    for name, plain, cast in zip(("loss", "b", "c", "log_decay", "d"), *found, strict=True):
        assert cast.dtype == torch.float32
        assert_near(f"autocast {name}", cast, plain, TOLERANCE[dtype])


def orient_inputs(case: str, length: int, dtype: torch.dtype) -> tuple[MixingMatrix, AttentionMatrix, Tensor | None]:
    """One row of the matrices of tests/ops/test_matrix_distance.py; `holes` adds a mask that is no interval."""
    # Decays weak enough to reach beyond a tile, unless the case is about decays.
    mixing, attention, document_starts_bl = tensors(length, **{"strong": 0.03, **CASES.get(case, {})})
    mask_bhls = attention.mask_bhls[:1]
    if case == "holes":
        distance_ls = torch.arange(length)[:, None] - torch.arange(length)
        mask_bhls = mask_bhls & ((distance_ls + 1) % 5 > 0)
    b, c, log_decay = (t.detach()[:1] for t in mixing[:3])
    mixing = MixingMatrix(
        poisoned(b, dtype).requires_grad_(),
        poisoned(c, dtype).requires_grad_(),
        poisoned(log_decay, torch.float32).requires_grad_(),
        poisoned(mixing.d_h.detach(), torch.float32).requires_grad_(),
    )
    attention = attention._replace(
        q_bhlp=poisoned(attention.q_bhlp[:1], dtype),
        k_bgsp=poisoned(attention.k_bgsp[:1], dtype),
        mask_bhls=mask_bhls.to(DEVICE),
        bias_bhls=None if attention.bias_bhls is None else attention.bias_bhls.to(DEVICE, torch.float32),
    )
    return mixing, attention, None if document_starts_bl is None else document_starts_bl[:1].to(DEVICE)


def exact_orient_loss(mixing: MixingMatrix, attention: AttentionMatrix, document_starts_bl: Tensor | None):
    """The definition in float64 on the CPU: loss, relative distance, gradients."""
    exact = MixingMatrix(*(t.detach().double().cpu().requires_grad_() for t in mixing))
    attention = attention._replace(
        q_bhlp=attention.q_bhlp.double().cpu(),
        k_bgsp=attention.k_bgsp.double().cpu(),
        mask_bhls=attention.mask_bhls.cpu(),
        bias_bhls=None if attention.bias_bhls is None else attention.bias_bhls.double().cpu(),
    )
    loss, relative = orient_loss_direct(
        exact, attention, None if document_starts_bl is None else document_starts_bl.cpu()
    )
    (2.5 * loss).backward()
    return [loss.detach(), relative, *(t.grad for t in exact)]


@pytest.mark.parametrize(
    ("case", "length", "dtype"),
    [
        ("plain", 1, torch.float32),
        ("plain", 64, torch.float32),
        ("ungrouped", 33, torch.float32),
        ("softcap", 40, torch.float32),
        ("window", 63, torch.float32),
        ("alibi", 40, torch.float32),
        ("documents", 70, torch.float32),
        ("all", 100, torch.float32),
        ("holes", 40, torch.float32),
        ("strong-decay", 70, torch.float32),
        ("weak-decay", 70, torch.float32),
        ("plain", 63, torch.float16),
        ("all", 150, torch.float16),
        *[(case, 300, dtype) for case in (*CASES, "holes") for dtype in DTYPES if not INTERPRETED],
    ],
)
def test_orient_loss_against_float64(case, length, dtype):
    inputs = orient_inputs(case, length, dtype)
    loss, relative = orient_loss_triton(*inputs)
    (2.5 * loss).backward()
    found = [loss.detach(), relative, *(t.grad for t in inputs[0])]
    assert loss.dtype == torch.float32
    names = ("loss", "relative", "b", "c", "log_decay", "d")
    for name, actual, expected in zip(names, found, exact_orient_loss(*inputs), strict=True):
        assert_near(f"{case} {length} {name}", actual, expected, TOLERANCE[dtype])


def test_many_sequences_and_long_ones_fit_the_grid(monkeypatch):
    """CUDA starts at most 2**31 - 1 programs on the first axis of a grid and 65,535 on the others."""
    grids = []
    kernels = [triton_scan._walk, triton_scan._outputs, triton_scan._gradients]
    kernels += [triton_matrix_distance._normalise, triton_matrix_distance._side, triton_decode._step]
    for kernel in kernels:
        monkeypatch.setattr(kernel, "run", lambda *args, grid, **kwargs: grids.append(grid))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=DEVICE)

    batch, heads = 2048, 32
    for sizes in ((batch, 1, heads), (1, 2**22, 1)):
        x, b, c = (zeros(*sizes, 1).requires_grad_() for _ in range(3))
        scan_triton(x, b, c, zeros(*sizes))[0].sum().backward()
    mixing = MixingMatrix(zeros(batch, 1, heads, 1), zeros(batch, 1, heads, 1), zeros(batch, 1, heads), zeros(heads))
    q, mask = zeros(batch, heads, 1, 1), torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    orient_loss_triton(mixing, AttentionMatrix(q, q, 1.0, mask), None)
    features = [zeros(batch, heads) for _ in range(5)]
    convs, tail, state = (zeros(3 * heads, 1), zeros(3 * heads)), zeros(batch, 0, 3 * heads), zeros(batch, heads, 1, 1)
    decode_step(*features, convs, zeros(heads), zeros(heads), tail, state)
    assert len(grids) == 2 * 6 + 3 + 1
    assert all(first < 2**31 and all(other <= 65535 for other in others) for first, *others in grids), grids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_taps", "p_width", "n_width", "keeps"),
    [
        (1, 8, 4, None),
        (2, 12, 20, [[1, 1, 1], [1, 0, 1]]),
        (4, 16, 16, [[False, True, False], [False, False, True]]),
        (4, 16, 16, None),
    ],
)
def test_step_against_float64(num_taps, p_width, n_width, keeps, dtype):
    batch, heads = 2, 3
    generator = torch.Generator().manual_seed(num_taps)
    num_features = heads * (p_width + 2 * n_width)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return poisoned(torch.randn(*shape, dtype=torch.float64, generator=generator), dtype)

    convs = (normal(num_features, num_taps, dtype=torch.float32), normal(num_features, dtype=torch.float32))
    z_bias_f, d_h = normal(heads * p_width, dtype=torch.float32), normal(heads, dtype=torch.float32)
    tail_bkf = normal(batch, num_taps - 1, num_features)
    state_bhpn = normal(batch, heads, p_width, n_width, dtype=torch.float32)
    exact_tail, exact_state = tail_bkf.double().cpu(), state_bhpn.double().cpu()
    if num_taps == 4:  # stored tap by tap
        convs = (poisoned(convs[0].T, torch.float32).T, convs[1])
    weight_fk, bias_f, exact_z_bias, exact_d = (t.double().cpu() for t in (*convs, z_bias_f, d_h))
    widths = [heads * p_width, heads * n_width, heads * n_width]
    for index in range(3):
        projected = [normal(batch, width) for width in widths]
        z_bf, a_log_bh = normal(batch, heads * p_width), normal(batch, heads, dtype=torch.float32)
        keep_b = None if keeps is None else torch.tensor(keeps, device=DEVICE)[:, index]
        output_bf = decode_step(*projected, z_bf, a_log_bh, convs, z_bias_f, d_h, tail_bkf, state_bhpn, keep_b)
        u_b1f = torch.cat(projected, dim=-1).double().cpu().unsqueeze(1)
        kept = torch.ones(batch, 1, 1) if keep_b is None else keep_b.cpu().view(-1, 1, 1)
        mixed_b1f, next_tail = causal_conv(u_b1f, weight_fk, bias_f, exact_tail)
        exact_tail = torch.where(kept != 0, next_tail, exact_tail)
        x, b, c = (part.unflatten(-1, (heads, -1)) for part in mixed_b1f.split(widths, dim=-1))
        x, log_decay = x * kept.unsqueeze(-1), -F.softplus(a_log_bh.double().cpu()).unsqueeze(1) * kept
        y, exact_state = scan_recurrent(x, b, c, log_decay, exact_state)
        gate = F.silu(z_bf.double().cpu() + exact_z_bias)
        assert_near("output", output_bf, (y + exact_d[:, None] * x).flatten(1) * gate, TOLERANCE[dtype])
        assert_near("state", state_bhpn, exact_state, TOLERANCE[torch.float32])
        assert torch.equal(tail_bkf.double().cpu(), exact_tail)


@pytest.mark.parametrize("borders", [False, True], ids=["one-document", "packed"])
def test_flash_linear_attention_computes_the_same(borders, monkeypatch):
    simple_gla = pytest.importorskip("fla.ops.simple_gla")
    from mohawkify.ops.libraries import scan_fla

    if INTERPRETED:  # its chunked kernels do not run there; its plain form takes the same arguments
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

        monkeypatch.setattr(simple_gla, "chunk_simple_gla", naive_recurrent_simple_gla)
    given = scan_inputs(100, torch.float32, 16, 16)
    document_starts_bl = torch.rand(1, 100, generator=torch.Generator().manual_seed(2)) < 0.06 if borders else None
    borders_bl = None if document_starts_bl is None else document_starts_bl.to(DEVICE)
    with torch.no_grad():
        ours, theirs = scan_triton(*given, borders_bl), scan_fla(*given, borders_bl)
    for name, one, other in zip(("y", "state"), theirs, ours, strict=True):
        assert_near(name, one, other, 2e-6 if INTERPRETED else 2e-3)  # its products on a GPU are TensorFloat-32


@pytest.mark.skipif(INTERPRETED, reason="its package does not import without its compiled part")
@pytest.mark.parametrize("borders", [False, True], ids=["one-document", "packed"])
def test_mamba_ssm_computes_the_same(borders):
    pytest.importorskip("mamba_ssm")
    from mohawkify.ops.libraries import scan_mamba_ssm

    given = scan_inputs(256, torch.float32, 64, 64)
    document_starts_bl = torch.rand(1, 256, generator=torch.Generator().manual_seed(2)) < 0.06 if borders else None
    borders_bl = None if document_starts_bl is None else document_starts_bl.to(DEVICE)
    with torch.no_grad():
        ours, theirs = scan_triton(*given, borders_bl), scan_mamba_ssm(*given, borders_bl)
    for name, one, other in zip(("y", "state"), theirs, ours, strict=True):
        assert_near(name, one, other, 5e-3)
