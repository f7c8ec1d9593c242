"""Stage 1's loss: the pass over bands against the definition, in every shape that teachers have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mohawkify.ops import constants, matrix_distance
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix, orient_loss_direct
from mohawkify.ops.scan import mixing_matrix
from tests.close import assert_close

BATCH, HEADS = 2, 4


def tensors(
    length: int,
    *,
    groups: int = 2,
    softcap: float | None = None,
    window: int | None = None,
    bias: bool = False,
    borders: tuple[int, ...] = (0,),
    strong: float = 1.0,
    values: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[MixingMatrix, AttentionMatrix, Tensor | None]:
    """Random sides of one layer."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mixing = MixingMatrix(
        random(BATCH, length, HEADS, 5),
        0.3 * random(BATCH, length, HEADS, 5),
        -strong * random(BATCH, length, HEADS).exp(),
        random(HEADS),
    )
    for tensor in mixing:
        tensor.requires_grad_()
    document_starts_bl = torch.zeros(BATCH, length, dtype=torch.bool)
    document_starts_bl[:, [border for border in borders if border < length]] = True
    document_bl = document_starts_bl.cumsum(-1)
    mask = (document_bl[:, :, None] == document_bl[:, None]).tril()
    if window is not None:
        mask = mask & ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    slopes = torch.tensor([0.5**head for head in range(HEADS)], dtype=dtype)
    alibi = slopes[:, None, None] * torch.arange(length, dtype=dtype) if bias else None
    attention = AttentionMatrix(
        random(BATCH, HEADS, length, 6),
        random(BATCH, groups, length, 6),
        0.4,
        mask.unsqueeze(1),
        softcap,
        None if alibi is None else alibi.unsqueeze(0),
        random(BATCH, groups, length).abs() if values else None,
    )
    return mixing, attention, None if borders == (0,) else document_starts_bl


def both(*arguments, **options):
    """Loss, relative distance and gradients of the pass over bands, then of the definition."""
    found = []
    for function in (matrix_distance.orient_loss, orient_loss_direct):
        mixing, attention, document_starts_bl = tensors(*arguments, **options)
        weights_bhs = attention.column_weights() if options.get("values") else None
        loss, relative = function(mixing, attention, document_starts_bl, weights_bhs)
        (2.5 * loss).backward()
        found.append([loss.detach(), relative, *(tensor.grad for tensor in mixing)])
    return found


CASES = {
    "plain": {},
    "grouped-once": {"groups": 1},
    "ungrouped": {"groups": 4},
    "softcap": {"softcap": 1.5},
    "window": {"window": 4},
    "alibi": {"bias": True},
    "documents": {"borders": (0, 3, 4, 17, 40)},
    "all": {"groups": 1, "softcap": 2.0, "window": 6, "bias": True, "borders": (0, 16, 33)},
    "strong-decay": {"strong": 40.0},
    "weak-decay": {"strong": 1e-4},
    "values": {"values": True, "borders": (0, 3, 17)},
    "grouped-values": {"values": True, "groups": 1, "window": 6},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 100])
def test_bands_give_the_definitions_loss_and_gradients(case, length, monkeypatch):
    monkeypatch.setattr(constants, "BAND_ELEMENTS", 1)  # the shortest bands: 16 rows
    names = ("loss", "relative", "b", "c", "log_decay", "d")
    for name, found, expected in zip(names, *both(length, **CASES[case]), strict=True):
        assert_close(f"{case} {length} {name}", found, expected)


@pytest.mark.parametrize("case", CASES)
def test_the_height_of_the_bands_does_not_matter(case, monkeypatch):
    low = both(90, **CASES[case])[0]
    monkeypatch.setattr(constants, "BAND_ELEMENTS", 1)
    for found, expected in zip(both(90, **CASES[case])[0], low, strict=True):
        assert_close(case, found, expected)


@pytest.mark.parametrize("case", ["plain", "all", "strong-decay"])
def test_float32_is_no_worse_than_the_definition(case):
    truth = both(200, **CASES[case])[1]
    tiles, direct = both(200, **CASES[case], dtype=torch.float32)
    for exact, ours, theirs in zip(truth, tiles, direct, strict=True):
        scale = max(1.0, exact.abs().max().item())
        error, allowed = ((each.double() - exact).abs().max().item() / scale for each in (ours, theirs))
        assert error <= 2 * allowed + 1e-6


def test_bf16_inputs_are_computed_in_float32():
    ours, direct = both(50, dtype=torch.bfloat16)
    assert ours[0].dtype == torch.float32
    for found, expected in zip(ours, direct, strict=True):
        assert found.dtype == expected.dtype
        assert_close("bf16", found.float(), expected.float(), tolerance=2e-2)


def test_autocast_changes_nothing():
    mixing, attention, _ = tensors(40, dtype=torch.float32)
    plain = matrix_distance.orient_loss(mixing, attention, None)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix_distance.orient_loss(mixing, attention, None)[0], plain)


def test_the_loss_is_zero_at_the_teacher():
    # Uniform attention is a mixing matrix: C.B = 1 / (l + 1) without decay.
    length = 30
    c = (1.0 / torch.arange(1, length + 1, dtype=torch.float64)).view(1, length, 1, 1).requires_grad_()
    b = torch.ones(1, length, 1, 1, dtype=torch.float64, requires_grad=True)
    log_decay = torch.zeros(1, length, 1, dtype=torch.float64, requires_grad=True)
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    q = k = torch.zeros(1, 1, length, 2, dtype=torch.float64)
    attention = AttentionMatrix(q, k, 1.0, torch.ones(length, length, dtype=torch.bool).tril())
    for function in (matrix_distance.orient_loss, orient_loss_direct):
        loss, relative = function(MixingMatrix(b, c, log_decay, d), attention, None)
        assert loss < 1e-14
        assert relative < 1e-14
        loss.backward()
        assert torch.isfinite(c.grad).all()


def test_the_definition_is_the_distance_of_the_two_matrices():
    mixing, attention, document_starts_bl = tensors(12, **CASES["all"])
    matrix, p = mixing_matrix(*mixing, document_starts_bl), attention.probabilities()
    assert_close("rows", p.sum(-1), torch.ones_like(p[..., 0]))
    expected = (matrix - p).flatten(2).norm(dim=-1).mean()
    assert_close("loss", orient_loss_direct(mixing, attention, document_starts_bl)[0], expected)


def test_columns_count_by_the_lengths_of_their_values():
    mixing, attention, _ = tensors(12, values=True)
    weights = attention.column_weights()
    assert_close("means", weights.mean(-1), torch.ones(BATCH, HEADS, dtype=torch.float64))
    lengths = attention.value_norms_bgs.repeat_interleave(HEADS // 2, dim=1)
    assert_close("ratios", weights / weights[..., :1], lengths / lengths[..., :1])
    rest = (mixing_matrix(*mixing, None) - attention.probabilities()) * weights.unsqueeze(-2)
    expected = rest.flatten(2).norm(dim=-1).mean()
    assert_close("loss", orient_loss_direct(mixing, attention, None, weights)[0], expected)


@pytest.mark.parametrize("case", ["all", "values"])
def test_gradients_by_finite_differences(case):
    mixing, attention, document_starts_bl = tensors(20, **CASES[case])
    weights_bhs = attention.column_weights() if case == "values" else None

    def loss(*parts: Tensor) -> Tensor:
        return matrix_distance.orient_loss(MixingMatrix(*parts), attention, document_starts_bl, weights_bhs)[0]

    assert torch.autograd.gradcheck(loss, tuple(mixing))


@pytest.mark.parametrize("lowest", [-2000.0, -1e30, -torch.inf])
def test_tokens_that_forget_everything_leave_what_follows_alone(lowest, monkeypatch):
    monkeypatch.setattr(constants, "BAND_ELEMENTS", 1)
    results = []
    for function, low in ((matrix_distance.orient_loss, lowest), (orient_loss_direct, -800.0)):
        mixing, attention, _ = tensors(40)
        with torch.no_grad():
            mixing.log_decay_blh[:, [0, 3, 16, 17, 30]] = low
        loss, relative = function(mixing, attention, None)
        loss.backward()
        results.append((loss.detach(), relative, *(tensor.grad for tensor in mixing)))
    for found, expected in zip(*results, strict=True):
        assert_close(str(lowest), found, expected)


def test_second_derivatives_are_refused():
    mixing, attention, _ = tensors(8)
    loss, _ = matrix_distance.orient_loss(mixing, attention, None)
    (gradient,) = torch.autograd.grad(loss.square(), mixing.c_blhn, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
