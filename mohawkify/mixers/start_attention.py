"""The start of Discrete Mamba-2 and its variants from the attention that it replaces.

Shapes: h query heads, g key heads, p head width, n state width, d model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohawkify.families.adapter import AttentionWeights
from mohawkify.mixers.mamba2 import DiscreteMamba2, GatedNorm

LONGEST_HALF_LIFE = 60.0  # tokens; measured on stories260k, see docs/log.md


@torch.no_grad()
def start_from_attention(mixer: DiscreteMamba2, weights: AttentionWeights, num_layers: int) -> None:
    """Set x from V, out from O, C from Q and B from K, head by head; all in float32.

    Biases become biases of the convolutions, which start as the identity. The skip starts at 0, since attention has
    none. With a decay bias the heads' half-lives are spread from 1 token to LONGEST_HALF_LIFE. C is scaled by
    1 - decay: a sum over the past with weights decay^k is 1 / (1 - decay) times too large for an average, which is
    what attention computes. Written by decay the weights are softplus(a_log) times that, and C is divided by it. SiLU
    after a convolution is compensated in its last tap, and a gated norm starts with the size that V gives to an input
    of variance 1 (docs/math.md, variants).
    """
    config = mixer.config
    mixer.reset_parameters()
    if mixer.decay_proj.bias is not None:
        mixer.decay_proj.bias.copy_(spread_decay_bias(config.num_heads, LONGEST_HALF_LIFE))
        decay_h = torch.sigmoid(-mixer.decay_proj.bias.float())
    else:
        decay_h = mixer.d.new_full((config.num_heads,), 0.5)  # a_log starts near 0
    num_heads, width, state_size = config.num_heads, config.head_dim, config.state_size
    q_hpd, repeats = weights.q_hpd, num_heads // weights.k_gpd.shape[0]
    k_hpd = weights.k_gpd.repeat_interleave(repeats, dim=0)
    v_hpd = weights.v_gpd.repeat_interleave(repeats, dim=0)
    scaling = 1.0 / math.sqrt(q_hpd.shape[1]) if weights.scaling is None else weights.scaling
    scale_h = (1.0 - decay_h) * scaling
    if config.write == "decay":
        scale_h = scale_h / -decay_h.log()

    c_hnd, b_hnd = _fit_state_width(
        q_hpd * scale_h[:, None, None], k_hpd, mixer.b_proj.weight.float().unflatten(0, (num_heads, -1))
    )
    mixer.x_proj.weight.copy_(v_hpd.flatten(0, 1))
    mixer.c_proj.weight.copy_(c_hnd.flatten(0, 1))
    mixer.b_proj.weight.copy_(b_hnd.flatten(0, 1))
    mixer.out_proj.weight.copy_(weights.out_dhp.flatten(1))
    if weights.out_bias_d is not None:
        mixer.out_proj.bias.copy_(weights.out_bias_d)
    if weights.v_bias_gp is not None:
        biases_hp = weights.v_bias_gp.repeat_interleave(repeats, dim=0)
        mixer.x_conv.bias.copy_(biases_hp.flatten() * mixer.x_conv.last_tap)
    if state_size >= width:
        # Where the state is narrower than a head the biases are left out: they have no basis there.
        if weights.q_bias_hp is not None:
            biases_hp = weights.q_bias_hp * (scale_h[:, None] * mixer.c_conv.last_tap)
            mixer.c_conv.bias.unflatten(0, (num_heads, -1))[:, :width].copy_(biases_hp)
        if weights.k_bias_gp is not None:
            biases_hp = weights.k_bias_gp.repeat_interleave(repeats, dim=0) * mixer.b_conv.last_tap
            mixer.b_conv.bias.unflatten(0, (num_heads, -1))[:, :width].copy_(biases_hp)
    if isinstance(mixer.norm, GatedNorm):
        mixer.norm.weight.fill_(float(v_hpd.square().sum(-1).mean().sqrt()))
    mixer.d.zero_()


def _fit_state_width(q_hpd: Tensor, k_hpd: Tensor, random_hnd: Tensor) -> tuple[Tensor, Tensor]:
    """Make the rows of C and B from those of Q and K where state width n and head width p differ.

    A wider state: the further rows of C are 0 and those of B random, so that the product is unchanged and learning can
    use them. A narrower one: the best approximation of rank n of every head's Q^T K.
    """
    width, state_size = q_hpd.shape[1], random_hnd.shape[1]
    if state_size >= width:
        c_hnd, b_hnd = torch.zeros_like(random_hnd), random_hnd.clone()
        c_hnd[:, :width], b_hnd[:, :width] = q_hpd, k_hpd
        return c_hnd, b_hnd
    # SVD of the p x p core between the orthonormal row bases of Q and K: never a d x d matrix.
    q_basis_hdp, q_core_hpp = torch.linalg.qr(q_hpd.transpose(1, 2))
    k_basis_hdp, k_core_hpp = torch.linalg.qr(k_hpd.transpose(1, 2))
    u_hpp, s_hp, v_hpp = torch.linalg.svd(q_core_hpp @ k_core_hpp.transpose(1, 2))
    root_hn = s_hp[:, :state_size].sqrt()
    c_hdn = q_basis_hdp @ (u_hpp[:, :, :state_size] * root_hn.unsqueeze(1))
    b_hdn = k_basis_hdp @ (v_hpp.transpose(1, 2)[:, :, :state_size] * root_hn.unsqueeze(1))
    return c_hdn.transpose(1, 2), b_hdn.transpose(1, 2)


def spread_decay_bias(num_heads: int, longest_half_life: float) -> Tensor:
    """Biases of a_log whose heads forget half in 1 ... ``longest_half_life`` tokens, evenly in the logarithm."""
    half_life_h = torch.logspace(0.0, math.log10(longest_half_life), num_heads)
    # softplus(a_log) = ln 2 / half-life
    return torch.expm1(math.log(2.0) / half_life_h).log()
