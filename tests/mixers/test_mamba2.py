"""Discrete Mamba-2, Mamba-2 and every ingredient alone: three views of one map, starts, caches, packing, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mohawkify.families.adapter import AttentionWeights
from mohawkify.mixers.mamba2 import DiscreteMamba2, DiscreteMamba2Config, Mamba2, Mamba2Config
from mohawkify.mixers.start_attention import start_from_attention
from mohawkify.mixers.start_identity import start_identity
from mohawkify.ops.scan import mixing_matrix, scan_recurrent
from mohawkify.student.cache import RecurrentLayer
from tests.close import assert_close

HEADS, HEAD_DIM, STATE, HIDDEN = 4, 8, 6, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "discrete_mamba2": {},
    "write": {"write": "decay"},
    "conv_activation": {"conv_activation": "silu"},
    "gated_norm": {"gated_norm": True},
    "mamba2": {"write": "decay", "conv_activation": "silu", "gated_norm": True},
}


def config_of(**changes: Any) -> DiscreteMamba2Config:
    return DiscreteMamba2Config(HEADS, HEAD_DIM, out_bias=True, state_size=STATE, **changes)


@pytest.fixture(params=VARIANTS)
def mixer(request: pytest.FixtureRequest) -> DiscreteMamba2:
    """A mixer in float64 whose every parameter is off its start value."""
    torch.manual_seed(0)
    made = DiscreteMamba2(HIDDEN, config_of(**VARIANTS[request.param]), 0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


class Cache:
    """A cache of one layer."""

    def __init__(self) -> None:
        self.layers = [RecurrentLayer()]


def hidden(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(length)).to(dtype)


def test_mamba2_is_all_variants_together() -> None:
    assert vars(Mamba2Config(HEADS, HEAD_DIM)) == vars(DiscreteMamba2Config(HEADS, HEAD_DIM, **VARIANTS["mamba2"]))
    assert issubclass(Mamba2, DiscreteMamba2)


@pytest.mark.parametrize("starts_at", [(), (0, 5, 6)], ids=["whole", "packed"])
def test_recurrence_chunks_and_matrix_agree(mixer: DiscreteMamba2, starts_at: tuple[int, ...]) -> None:
    hidden_bld, starts = hidden(71), torch.zeros(2, 71, dtype=torch.bool)
    starts[:, starts_at] = True
    position_ids = torch.where(starts, 0, 1)
    by_chunks, _ = mixer(hidden_bld, position_ids=position_ids)
    mixer.scan = scan_recurrent
    by_recurrence, _ = mixer(hidden_bld, position_ids=position_ids)

    def by_matrix(x, b, c, log_decay, state, document_starts):
        return torch.einsum("bhls,bshp->blhp", mixing_matrix(b, c, log_decay, None, document_starts), x), state

    mixer.scan = by_matrix
    as_matrix, _ = mixer(hidden_bld, position_ids=position_ids)
    for name, other in (("recurrence", by_recurrence), ("matrix", as_matrix)):
        assert (other - by_chunks).abs().max() < 1e-10 * by_chunks.abs().max(), name


def test_the_matrix_of_stage_1_is_the_map_between_convolution_and_gate(mixer: DiscreteMamba2) -> None:
    hidden_bld, seen = hidden(30), {}

    def scan(x, b, c, log_decay, state, document_starts):
        seen["x"] = x
        return torch.zeros_like(x), state

    mixer.scan = scan_recurrent
    with torch.no_grad():
        matrix = mixing_matrix(*mixer.matrix_parts(hidden_bld))
        gate = torch.nn.functional.silu(mixer.z_proj(hidden_bld) + mixer.z_bias)
        expected, _ = mixer(hidden_bld)
        mixer.scan = scan
        mixer(hidden_bld)
        y = torch.einsum("bhls,bshp->blhp", matrix, seen["x"]).flatten(2)
        assert_close("output", mixer.out_proj(mixer.norm(y * gate)), expected)


def test_only_the_matrix_parameters_get_gradients_from_the_matrix(mixer: DiscreteMamba2) -> None:
    sum(part.square().sum() for part in mixer.matrix_parts(hidden(9))).backward()
    learned = {name.split(".")[0] for name, p in mixer.named_parameters() if p.grad is not None}
    assert learned == set(mixer.matrix_parameters)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_pieces_and_single_tokens_continue(mixer: DiscreteMamba2, step: int) -> None:
    hidden_bld = hidden(17)
    with torch.no_grad():
        whole, _ = mixer(hidden_bld)
        cache = Cache()
        parts = [mixer(hidden_bld[:, i : i + step], past_key_values=cache)[0] for i in range(0, 17, step)]
    assert_close("pieces", torch.cat(parts, dim=1), whole)


def test_padding_on_the_left_changes_nothing(mixer: DiscreteMamba2) -> None:
    hidden_bld, padding = hidden(12), torch.ones(2, 12)
    padding[:, :5] = 0
    with torch.no_grad():
        alone, _ = mixer(hidden_bld[:, 5:])
        cache = Cache()
        padded, _ = mixer(hidden_bld[:, :11], padding_mask=padding[:, :11], past_key_values=cache)
        last, _ = mixer(hidden_bld[:, 11:], padding_mask=padding, past_key_values=cache)
        one, stepwise = Cache(), []
        for t in range(12):
            stepwise.append(mixer(hidden_bld[:, t : t + 1], padding_mask=padding[:, : t + 1], past_key_values=one)[0])
    assert_close("prompt", padded[:, 5:], alone[:, :-1])
    assert_close("last token", last, alone[:, -1:])
    assert_close("token by token", torch.cat(stepwise, dim=1)[:, 5:], alone)


def test_bfloat16_is_near_float64_and_finite(mixer: DiscreteMamba2) -> None:
    hidden_bld = hidden(40)
    with torch.no_grad():
        exact, _ = mixer(hidden_bld)
        half = mixer.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, _ = half(hidden_bld.float())
            cache = Cache()
            steps = [half(hidden_bld[:, t : t + 1].float(), past_key_values=cache)[0] for t in range(40)]
    for found in (rounded, torch.cat(steps, dim=1)):
        assert (found.double() - exact).norm() < 0.05 * exact.norm()


def weights() -> AttentionWeights:
    torch.manual_seed(3)
    return AttentionWeights(
        torch.randn(HEADS, HEAD_DIM, HIDDEN),
        torch.randn(2, HEAD_DIM, HIDDEN),
        torch.randn(2, HEAD_DIM, HIDDEN),
        torch.randn(HIDDEN, HEADS, HEAD_DIM),
        torch.randn(HEADS, HEAD_DIM),
        torch.randn(2, HEAD_DIM),
        torch.randn(2, HEAD_DIM),
        torch.randn(HIDDEN),
    )


def started(**changes: Any) -> DiscreteMamba2:
    torch.manual_seed(0)
    made = DiscreteMamba2(HIDDEN, replace(config_of(**changes), state_size=HEAD_DIM), 0)
    start_from_attention(made, weights(), 3)
    return made


def test_with_writes_by_decay_the_start_weighs_the_past_as_without() -> None:
    """A head whose decay is constant averages: its weights over the past add up to q.k / sqrt(p)."""
    ratios = []
    for write in ("plain", "decay"):
        made = started(write=write)
        with torch.no_grad():
            made.decay_proj.weight.zero_()
            matrix = mixing_matrix(*made.matrix_parts(hidden(1).float().expand(-1, 600, -1)))
        ratios.append(matrix[:, :, -1].sum(-1))
    assert_close("sum over the past", ratios[1], ratios[0])


def test_the_odd_part_of_the_start_before_silu_is_the_start_without() -> None:
    plain, active = started(), started(conv_activation="silu")
    for conv in ("x_conv", "b_conv", "c_conv"):
        ours, theirs = getattr(active, conv), getattr(plain, conv)
        tap = 2 if conv == "x_conv" else 0.5
        assert torch.equal(ours.weight, tap * theirs.weight)
        assert torch.equal(ours.bias, tap * theirs.bias)
    u = torch.linspace(-3, 3, 7).view(1, 7, 1).expand(-1, -1, HEADS * HEAD_DIM).contiguous()
    active.x_conv.bias.data.zero_()
    odd = (active.x_conv(u, None, None)[0] - active.x_conv(-u, None, None)[0]) / 2
    assert_close("odd part", odd, u)


def test_the_norm_starts_with_the_size_of_the_values() -> None:
    made, hidden_bld = started(gated_norm=True), hidden(400).float()
    values = made.x_proj(hidden_bld)
    assert_close("size", made.norm.weight.square().mean().sqrt(), values.square().mean().sqrt(), tolerance=0.05)


def test_the_identity_start_keeps_gate_and_skip(mixer: DiscreteMamba2) -> None:
    start_identity(mixer, None, 4)
    hidden_bld = hidden(6)
    assert_close("gate", torch.nn.functional.silu(mixer.z_proj(hidden_bld) + mixer.z_bias), torch.ones(2, 6, 32))
    assert (mixer.d == 1).all()
    assert mixer.out_proj.weight.abs().max() <= 0.5 / HIDDEN**0.5
