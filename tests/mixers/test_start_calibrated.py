"""The calibrated start: exact where attention is what a mixer can do, sums that add up, truncation that is the best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mohawkify.families.adapter import AttentionWeights
from mohawkify.mixers.calibration import AttentionCall, ridge
from mohawkify.mixers.mamba2 import DiscreteMamba2, DiscreteMamba2Config
from mohawkify.mixers.start_calibrated import (
    CalibratedStart,
    balanced,
    decaying_means,
    head_features,
    map_of_features,
    start_silent,
)
from tests.close import assert_close

HEADS, GROUPS, WIDTH, HIDDEN, LENGTH = 4, 2, 8, 32, 48


def attention_weights(*, with_biases: bool = True) -> AttentionWeights:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / HIDDEN**0.5

    biases = (drawn(HEADS, WIDTH), drawn(GROUPS, WIDTH), drawn(GROUPS, WIDTH), drawn(HIDDEN))
    return AttentionWeights(
        drawn(HEADS, WIDTH, HIDDEN),
        drawn(GROUPS, WIDTH, HIDDEN),
        drawn(GROUPS, WIDTH, HIDDEN),
        drawn(HIDDEN, HEADS, WIDTH),
        *(biases if with_biases else (None,) * 4),
    )


def mixer_like_call(weights: AttentionWeights, mixer: DiscreteMamba2, seed: int) -> AttentionCall:
    """Attention whose matrices are ones that a mixer can have: (0.5 + 0.2 q.k) times a decaying mean."""
    hidden_bld = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))
    starts_bl = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts_bl[:, 0] = True
    starts_bl[1, 20] = True
    matrices, outputs = [], torch.zeros(2, LENGTH, HIDDEN)
    for head, half_life in enumerate((1.0, 4.0, 16.0, 32.0)):
        group = head // (HEADS // GROUPS)
        q, k, v = (
            hidden_bld @ weight[index].T + (0.0 if bias is None else bias[index])
            for weight, bias, index in (
                (weights.q_hpd, weights.q_bias_hp, head),
                (weights.k_gpd, weights.k_bias_gp, group),
                (weights.v_gpd, weights.v_bias_gp, group),
            )
        )
        score_bls = q @ k.transpose(1, 2) / WIDTH**0.5
        matrix_bls = (0.5 + 0.2 * score_bls) * decaying_means(0.6931471805599453 / half_life, starts_bl)
        matrices.append(matrix_bls)
        outputs = outputs + matrix_bls @ v @ weights.out_dhp[:, head].T
    if weights.out_bias_d is not None:
        outputs = outputs + weights.out_bias_d
    positions = torch.arange(LENGTH).expand(2, -1).clone()
    positions[1, 20:] -= 20
    return AttentionCall(
        hidden_bld, torch.stack(matrices, 1), outputs, starts_bl, lambda: mixer(hidden_bld, position_ids=positions)
    )


def calibrated(weights: AttentionWeights, **options: Any) -> tuple[DiscreteMamba2, float | None]:
    torch.manual_seed(0)
    config = DiscreteMamba2Config(HEADS, WIDTH, out_bias=weights.out_bias_d is not None, **options)
    mixer = DiscreteMamba2(HIDDEN, config, 0)
    start_silent(mixer, weights, 2)
    calibration, error = CalibratedStart(mixer, weights), None
    for name in CalibratedStart.passes:
        calibration.begin(name, LENGTH)
        for seed in range(16):
            calibration.add(mixer_like_call(weights, mixer, seed))
        error = calibration.solve()
    return mixer, error


@pytest.mark.parametrize("write", ["decay", "plain"])
@pytest.mark.parametrize("with_biases", [True, False])
@pytest.mark.parametrize("state_size", [WIDTH + 1, 2 * WIDTH])
def test_attention_that_a_mixer_can_do_is_found(write: str, with_biases: bool, state_size: int) -> None:
    weights = attention_weights(with_biases=with_biases)
    mixer, error = calibrated(weights, write=write, state_size=state_size)
    assert error is not None
    assert error < 0.02  # what the ridge leaves
    call = mixer_like_call(weights, mixer, seed=100)  # not among the text
    output_bld = call.call_mixer()[0].detach()
    assert float((output_bld - call.output_bld).norm() / call.output_bld.norm()) < 0.02


def test_a_narrow_state_keeps_most_of_it() -> None:
    weights = attention_weights()
    errors = [calibrated(weights, state_size=size)[1] or 0.0 for size in (1, 4, WIDTH)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


def test_the_silent_start_adds_nothing_but_the_bias() -> None:
    weights = attention_weights()
    mixer = DiscreteMamba2(HIDDEN, DiscreteMamba2Config(HEADS, WIDTH, out_bias=True), 0)
    start_silent(mixer, weights, 2)
    output_bld = mixer(torch.randn(1, 5, HIDDEN))[0]
    assert_close("output", output_bld, weights.out_bias_d.expand_as(output_bld))


def test_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    weights = attention_weights()
    mixer = DiscreteMamba2(HIDDEN, DiscreteMamba2Config(HEADS, WIDTH, out_bias=True), 0)
    start_silent(mixer, weights, 2)
    sums = []
    for seeds in ([0, 1], [0], [1]):
        calibration = CalibratedStart(mixer, weights)
        calibration.begin("decays", LENGTH)
        for seed in seeds:
            calibration.add(mixer_like_call(weights, mixer, seed))
        sums.append(calibration.sums)
    for key, whole in sums[0].items():
        assert_close(key, sums[1][key] + sums[2][key], whole)


def test_features_weigh_the_state_as_their_map_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q_brp, v_brp = (torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    state_brmp = torch.randn(2, 5, WIDTH + 1, WIDTH, generator=generator, dtype=torch.float64)
    features_brfp = head_features(q_brp, state_brmp, v_brp)
    weight_f = torch.randn(features_brfp.shape[2], generator=generator, dtype=torch.float64)
    map_mm, skip = map_of_features(weight_f, WIDTH)
    c_brm = torch.cat([q_brp, torch.ones(2, 5, 1, dtype=torch.float64)], -1) @ map_mm.T
    expected_brp = (c_brm.unsqueeze(2) @ state_brmp).squeeze(2) + skip * v_brp
    assert_close("sum", (features_brfp * weight_f[:, None]).sum(2), expected_brp)


def test_balanced_maps_keep_products_and_share_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    c, b = (torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 7.0)).double()
            for _ in range(2))  # fmt: skip
    moments = [c.T @ c / 500, b.T @ b / 500]
    c_nm, b_nm = balanced(*moments, 6)
    assert_close("products", c_nm.T @ b_nm, torch.eye(6, dtype=torch.float64))
    assert_close("moments", c_nm @ moments[0] @ c_nm.T, b_nm @ moments[1] @ b_nm.T)
    # Over all pairs, what is lost by keeping n dimensions is the sum of the squares of the other singular values.
    singular = (c_nm @ moments[0] @ c_nm.T).diagonal()
    c_nm, b_nm = balanced(*moments, 4)
    lost = ((c @ c_nm.T) @ (b @ b_nm.T).T - c @ b.T).square().mean()
    assert_close("lost", lost, singular[4:].square().sum())


def test_ridge_solves_its_equations() -> None:
    root = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    gram, target = root.T @ root, torch.ones(5, 2)
    solution = ridge(gram, target, 0.1)
    left = (gram.double() + 0.1 * torch.eye(5, dtype=torch.float64)) @ solution
    assert_close("equations", left, target.double(), 1e-6)  # which have a floor of 1e-9 of the mean square


def test_plans_know_what_it_adds_up() -> None:
    start = CalibratedStart(DiscreteMamba2(HIDDEN, DiscreteMamba2Config(HEADS, WIDTH, 16), 0), attention_weights())
    costs = CalibratedStart.costs((HEADS, GROUPS, WIDTH), HIDDEN, LENGTH)
    for (name, share), cost in zip(CalibratedStart.passes.items(), costs, strict=True):
        start.begin(name, LENGTH)
        assert cost.sums_bytes == sum(tensor.nbytes for tensor in start.sums.values())
        assert cost.share == share
        assert cost.flops > 0
