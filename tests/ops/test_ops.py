"""The operators against each other: recurrence = chunks = matrix, with borders, states, odd lengths and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mohawkify.ops import constants
from mohawkify.ops.conv import causal_conv
from mohawkify.ops.losses import align_loss, distill_loss
from mohawkify.ops.scan import mixing_matrix, scan_chunked, scan_recurrent
from tests.close import assert_close

LENGTHS = [1, 2, 63, 64, 65, 100, 129, 257]


def inputs(length: int, dtype: torch.dtype = torch.float64, batch: int = 2, spread: float = 3.0, seed: int = 0):
    """Random x, B, C and log-decay with 3 heads, head width 5, state width 7."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, b, c = normal(batch, length, 3, 5), normal(batch, length, 3, 7), normal(batch, length, 3, 7)
    log_decay = -F.softplus(spread * normal(batch, length, 3))
    return [t.to(dtype).requires_grad_() for t in (x, b, c, log_decay)]


def starts(length: int, batch: int = 2) -> torch.Tensor:
    """Document starts, about one token in eight."""
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.125


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("borders", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("stateful", [False, True], ids=["fresh", "continued"])
def test_chunks_equal_recurrence(length, borders, stateful):
    tensors = inputs(length)
    state = torch.randn(2, 3, 5, 7, dtype=torch.float64).requires_grad_() if stateful else None
    document_starts_bl = starts(length) if borders else None
    results = []
    for scan in (scan_recurrent, scan_chunked):
        y, final = scan(*tensors, state, document_starts_bl)
        wanted = [*tensors, state] if stateful else tensors
        results.append((y, final, *torch.autograd.grad(y.sin().sum() + final.cos().sum(), wanted)))
    for name, actual, expected in zip(
        ("y", "state", "dx", "dB", "dC", "dlog_decay", "dstate"), *results[::-1], strict=False
    ):
        assert_close(name, actual, expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("borders", [False, True], ids=["one-document", "packed"])
def test_matrix_equals_recurrence(length, borders):
    x, b, c, log_decay = inputs(length)
    document_starts_bl = starts(length) if borders else None
    d_h = torch.randn(3, dtype=torch.float64)
    y, _ = scan_recurrent(x, b, c, log_decay, None, document_starts_bl)
    expected = y + d_h[:, None] * x
    matrix = mixing_matrix(b, c, log_decay, d_h, document_starts_bl)
    assert_close("y", torch.einsum("bhls,bshp->blhp", matrix, x), expected)
    assert matrix.triu(1).abs().max() == 0
    actual = torch.autograd.grad(torch.einsum("bhls,bshp->blhp", matrix, x).sin().sum(), (b, c, log_decay))
    reference = torch.autograd.grad(expected.sin().sum(), (b, c, log_decay))
    for name, one, other in zip(("dB", "dC", "dlog_decay"), actual, reference, strict=True):
        assert_close(name, one, other)


def test_chunked_gradients_by_finite_differences():
    tensors = inputs(7, batch=1)
    state = torch.randn(1, 3, 5, 7, dtype=torch.float64).requires_grad_()
    document_starts_bl = starts(7, batch=1)
    assert torch.autograd.gradcheck(
        lambda *args: scan_chunked(*args, document_starts_bl=document_starts_bl, chunk_length=4),
        (*tensors, state),
        atol=1e-8,
    )


@pytest.mark.parametrize("chunk_length", [1, 2, 16, 64, 300])
def test_chunk_length_does_not_matter(chunk_length):
    tensors = inputs(130)
    expected, expected_state = scan_chunked(*tensors)
    actual, state = scan_chunked(*tensors, chunk_length=chunk_length)
    assert_close("y", actual, expected)
    assert_close("state", state, expected_state)


def test_state_is_handed_over_exactly():
    x, b, c, log_decay = inputs(100)
    whole, final = scan_chunked(x, b, c, log_decay)
    first, state = scan_chunked(x[:, :37], b[:, :37], c[:, :37], log_decay[:, :37])
    second, state = scan_chunked(x[:, 37:], b[:, 37:], c[:, 37:], log_decay[:, 37:], state)
    assert_close("y", torch.cat([first, second], 1), whole)
    assert_close("state", state, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 129, 257])
def test_low_precision_against_float64(dtype, length):
    tensors = inputs(length, dtype)
    exact, exact_state = scan_recurrent(*(t.double() for t in tensors))
    y, state = scan_chunked(*tensors)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert_close("y", y, exact, {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])
    assert_close("state", state, exact_state, 1e-5)


def test_autocast_does_not_lower_the_scan():
    tensors = inputs(100, torch.float32)
    plain, _ = scan_chunked(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = scan_chunked(*tensors)
        matrix = mixing_matrix(*tensors[1:])
    assert torch.equal(plain, cast)
    assert torch.equal(matrix, mixing_matrix(*tensors[1:]))


def test_gradients_taken_under_autocast_are_the_same():
    gradients = []
    for enabled in (False, True):
        tensors = inputs(100, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, state = scan_chunked(*tensors)
            gradients.append(torch.autograd.grad(y.sin().sum() + state.cos().sum(), tensors))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_low_precision_against_float64(dtype):
    tensors = inputs(257, dtype)
    document_starts_bl = starts(257)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    found = []
    for scan, given in ((scan_chunked, tensors), (scan_recurrent, exact)):
        y, state = scan(*given, None, document_starts_bl)
        found.append(torch.autograd.grad(y.sum() + state.sum(), given))
    for name, one, other in zip(("dx", "dB", "dC", "dlog_decay"), *found, strict=True):
        assert one.dtype == dtype
        assert_close(name, one, other, {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 1, 1), (1, 64, 1), (2, 1, 3), (1, 33, 1)])
def test_inputs_are_left_as_they_are(batch, length, heads):
    shapes = [(5,), (7,), (7,), ()]
    tensors = [torch.randn(batch, length, heads, *shape) for shape in shapes]
    tensors[3] = -tensors[3].abs()
    state = torch.randn(batch, heads, 5, 7)
    kept = [t.clone() for t in (*tensors, state)]
    for learned in (False, True):
        given = [t.requires_grad_(learned) for t in (*tensors, state)]
        y, final = scan_chunked(*given)
        if learned:
            (y.sum() + final.sum()).backward()
        assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_groups_of_chunks_do_not_matter(monkeypatch):
    tensors, document_starts_bl = inputs(130), starts(130)
    results = []
    for numbers in (1, 1 << 12, 1 << 30):
        monkeypatch.setattr(constants, "SCAN_GROUP_ELEMENTS", numbers)
        y, state = scan_chunked(*tensors, None, document_starts_bl)
        results.append((y, state, *torch.autograd.grad(y.sin().sum() + state.cos().sum(), tensors)))
    for other in results[1:]:
        for name, one, two in zip(("y", "state", "dx", "dB", "dC", "dlog_decay"), results[0], other, strict=True):
            assert_close(name, one, two)


def test_a_document_starting_gets_no_gradient_of_its_decay():
    tensors, document_starts_bl = inputs(65, torch.float32), starts(65)
    document_starts_bl[:, 0] = True
    y, state = scan_chunked(*tensors, None, document_starts_bl)
    (gradient,) = torch.autograd.grad(y.sum() + state.sum(), tensors[3:])
    assert gradient[document_starts_bl].abs().max() == 0
    assert gradient[~document_starts_bl].abs().min() > 0


@pytest.mark.parametrize("a_log", [-120.0, -44.5, -5.75, 0.0, 5.75, 44.5, 120.0])
def test_extreme_decays_stay_finite(a_log):
    x, b, c, _ = inputs(129, torch.float32)
    logits = torch.full((2, 129, 3), a_log, requires_grad=True)
    y, state = scan_chunked(x, b, c, -F.softplus(logits))
    gradients = torch.autograd.grad(y.sum() + state.sum(), (x, b, c, logits))
    exact, _ = scan_recurrent(x.double(), b.double(), c.double(), -F.softplus(logits.double()))
    assert_close("y", y, exact, 1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_mixed_extreme_decays_against_float64():
    x, b, c, _ = inputs(257, torch.float32)
    logits = 120 * (2 * torch.rand(2, 257, 3, generator=torch.Generator().manual_seed(1)) - 1)
    y, _ = scan_chunked(x, b, c, -F.softplus(logits))
    exact, _ = scan_recurrent(x.double(), b.double(), c.double(), -F.softplus(logits.double()))
    assert_close("y", y, exact, 1e-5)


@pytest.mark.parametrize("lowest", [-2000.0, -1e30, -torch.inf])
def test_tokens_that_forget_everything_leave_what_follows_alone(lowest):
    x, b, c, log_decay = inputs(70)
    with torch.no_grad():
        log_decay[:, [0, 3, 20, 21, 64]] = lowest
    results = []
    for scan in (scan_recurrent, scan_chunked, by_matrix):
        y = scan(x, b, c, log_decay)[0]
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, b, c, log_decay))))
    for found in results[1:]:
        for name, actual, expected in zip(("y", "dx", "dB", "dC", "dlog_decay"), found, results[0], strict=True):
            assert_close(name, actual, expected)


def by_matrix(x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, log_decay: torch.Tensor) -> tuple[torch.Tensor]:
    """The scan through its matrix."""
    return (torch.einsum("bhls,bshp->blhp", mixing_matrix(b, c, log_decay), x),)


def test_scan_is_causal_and_documents_are_separate():
    x, b, c, log_decay = inputs(96)
    document_starts_bl = torch.zeros(2, 96, dtype=torch.bool)
    document_starts_bl[:, [0, 40, 41]] = True
    y, _ = scan_chunked(x, b, c, log_decay, None, document_starts_bl)
    changed = x.detach().clone()
    changed[:, 40] += 1.0
    other, _ = scan_chunked(changed, b, c, log_decay, None, document_starts_bl)
    difference = (other - y).abs().amax(dim=(0, 2, 3))
    assert difference[40] > 0
    assert difference[:40].max() == 0
    assert difference[41:].max() == 0


def slow_conv(u, weight, bias, document_starts_bl):
    """The definition, one number at a time."""
    batch, length, num_features = u.shape
    num_taps = weight.shape[1]
    y = torch.zeros_like(u)
    for i in range(batch):
        for t in range(length):
            for f in range(num_features):
                total = bias[f]
                for lag in range(num_taps):
                    source = t - lag
                    if source < 0 or document_starts_bl[i, source + 1 : t + 1].any():
                        break
                    total = total + weight[f, num_taps - 1 - lag] * u[i, source, f]
                y[i, t, f] = total
    return y


@pytest.mark.parametrize("num_taps", [1, 2, 4])
def test_conv_equals_its_definition(num_taps):
    generator = torch.Generator().manual_seed(num_taps)
    u = torch.randn(2, 19, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, num_taps, dtype=torch.float64, generator=generator)
    bias = torch.randn(3, dtype=torch.float64, generator=generator)
    document_starts_bl = torch.rand(2, 19, generator=generator) < 0.3
    y, _ = causal_conv(u, weight, bias, None, document_starts_bl)
    assert_close("packed", y, slow_conv(u, weight, bias, document_starts_bl))
    y, tail = causal_conv(u, weight, bias)
    assert_close("one document", y, slow_conv(u, weight, bias, torch.zeros_like(document_starts_bl)))
    first, middle = causal_conv(u[:, :2], weight, bias)
    second, end = causal_conv(u[:, 2:], weight, bias, middle)
    assert_close("continued", torch.cat([first, second], 1), y)
    assert torch.equal(end, tail)


@pytest.mark.parametrize("num_taps", [1, 4])
def test_conv_gradients_by_finite_differences(num_taps):
    generator = torch.Generator().manual_seed(num_taps)
    shapes = (2, 9, 3), (3, num_taps), (3,), (2, num_taps - 1, 3)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    document_starts_bl = torch.rand(2, 9, generator=generator) < 0.3
    for starts_bl in (None, document_starts_bl):
        assert torch.autograd.gradcheck(lambda *args, starts=starts_bl: causal_conv(*args, starts), tensors)


def test_align_loss_is_zero_at_the_teacher():
    hidden = torch.randn(2, 5, 8)
    loss, relative = align_loss(hidden, hidden.clone())
    assert loss == 0
    assert relative == 0
    assert align_loss(hidden + 1.0, hidden)[0].item() == pytest.approx(8**0.5, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distill_loss_against_its_definition(temperature):
    student = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    counts = torch.tensor([[True, False, True, True, False], [False] * 5])
    loss, kl = distill_loss(student, teacher, counts, temperature)
    p = (teacher[counts] / temperature).softmax(-1)
    log_q = (student[counts] / temperature).log_softmax(-1)
    expected = temperature**2 * -(p * log_q).sum(-1).mean()
    expected_kl = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert kl.item() == pytest.approx(expected_kl.item(), abs=1e-6)
    assert distill_loss(teacher, teacher, counts, temperature)[1].abs() < 1e-6
    assert distill_loss(student, teacher, torch.zeros_like(counts), temperature)[0] == 0
