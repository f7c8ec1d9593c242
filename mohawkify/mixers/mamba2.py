"""The Discrete Mamba-2 mixer and its variants, written to be read beside their equations (docs/math.md).

Shapes: b batch, l length, d model width, h heads, p head width, n state width, f features (h * p or h * n), k taps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawkify.mixers.mixer import Mixer, MixerConfig, PreciseLinear, StateSpec, register_mixer
from mohawkify.ops.constants import scan_chunk_length
from mohawkify.ops.conv import causal_conv
from mohawkify.ops.decode import decode_step
from mohawkify.ops.scan import MixingMatrix, scan_chunked

GATE_IDENTITY_BIAS = 1.278464542761  # SiLU(1.278464542761) = 1: the gate starts as the identity
NORM_EPSILON = 1e-5
# Last taps before SiLU at the start. SiLU(2v) = v + v tanh(v), whose odd part is v. B and C start four times smaller,
# or the even parts of both dominate the matrix: measured on stories260k, KL 0.37 instead of 0.49 at the end.
SILU_TAP_X, SILU_TAP_BC = 2.0, 0.5


@dataclass(frozen=True)
class DiscreteMamba2Config(MixerConfig):
    """Sizes and options of Discrete Mamba-2; the last three options are what Mamba-2 has beside it.

    Args:
        state_size: width n of B and C per head.
        conv_kernel: taps k of the convolutions of x, B and C.
        decay_bias: whether a_log has a learned bias.
        write: what a token writes to the state is multiplied by nothing (``plain``) or by -log decay (``decay``), the
            time step of Mamba-2.
        conv_activation: what follows the convolutions.
        gated_norm: whether the gated output is normalised before the output projection.
    """

    state_size: int = 64
    conv_kernel: int = 4
    decay_bias: bool = True
    write: Literal["plain", "decay"] = "plain"
    conv_activation: Literal["none", "silu"] = "none"
    gated_norm: bool = False


@dataclass(frozen=True)
class Mamba2Config(DiscreteMamba2Config):
    """The same with the ingredients of Mamba-2 switched on; that writes by decay by nature."""

    write: Literal["plain", "decay"] = "decay"
    conv_activation: Literal["none", "silu"] = "silu"
    gated_norm: bool = True


class DepthwiseConv(nn.Module):
    """One short causal convolution and what follows it.

    Args:
        num_features: f.
        num_taps: k.
        activation: ``none`` or ``silu``.
        silu_tap: the last tap of the start with SiLU; without, it is 1, and the convolution the identity.
    """

    def __init__(self, num_features: int, num_taps: int, activation: str, silu_tap: float) -> None:
        super().__init__()
        self.activation, self.last_tap = activation, silu_tap if activation == "silu" else 1.0
        self.weight = nn.Parameter(torch.empty(num_features, num_taps))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Only the tap of the current token is not 0."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, -1] = self.last_tap
            self.bias.zero_()

    def forward(
        self,
        u_blf: Tensor,
        tail_bkf: Tensor | None,
        document_starts_bl: Tensor | None,
        num_real_b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve; see `causal_conv`."""
        y_blf, tail_bkf = causal_conv(u_blf, self.weight, self.bias, tail_bkf, document_starts_bl, num_real_b)
        return F.silu(y_blf) if self.activation == "silu" else y_blf, tail_bkf


class GatedNorm(nn.Module):
    """RMS norm over all heads of the gated output, in at least float32."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, gated: Tensor) -> Tensor:
        """Normalise (..., f) and return it in its own precision."""
        precise = gated.to(torch.promote_types(gated.dtype, torch.float32))
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + NORM_EPSILON)
        return (normed * self.weight).to(gated.dtype)


@register_mixer
class DiscreteMamba2(Mixer):
    """The mixer of Llamba and Phi-Mamba, and its variants.

    Every head maps its part of x by a matrix that is a scalar decay times C.B: see `mohawkify.ops.scan`. The
    projections are separate modules, so that a stage can train some and leave the others alone, weight decay included.

    Source: Llamba (arXiv 2502.14458), section 3; Discrete Mamba-2 of MOHAWK (arXiv 2408.10189), section 3.2.
    """

    kind = "discrete_mamba2"
    title = "Discrete Mamba-2"
    config_class = DiscreteMamba2Config
    # x, z and the output projection have no part in the matrix.
    matrix_parameters = ("b_proj", "c_proj", "decay_proj", "b_conv", "c_conv", "d")
    # A few per cent of a mixer; on a stories260k student a quarter of bfloat16's KL (measured: 2.5e-4, 1.9e-4).
    precise_parameters = (r"decay_proj\.", r"[xbc]_conv\.", r"\.z_bias$", r"\.d$")
    code = tuple(f"mohawkify.ops.{name}" for name in ("constants", "conv", "decode", "scan"))
    has_mlx = True

    # The plain operators, with which exports compute; `mohawkify.mixers.kinds` sets those that choose by device.
    scan: Callable[..., tuple[Tensor, Tensor]] = staticmethod(scan_chunked)
    step: Callable[..., Tensor] = staticmethod(decode_step)

    def __init__(self, hidden_size: int, config: DiscreteMamba2Config, layer_idx: int) -> None:
        super().__init__(hidden_size, config, layer_idx)
        inner, state = config.num_heads * config.head_dim, config.num_heads * config.state_size
        self.x_proj = nn.Linear(hidden_size, inner, bias=False)
        self.b_proj = nn.Linear(hidden_size, state, bias=False)
        self.c_proj = nn.Linear(hidden_size, state, bias=False)
        self.z_proj = nn.Linear(hidden_size, inner, bias=False)
        self.decay_proj = PreciseLinear(hidden_size, config.num_heads, bias=config.decay_bias)
        self.x_conv = DepthwiseConv(inner, config.conv_kernel, config.conv_activation, SILU_TAP_X)
        self.b_conv = DepthwiseConv(state, config.conv_kernel, config.conv_activation, SILU_TAP_BC)
        self.c_conv = DepthwiseConv(state, config.conv_kernel, config.conv_activation, SILU_TAP_BC)
        self.z_bias = nn.Parameter(torch.empty(inner))
        self.d = nn.Parameter(torch.empty(config.num_heads))
        self.norm = GatedNorm(inner) if config.gated_norm else nn.Identity()
        self.out_proj = nn.Linear(inner, hidden_size, bias=config.out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as published: convolution, gate and skip are the identity, projections are random."""
        for module in (self.x_proj, self.b_proj, self.c_proj, self.decay_proj, self.out_proj):
            module.reset_parameters()
        for conv in (self.x_conv, self.b_conv, self.c_conv):
            conv.reset_parameters()
        for parameter, value in (
            (self.z_proj.weight, 0.0),
            (self.z_bias, GATE_IDENTITY_BIAS),
            (self.d, 1.0),
            (self.decay_proj.bias, 0.0),
            (self.out_proj.bias, 0.0),
            (getattr(self.norm, "weight", None), 1.0),
        ):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def state_spec(self) -> dict[str, StateSpec]:
        """The last inputs of the convolutions (k - 1, x, B and C side by side) and the state (h, p, n)."""
        c = self.config
        features = c.num_heads * (c.head_dim + 2 * c.state_size)
        return {
            "conv_states": StateSpec((c.conv_kernel - 1, features), is_precise=False),
            "recurrent_states": StateSpec((c.num_heads, c.head_dim, c.state_size), is_precise=True),
        }

    @classmethod
    def flops(cls, config: DiscreteMamba2Config, length: int) -> float:
        """The scan by chunks."""
        width, state = config.head_dim, config.state_size
        chunk = scan_chunk_length(width, state, length)
        return 2.0 * config.num_heads * (chunk * (state + width) + 2 * state * width)

    def matrix_parts(self, hidden_bld: Tensor, document_starts_bl: Tensor | None = None) -> MixingMatrix:
        """The parts of the mixing matrix, without the work stage 1 does not need (x, z, scan, output)."""
        b_blf, _ = self.b_conv(self.b_proj(hidden_bld), None, document_starts_bl)
        c_blf, _ = self.c_conv(self.c_proj(hidden_bld), None, document_starts_bl)
        log_decay_blh = self._log_decay(hidden_bld)
        return MixingMatrix(
            self._written(b_blf, log_decay_blh),
            self._heads(c_blf, self.config.state_size),
            log_decay_blh,
            self.d.clone(),  # an engine that shards the student takes the parameter itself back after this call
        )

    def decode(self, hidden_bd: Tensor, keep_b: Tensor | None, memory: Any) -> Tensor:
        """One token, its states updated in place. Padding is never read on the host: that would wait for a GPU."""
        x_bf, b_bf, c_bf = self.x_proj(hidden_bd), self.b_proj(hidden_bd), self.c_proj(hidden_bd)
        convs = (self.x_conv, self.b_conv, self.c_conv)
        # Stored tap by tap, as the step reads them.
        weight_fk = torch.cat([conv.weight.T for conv in convs], dim=1).T
        bias_f = torch.cat([conv.bias for conv in convs])
        states = memory.in_place(self.state_spec(), x_bf)
        gated_bf = self.step(
            x_bf, b_bf, c_bf, self.z_proj(hidden_bd), self._a_log(hidden_bd), (weight_fk, bias_f), self.z_bias, self.d,
            states["conv_states"], states["recurrent_states"], keep_b,
            conv_silu=self.config.conv_activation == "silu", write_by_decay=self.config.write == "decay",
        )  # fmt: skip
        memory.advance(1)
        return self.out_proj(self.norm(gated_bf).to(hidden_bd.dtype))

    def mix(
        self,
        hidden_bld: Tensor,
        states: Mapping[str, Tensor] | None,
        document_starts_bl: Tensor | None,
        keep_bl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Mixer.mix`; the states are those of `state_spec`."""
        features = [self.x_proj(hidden_bld), self.b_proj(hidden_bld), self.c_proj(hidden_bld)]
        num_real_b = None if keep_bl is None else (keep_bl != 0).sum(1)
        widths = [feature.shape[-1] for feature in features]
        tails = (None,) * 3 if states is None else states["conv_states"].split(widths, dim=-1)
        convs = (self.x_conv, self.b_conv, self.c_conv)
        (x_blf, x_tail), (b_blf, b_tail), (c_blf, c_tail) = (
            conv(feature, tail, document_starts_bl, num_real_b)
            for conv, feature, tail in zip(convs, features, tails, strict=True)
        )
        log_decay_blh = self._log_decay(hidden_bld)
        if keep_bl is not None:
            # A padded token neither writes to the state nor lets it decay.
            x_blf = x_blf * keep_bl.unsqueeze(-1)
            log_decay_blh = log_decay_blh * keep_bl.unsqueeze(-1)
        x_blhp, c_blhn = self._heads(x_blf, self.config.head_dim), self._heads(c_blf, self.config.state_size)
        b_blhn = self._written(b_blf, log_decay_blh)
        state_bhpn = None if states is None else states["recurrent_states"]
        y_blhp, state_bhpn = self.scan(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, document_starts_bl)
        y_blhp = y_blhp + self.d.to(y_blhp.dtype).unsqueeze(-1) * x_blhp
        gate_blf = F.silu(self.z_proj(hidden_bld) + self.z_bias)
        out_bld = self.out_proj(self.norm(y_blhp.flatten(2) * gate_blf).to(hidden_bld.dtype))
        tail_bkf = torch.cat([x_tail, b_tail, c_tail], dim=-1)
        return out_bld, {"conv_states": tail_bkf, "recurrent_states": state_bhpn}

    def _written(self, b_blf: Tensor, log_decay_blh: Tensor) -> Tensor:
        """B by heads (b, l, h, n), times -log decay where it is written by it."""
        b_blhn = self._heads(b_blf, self.config.state_size)
        return (b_blhn * -log_decay_blh.unsqueeze(-1)).to(b_blhn.dtype) if self.config.write == "decay" else b_blhn

    def _log_decay(self, hidden_bld: Tensor) -> Tensor:
        """-softplus(a_log), in at least float32: errors of the decay compound along the sequence."""
        return -F.softplus(self._a_log(hidden_bld))

    def _a_log(self, hidden: Tensor) -> Tensor:
        a_log = self.decay_proj(hidden)
        return a_log.to(torch.promote_types(a_log.dtype, torch.float32))

    def _heads(self, features_blf: Tensor, width: int) -> Tensor:
        return features_blf.unflatten(-1, (self.config.num_heads, width))


@register_mixer
class Mamba2(DiscreteMamba2):
    """Mamba-2 with A = -1 and B, C of its own for every head: all variants of `DiscreteMamba2` switched on.

    Source: Mamba-2 (arXiv 2405.21060), section 7.
    """

    kind = "mamba2"
    title = "Mamba-2"
    config_class = Mamba2Config
