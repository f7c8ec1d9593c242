"""Where the student's weights come from: the teacher's tensors for all it keeps, its attention for the mixers' start.

Shapes: h query heads, g key heads, p head width, n state width, d model width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mohawkify.families.adapter import Adapter, AttentionWeights
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.mixers.mamba2 import DiscreteMamba2

LONGEST_HALF_LIFE = 60.0  # tokens; measured on stories260k, see docs/log.md


@torch.no_grad()
def copy_kept_weights(teacher: nn.Module, student: nn.Module, adapter: Adapter, mixer_layers: tuple[int, ...]) -> None:
    """Copy every tensor of the teacher, buffers too, but those of the replaced attention modules.

    The names of those are left alone even where a mixer's are the same: some families call their output projection
    ``out_proj`` or ``c_proj`` too.
    """
    replaced = tuple(f"{adapter.layers}.{index}.{adapter.attention}." for index in mixer_layers)
    target = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(replaced):
            target[name].copy_(tensor)


@torch.no_grad()
def start_as_published(student: nn.Module, layers: str, attention: str, mixer_layers: tuple[int, ...]) -> None:
    """The published start: identity convolution, gate and skip; random projections, the last one scaled down.

    Source: Llamba (arXiv 2502.14458), section 3 and the authors' initializer map.
    """
    stack = find_layers(student, layers)
    for index in mixer_layers:
        mixer = getattr(stack[index], attention)
        mixer.reset_parameters()
        mixer.out_proj.weight.mul_(1.0 / math.sqrt(len(stack)))


@torch.no_grad()
def start_from_attention(
    teacher: nn.Module,
    student: nn.Module,
    adapter: Adapter,
    mixer_layers: tuple[int, ...],
) -> None:
    """The attention start of every grafted layer: x from V, out from O, C from Q, B from K, head by head."""
    teacher_stack, student_stack = find_layers(teacher, adapter.layers), find_layers(student, adapter.layers)
    for index in mixer_layers:
        weights = read_attention(adapter, getattr(teacher_stack[index], adapter.attention))
        start_mixer_from_attention(getattr(student_stack[index], adapter.attention), weights)


@torch.no_grad()
def start_mixer_from_attention(mixer: DiscreteMamba2, weights: AttentionWeights) -> None:
    """Give one mixer the attention start.

    Biases become biases of the convolutions, which start as the identity. The skip starts at 0, since attention has
    none. With a decay bias the heads' half-lives are spread from 1 token to LONGEST_HALF_LIFE. C is scaled by
    1 - decay: a sum over the past with weights decay^k is 1 / (1 - decay) times too large for an average, which is
    what attention computes.
    """
    weights = _tensors_on(mixer.d.device, weights)
    mixer.reset_parameters()
    if mixer.decay_proj.bias is not None:
        mixer.decay_proj.bias.copy_(spread_decay_bias(mixer.num_heads, LONGEST_HALF_LIFE))
        decay_h = torch.sigmoid(-mixer.decay_proj.bias.float())
    else:
        decay_h = mixer.d.new_full((mixer.num_heads,), 0.5)  # a_log starts near 0
    num_heads, width, state_size = mixer.num_heads, mixer.head_dim, mixer.state_size
    q_hpd, repeats = weights.q_hpd, num_heads // weights.k_gpd.shape[0]
    k_hpd = weights.k_gpd.repeat_interleave(repeats, dim=0)
    v_hpd = weights.v_gpd.repeat_interleave(repeats, dim=0)
    scaling = 1.0 / math.sqrt(q_hpd.shape[1]) if weights.scaling is None else weights.scaling
    scale_h = (1.0 - decay_h) * scaling

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
        mixer.x_conv.bias.copy_(weights.v_bias_gp.repeat_interleave(repeats, dim=0).flatten())
    if state_size >= width:
        # Where the state is narrower than a head the biases are left out: they have no basis there.
        if weights.q_bias_hp is not None:
            mixer.c_conv.bias.unflatten(0, (num_heads, -1))[:, :width].copy_(weights.q_bias_hp * scale_h[:, None])
        if weights.k_bias_gp is not None:
            biases_hp = weights.k_bias_gp.repeat_interleave(repeats, dim=0)
            mixer.b_conv.bias.unflatten(0, (num_heads, -1))[:, :width].copy_(biases_hp)
    mixer.d.zero_()


def _tensors_on(device: torch.device, weights: AttentionWeights) -> AttentionWeights:
    """The weights in float32 on the mixer's device: a student is built on the CPU, its teacher may be on a GPU.

    The CPU also has the decompositions below, which not every accelerator has.
    """
    moved: dict[str, Any] = {
        name: tensor.to(device, torch.float32) for name, tensor in vars(weights).items() if isinstance(tensor, Tensor)
    }
    return replace(weights, **moved)


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
